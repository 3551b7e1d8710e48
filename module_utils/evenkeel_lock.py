# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""The platform's lock: a file on a host, and what the controller can say of its owner. Standard library only."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pwd
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ansible.module_utils.evenkeel_host import Attributes, remove, write_file

FIELDS = ("id", "run", "purpose", "who", "process", "since", "expires")


class LockError(Exception):
    """A lock that cannot be read; the text is for people."""


@contextmanager
def alone(path: str) -> Iterator[None]:
    """Keep every other process of this host away from the lock."""
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read(path: str) -> dict[str, Any]:
    """The lock; empty when nobody holds it."""
    try:
        with open(path, "rb") as file:
            lock = json.load(file)
    except FileNotFoundError:
        return {}
    except ValueError:
        lock = None
    if not isinstance(lock, dict) or not all(key in lock for key in FIELDS):
        raise LockError(f"{path} is no lock of this suite. Look at it, see that no deploy is under way, then type there: rm {path}")
    return lock


def hold(path: str, wanted: Mapping[str, Any], hours: float, take_over: str, now: datetime) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take the lock if it is free or is the one named by `take_over`. wanted: id, run, purpose, who, process.

    Returns what was there (empty: it was free) and what is there now.
    """
    with alone(path):
        before = read(path)
        if before and before["id"] not in (wanted["id"], take_over):
            return before, before
        if before and before["id"] == wanted["id"]:
            return before, before
        lock = {**wanted, "since": _iso(now), "expires": _iso(now + timedelta(hours=hours))}
        data = (json.dumps(lock, indent=2) + "\n").encode()
        write_file(path, data, Attributes(os.geteuid(), os.getegid(), 0o640))
        return before, lock


def release(path: str, identity: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the lock back if it is this one. Returns what was there and what is there now."""
    with alone(path):
        before = read(path)
        if before.get("id") != identity:
            return before, before
        remove(path)
        return before, {}


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def whoami() -> str:
    """The person at this controller: the account, not what the environment says of it; behind sudo, who called it."""
    account = pwd.getpwuid(os.getuid()).pw_name
    return f"{os.environ.get('SUDO_USER') or account if account == 'root' else account}@{socket.gethostname()}"


def this_process(proc: Path = Path("/proc")) -> dict[str, Any]:
    """The `ansible-playbook` that this process is a worker of, so that a later one can tell whether it still runs.

    Workers are forks: their command line is that of the process that made them. Empty where there is no /proc.
    """
    try:
        number = os.getpid()
        own = (proc / str(number) / "cmdline").read_bytes()
        while True:
            parent = int(_stat(number, proc)[1])
            if (proc / str(parent) / "cmdline").read_bytes() != own:
                break
            number = parent
        return {**_place(proc), "pid": number, "started": int(_stat(number, proc)[19])}
    except (OSError, ValueError, IndexError):
        return {}


def _stat(number: int, proc: Path) -> list[str]:
    """Fields of a process from its state on: state 0, parent 1, start in ticks since the boot 19."""
    return (proc / str(number) / "stat").read_text().rpartition(")")[2].split()


def _place(proc: Path) -> dict[str, str]:
    """Where a process number means something: the machine, its boot, and the namespace of a container."""
    machine = Path("/etc/machine-id").read_bytes()
    return {
        "machine": hashlib.sha256(b"evenkeel" + machine).hexdigest()[:16],
        "boot": (proc / "sys/kernel/random/boot_id").read_text().strip(),
        "namespace": os.readlink(proc / "self/ns/pid"),
    }


def life(process: Mapping[str, Any], proc: Path = Path("/proc")) -> str:
    """Whether the owner's process `runs`, is `gone`, or (on another machine, or in another container) is `unknown`."""
    try:
        here = _place(proc)
    except OSError:
        return "unknown"
    if not process or process.get("machine") != here["machine"]:
        return "unknown"
    if process["boot"] != here["boot"]:
        return "gone"
    if process["namespace"] != here["namespace"]:
        return "unknown"
    try:
        fields = _stat(int(process["pid"]), proc)
    except (OSError, ValueError):
        return "gone"
    return "runs" if int(fields[19]) == process["started"] and fields[0] not in "ZX" else "gone"


def ago(since: str, now: datetime) -> str:
    """How long ago a moment was."""
    seconds = (now - datetime.fromisoformat(since)).total_seconds()
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} seconds ago"


def held_text(lock: Mapping[str, Any], now: datetime, alive: str) -> str:
    """Who holds the lock, since when, whether it still works, and what to type."""
    late = datetime.fromisoformat(lock["expires"]) <= now
    until = f"it has expired at {_short(lock['expires'])}" if late else f"until {_short(lock['expires'])} at the longest"
    since = f"since {_short(lock['since'])}, {ago(lock['since'], now)}"
    text = f"{lock['purpose']} ({lock['run']}) by {lock['who']} holds the lock {since}; {until}."
    pid = lock["process"].get("pid", "unknown")
    if alive == "runs":
        return f"{text} It still runs here as process {pid}: wait for it, or end it (kill {pid}), then type your command again"
    known = f"Whether it still runs, only its controller knows (process {pid})"
    if alive == "gone":
        known = "Its process on this controller has ended"
    return f"{text} {known}. When you are sure that it has ended, take the lock over: add -e take_over={lock['id']} to your command"


def _short(moment: str) -> str:
    return datetime.fromisoformat(moment).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def wanted_take_over(lock: Mapping[str, Any], mine: str, take_over: str, alive: str) -> str:
    """The id of the foreign lock that may be taken over: the one that was named, or that of an ended run of the same person; or none."""
    if alive == "runs":
        return ""
    if lock["id"] == take_over or (alive == "gone" and lock["who"] == mine and not take_over):
        return str(lock["id"])
    return ""


def refusal(lock: Mapping[str, Any], take_over: str, now: datetime, alive: str) -> str:
    """Why the lock is not taken."""
    held = held_text(lock, now, alive)
    if take_over and take_over != lock["id"]:
        return f"The lock {take_over} is not there any more; the one held now is {lock['id']}: {held}"
    return held

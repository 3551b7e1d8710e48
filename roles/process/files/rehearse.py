#!/usr/bin/python3 -IS
"""Rehearse the migrations of a release on copies of the databases, in a closed room; the request is JSON on standard input.

The room is a network of its own in which the platform's addresses exist, but only the doors to the copies are open: whatever else
is asked there, refuses. So the application runs with its own configuration, unchanged, and cannot reach what is live. /run is hidden
and its directories are empty ones, so that it meets no socket, job or file of the live processes either.

It runs the checks of the current release before the migrations, and those of the current and the new release after them. What
failed before is not counted. The last line on standard output is the verdict as JSON:
{outcome: passed | failed, why, seconds, migrations: [{database, app, name, seconds}], checks: [{release, when, check, problem, counts}]}.
"""

from __future__ import annotations

import ctypes
import fcntl
import grp
import http.client
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PLACE = Path("/var/lib/evenkeel/rehearsal")
LISTEN = "/usr/local/lib/evenkeel/listen.py"
SLICE = "evenkeel-rehearsal.slice"
NEW_NETWORK = 0x40000000  # CLONE_NEWNET
ANSWER_SECONDS = 30
PROBE_SECONDS = 1800
WORDS = 400  # characters of what a program said that are told

Checks = dict[str, str]  # name of a check to its problem, empty when there is none
Apply = Callable[[], tuple[str, list[dict[str, Any]]]]


class RehearsalError(Exception):
    """The rehearsal cannot be held; the message is for people."""


# --- the verdict --------------------------------------------------------------------------------------------------------


def broken(now: Checks, before: Checks) -> Checks:
    """The checks that fail and did not fail before."""
    return {name: problem for name, problem in now.items() if problem and not before.get(name)}


def told(problems: Checks) -> str:
    """Problems in one sentence; of many, the first three."""
    shown = [f"{name}: {problem}" for name, problem in list(problems.items())[:3]]
    return "; ".join(shown) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


def rehearse(current: str, release: str, examine: Callable[[str], Checks], apply: Apply) -> dict[str, Any]:
    """Hold the rehearsal: {outcome, why, migrations, checks}.

    current: the release that runs, empty before the first deploy. examine: the checks of a release on the copies as they are.
    apply: applies the migrations; returns why they failed (empty when they did not) and what was applied.
    """
    rows: list[dict[str, Any]] = []

    def look(which: str, when: str, before: Checks) -> Checks:
        found = examine(which)
        counted = broken(found, before)
        rows.extend(
            {"release": which, "when": when, "check": name, "problem": problem, "counts": name in counted or not problem}
            for name, problem in found.items()
        )
        return found

    before = look(current, "before", {}) if current else {}
    for row in rows:
        row["counts"] = not row["problem"]  # it is the measure, not judged itself
    problem, migrations = apply()
    result = {"outcome": "failed", "migrations": migrations, "checks": rows}
    if problem:
        return {**result, "why": f"the migrations fail on the copy: {problem}"}
    if current:
        bad = broken(look(current, "after", before), before)
        if bad:
            return {**result, "why": f"the running release {current} does not work on the migrated copy ({told(bad)})"}
    bad = broken(look(release, "after", before), before) if release != current else {}
    if bad:
        return {**result, "why": f"the new release {release} does not work on the migrated copy ({told(bad)})"}
    return {**result, "outcome": "passed", "why": ""}


def last_words(text: str) -> str:
    """The last line that names an error (the end of Python's tracebacks, PostgreSQL's words), else the last one."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"([\w.]+\.)?[A-Z]\w+: |(?i:error|fatal): ", line)]
    return ((errors or lines or ["it said nothing"])[-1])[-WORDS:]


def applied(code: int, out: str, said: str) -> tuple[str, list[dict[str, Any]]]:
    """What the program that applies migrations said: why it failed, empty when it did not, and the migrations.

    Its last line is JSON with migrations, outcome and why; a command that says no JSON is judged by its exit code.
    """
    lines = out.strip().splitlines()
    answer: dict[str, Any] = {}
    with suppress(ValueError, IndexError):
        answer = json.loads(lines[-1])
    if not isinstance(answer, dict) or "migrations" not in answer:
        return ("" if code == 0 else last_words(said or out)), []
    why = str(answer.get("why") or "")
    failed = code != 0 or answer.get("outcome") == "failed"
    return ((why or last_words(said)) if failed else ""), list(answer["migrations"])


def wrong_answer(check: Mapping[str, Any], status: int, body: str) -> str:
    """What is wrong with an answer, empty when nothing is."""
    if status != check["status"]:
        return f"answered {status}, not {check['status']}"
    missing = [words for words in check["contains"] if words not in body]
    return f"the answer lacks {missing[0]!r}" if missing else ""


def probed(code: int, out: str, said: str) -> Checks:
    """The checks of the probe: one JSON object on its last line, name to problem."""
    with suppress(ValueError, IndexError):
        found = json.loads(out.strip().splitlines()[-1])
        if code == 0:
            return {str(name): str(problem) for name, problem in found.items()}
    return {"the models of the application": last_words(said or out)}


# --- the room -------------------------------------------------------------------------------------------------------------


class Room:
    """A network of its own, with doors to the copies. Its sockets are made here, in it; programs enter it through systemd."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.outside = os.open("/proc/self/ns/net", os.O_RDONLY)
        if self.libc.unshare(NEW_NETWORK):
            raise RehearsalError(f"this host gives no network of its own ({os.strerror(ctypes.get_errno())})")
        self.inside = os.open("/proc/self/ns/net", os.O_RDONLY)
        try:
            for words in (["link", "set", "lo", "up"], *(["address", "add", address, "dev", "lo"] for address in addresses)):
                subprocess.run(["ip", *words], check=True, capture_output=True)
        finally:
            self._enter(self.outside)

    @property
    def path(self) -> str:
        """Where others find the network."""
        return f"/proc/{os.getpid()}/fd/{self.inside}"

    def _enter(self, network: int) -> None:
        """Bring the main thread into a network; the others stay where they began."""
        if self.libc.setns(network, NEW_NETWORK):
            raise RehearsalError(f"a network cannot be entered ({os.strerror(ctypes.get_errno())})")

    @contextmanager
    def within(self) -> Iterator[None]:
        """Make sockets in the room."""
        self._enter(self.inside)
        try:
            yield
        finally:
            self._enter(self.outside)

    def door(self, address: str, port: int, copy: tuple[str, int]) -> None:
        """Lead whoever asks for this address in the room to the copy outside."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.within():
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.bind((address, port))
            listener.listen(256)
        threading.Thread(target=serve, args=(listener, copy), daemon=True).start()

    def connect(self, address: str, port: int) -> socket.socket:
        """A connection to a program in the room."""
        with self.within():
            return socket.create_connection((address, port), timeout=ANSWER_SECONDS)


def serve(listener: socket.socket, copy: tuple[str, int]) -> None:
    """Lead each connection to the copy; one that the copy does not take is closed."""
    while True:
        client, _ = listener.accept()
        try:
            server = socket.create_connection(copy, timeout=10)
        except OSError:
            client.close()
            continue
        server.settimeout(None)
        for source, sink in ((client, server), (server, client)):
            threading.Thread(target=pump, args=(source, sink), daemon=True).start()


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass on what comes, to the end."""
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for each in (source, sink):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
    # each is closed when both directions have dropped it


def stay(copy: tuple[str, int]) -> None:
    """Hold a connection to the copy, by which its host sees that the rehearsal lives."""
    while True:
        with suppress(OSError), socket.create_connection(copy, timeout=10) as connection:
            connection.settimeout(None)
            while connection.recv(1024):
                pass
        time.sleep(1)


# --- what runs in it ----------------------------------------------------------------------------------------------------------


def unit_of(process: Mapping[str, Any]) -> str:
    """The transient unit in which it runs."""
    return f"evenkeel-rehearsal-{process['name']}.service"


def in_place(word: str, unit: str) -> str:
    """A word of the contract with the directory in which systemd lays the unit's credentials."""
    return word.replace("{credentials}", f"/run/credentials/{unit}")


class Stage:
    """The room with the application in it. request: as the filter rehearsal_request makes it."""

    def __init__(self, request: Mapping[str, Any], room: Room) -> None:
        self.request = request
        self.room = room
        self.place = PLACE / str(request["app"])

    def furnish(self) -> None:
        """Empty directories in place of the application's own, and the certificates of the copies in place of the CA's."""
        self.place.mkdir(parents=True, mode=0o755)
        user, group = pwd.getpwnam(self.request["user"]).pw_uid, grp.getgrnam(self.request["group"]).gr_gid
        for name in self.request["directories"]:
            (self.place / name).mkdir(mode=0o750)
            os.chown(self.place / name, user, group)
        (self.place / "ca.crt").write_text("".join(copy["certificate"] for copy in self.request["copies"]))

    def description(self, process: Mapping[str, Any] | None = None) -> Path:
        """The file that tells <app>-run how to enter; process: a web process with what is its own."""
        own = process or {"name": "command", "environment": {}, "credentials": {}}
        properties = [
            f"Slice={SLICE}",
            f"NetworkNamespacePath={self.room.path}",
            "TemporaryFileSystem=/run",
            *(f"BindPaths={self.place / name}:{path}" for name, path in self.request["directories"].items()),
            f"BindReadOnlyPaths={self.place / 'ca.crt'}:{self.request['ca_file']}",
            *(f"LoadCredential={name}:{path}" for name, path in own["credentials"].items()),
            *([f"MemoryMax={own['memory_mb']}M"] if "memory_mb" in own else []),
        ]
        file = self.place / f"{own['name']}.json"
        environment = {name: in_place(value, unit_of(own)) for name, value in own["environment"].items()}
        file.write_text(json.dumps({"unit": unit_of(own), "environment": environment, "properties": properties}))
        return file

    def argv(self, release: str, description: Path, seconds: int, words: Sequence[str]) -> list[str]:
        """The command line that runs something of a release in the room."""
        entry = [self.request["command"], "--room", str(description), "--release", release, "--timeout", str(seconds)]
        return [*entry, "--", *words]

    def run(self, release: str, words: Sequence[str], text: str, seconds: int) -> tuple[int, str, str]:
        """Run a command of a release to its end: exit code, output, what it said on standard error."""
        argv = self.argv(release, self.description(), seconds, words)
        done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    def apply(self) -> tuple[str, list[dict[str, Any]]]:
        """Apply the migrations of the new release."""
        job = self.request["apply"]
        if not job["argv"]:
            return "", []
        began = time.monotonic()
        code, out, said = self.run(self.request["release"], job["argv"], job["stdin"], job["seconds"])
        if code and time.monotonic() - began >= job["seconds"]:
            return f"they were not done after {job['seconds']} s", []
        return applied(code, out, said)

    def examine(self, release: str) -> Checks:
        """The checks of a release: its models, its web processes."""
        found: Checks = {}
        job = self.request["probe"]
        if job["argv"]:
            found |= probed(*self.run(release, job["argv"], job["stdin"], PROBE_SECONDS))
        for process in self.request["webs"]:
            found |= self.serve(release, process)
        return found

    def serve(self, release: str, process: Mapping[str, Any]) -> Checks:
        """Start a web process of a release as its unit does, ask it, and stop it."""
        listen = [LISTEN, "--address", process["address"], "--port", str(process["port"]), "--backlog", "64", "--"]
        listen += [in_place(word, unit_of(process)) for word in process["argv"]]
        description = self.description(process)
        with tempfile.TemporaryFile("w+") as said:
            # nothing of this program's own standard input, which is the request's
            argv = self.argv(release, description, PROBE_SECONDS, listen)
            server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said, text=True)
            try:
                problem = self.wait(process, server)
                if problem:
                    said.seek(0)
                    words = last_words(said.read()) if server.poll() is not None else ""
                    return {f"{process['name']} starts": f"{problem}{': ' if words else ''}{words}"}
                answers = {f"{process['name']} {check['method']} {check['path']}": self.ask(process, check) for check in process["checks"]}
                return {f"{process['name']} starts": "", **answers}
            finally:
                subprocess.run(["systemctl", "stop", unit_of(process)], check=False, capture_output=True)
                server.wait()

    def wait(self, process: Mapping[str, Any], server: subprocess.Popen[str]) -> str:
        """Until it answers anything. Returns why not, empty when it does."""
        deadline = time.monotonic() + process["patience_seconds"]
        while time.monotonic() < deadline:
            if server.poll() is not None:
                return f"it ended with exit code {server.returncode}"
            with suppress(OSError, http.client.HTTPException):
                self.fetch(process, process["checks"][0])
                return ""
            time.sleep(0.2)
        return f"it has answered nothing for {process['patience_seconds']} s"

    def ask(self, process: Mapping[str, Any], check: Mapping[str, Any]) -> str:
        """What is wrong with the answer to a check, empty when nothing is."""
        try:
            return wrong_answer(check, *self.fetch(process, check))
        except (OSError, http.client.HTTPException) as error:
            return f"no answer ({error or type(error).__name__})"

    def fetch(self, process: Mapping[str, Any], check: Mapping[str, Any]) -> tuple[int, str]:
        """The status and text of an answer, asked as the proxy asks."""
        connection = http.client.HTTPConnection(process["address"], process["port"], timeout=ANSWER_SECONDS)
        connection.sock = self.room.connect(process["address"], process["port"])
        try:
            headers = {"Host": check["host"], "X-Forwarded-Proto": "https", "X-Forwarded-For": "127.0.0.1", "User-Agent": "evenkeel"}
            connection.request(check["method"], check["path"], headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()


def clear(place: Path) -> None:
    """End what runs in a room and remove what was in it, of this rehearsal or of one that was interrupted."""
    subprocess.run(["systemctl", "stop", SLICE], check=False, capture_output=True)
    if place.exists():
        shutil.rmtree(place)


def hold(request: Mapping[str, Any]) -> dict[str, Any]:
    """Hold the rehearsal that is asked for."""
    began = time.monotonic()
    # the copies' certificates are as new as their host's clock
    time.sleep(min(10.0, max([0.0, *(copy["at"] + 1 - time.time() for copy in request["copies"])])))
    room = Room(request["addresses"])
    for copy in request["copies"]:
        where = (copy["address"], copy["port"])
        threading.Thread(target=stay, args=(where,), daemon=True).start()
        for address in copy["members"]:
            room.door(address, copy["live_port"], where)
    stage = Stage(request, room)
    clear(stage.place)
    try:
        stage.furnish()
        verdict = rehearse(request["current"], request["release"], stage.examine, stage.apply)
    finally:
        clear(stage.place)
    return {**verdict, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    """Read the request, hold the rehearsal, say the verdict."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("the rehearsal was stopped before its end"))
    request = json.load(sys.stdin)
    PLACE.mkdir(parents=True, exist_ok=True, mode=0o755)
    with (PLACE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another rehearsal is held on this host: wait for its end", file=sys.stderr)
            return 1
        try:
            verdict = hold(request)
        except (RehearsalError, subprocess.CalledProcessError, OSError, KeyError) as error:
            print(f"the rehearsal could not be held: {error}", file=sys.stderr)
            return 1
    print(json.dumps(verdict))
    return 0


if __name__ == "__main__":
    sys.exit(main())

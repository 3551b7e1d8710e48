# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""The ledger on a host: a file of hash-chained JSON lines that is only ever appended to. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ansible.module_utils.evenkeel_host import Attributes, place, stage, sync_directory

FILE = "ledger.jsonl"
NOTHING = "0" * 64  # what the first entry follows
OWN = ("seq", "at", "prev", "hash")  # given by the ledger
REQUIRED = {"kind": str, "run": str, "who": str}
TORN = "the last line is torn: a crash while it was written"
DIRECTORY_MODE, FILE_MODE = 0o750, 0o640


class LedgerError(Exception):
    """What the ledger does not do, and why; the text is for people."""


@dataclass(frozen=True)
class Ledger:
    """What a copy says: its entries up to the first broken place, what is wrong there, and what stands behind the last end of a line."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    broken: str = ""
    torn: bytes = b""

    @property
    def problem(self) -> str:
        """What is wrong, in words; a torn line only when all before it is well."""
        return self.broken or (TORN if self.torn else "")

    @property
    def head(self) -> dict[str, Any]:
        """Number, hash and time of the last good entry; number 0 when there is none."""
        last = self.entries[-1] if self.entries else {"seq": 0, "hash": NOTHING, "at": ""}
        return {key: last[key] for key in ("seq", "hash", "at")}

    def after(self, number: int) -> list[dict[str, Any]]:
        """The entries with higher numbers."""
        return self.entries[max(number, 0) :]


def canonical(entry: Mapping[str, Any]) -> str:
    """The one text of an entry: JSON with sorted keys and no blanks."""
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(entry: Mapping[str, Any]) -> str:
    """SHA-256 over the line without its `hash`."""
    return hashlib.sha256(canonical({key: value for key, value in entry.items() if key != "hash"}).encode()).hexdigest()


def writable(value: Any) -> Any:
    """The same with texts that can be written: half characters, as in names of files that are no UTF-8, become question marks."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {writable(key): writable(each) for key, each in value.items()}
    return [writable(each) for each in value] if isinstance(value, list | tuple) else value


def made(fields: Mapping[str, Any], head: Mapping[str, Any], at: str) -> dict[str, Any]:
    """The entry that follows `head`. fields: kind, run, who and the data of the kind."""
    taken = [key for key in OWN if key in fields]
    if taken:
        raise LedgerError(f"an entry must not bring {', '.join(taken)} along: the ledger gives it")
    for key, kind in REQUIRED.items():
        if not isinstance(fields.get(key), kind) or not fields[key]:
            raise LedgerError(f"an entry needs {key}, a text")
    entry = {**writable(fields), "seq": head["seq"] + 1, "at": at, "prev": head["hash"]}
    try:
        return {**entry, "hash": digest(entry)}
    except (TypeError, ValueError) as error:
        raise LedgerError(f"the entry cannot be written as JSON: {error}") from None


def parse(data: bytes) -> Ledger:
    """Verify a ledger from its first line on."""
    *lines, torn = data.split(b"\n")
    entries: list[dict[str, Any]] = []
    for line in lines:
        problem = _problem(line, entries)
        if problem:
            return Ledger(entries, problem, torn)
        entries.append(json.loads(line))
    return Ledger(entries, "", torn)


def _problem(line: bytes, before: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with the line that follows; empty when nothing is."""
    number = len(before) + 1
    previous = before[-1]["hash"] if before else NOTHING
    try:
        entry = json.loads(line)
        whole = isinstance(entry, dict) and canonical(entry).encode() == line and digest(entry) == entry.get("hash")
    except ValueError:
        entry, whole = None, False
    if not whole:
        at = entry.get("at") if isinstance(entry, dict) else None
        return f"entry {number}{f' of {at}' if isinstance(at, str) else ''} was changed"
    found = entry.get("seq")
    if isinstance(found, int) and found > number:
        return f"{_entries(number, found - 1)} missing"
    if found != number:
        return f"entry {found} stands where entry {number} should: lines were moved or doubled"
    if entry.get("prev") != previous:
        return f"entry {number} of {entry.get('at')} does not follow entry {number - 1}: one of the two was changed, and given a new hash"
    return ""


def _entries(first: int, last: int) -> str:
    return f"entry {first} is" if first == last else f"entries {first} to {last} are"


def joined(ledger: Ledger, given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Which entries of another copy continue this one. A copy that tells another story is an error."""
    own = {entry["seq"]: entry for entry in ledger.entries}
    added: list[dict[str, Any]] = []
    head = ledger.head
    for entry in given:
        number = entry.get("seq")
        if number in own:
            if own[number]["hash"] != entry.get("hash"):
                raise LedgerError(f"entry {number} of {own[number]['at']} differs from the one of the other copy ({entry.get('at')})")
            continue
        if isinstance(number, int) and number > head["seq"] + 1:
            raise LedgerError(f"{_entries(head['seq'] + 1, number - 1)} missing here, and not among those to copy")
        try:
            problem = _problem(canonical(entry).encode(), [*ledger.entries, *added])
        except (TypeError, ValueError) as error:
            problem = f"entry {number} is no JSON: {error}"
        if problem:
            raise LedgerError(f"what is to be copied does not continue this copy: {problem}")
        added.append(dict(entry))
        head = {"seq": entry["seq"], "hash": entry["hash"]}
    return added


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Keep every other process of this host out. A directory that does not exist has no lock."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make(directory: str) -> None:
    """Make the directory of a ledger if there is none."""
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
        os.chmod(directory, DIRECTORY_MODE)
        sync_directory(os.path.dirname(directory))


def read(directory: str) -> Ledger:
    """Read and verify; no file is an empty ledger."""
    try:
        with open(os.path.join(directory, FILE), "rb") as file:
            return parse(file.read())
    except FileNotFoundError:
        return Ledger()


def add(directory: str, ledger: Ledger, entries: Sequence[Mapping[str, Any]], now: datetime) -> str:
    """Append to the ledger that was just read under the same lock. Returns what else was done, in words: a torn line is set aside."""
    path = os.path.join(directory, FILE)
    data = "".join(f"{canonical(entry)}\n" for entry in entries).encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    try:
        os.fchmod(descriptor, FILE_MODE)
        size = os.fstat(descriptor).st_size
        note = ""
        if ledger.torn:
            kept = _aside(f"{path}.torn-{_stamp(now)}")
            with open(kept, "xb") as file:
                file.write(ledger.torn)
                file.flush()
                os.fsync(file.fileno())
            size -= len(ledger.torn)
            os.ftruncate(descriptor, size)
            note = f"its last line was torn, by a crash while it was written; that is kept in {kept}"
        try:
            _write(descriptor, data)
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, size)
            raise LedgerError(f"nothing was added: {path} cannot be written ({error.strerror})") from None
    finally:
        os.close(descriptor)
    sync_directory(directory)
    return note


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def replace(directory: str, entries: Sequence[Mapping[str, Any]], now: datetime) -> str:
    """Put a whole ledger in the place of this one, which is kept beside; returns the path where."""
    chain = joined(Ledger(), entries)
    path = os.path.join(directory, FILE)
    kept = _aside(f"{path}.{_stamp(now)}")
    data = "".join(f"{canonical(entry)}\n" for entry in chain).encode()
    staged = stage(path, data, Attributes(os.geteuid(), os.getegid(), FILE_MODE))
    os.link(path, kept)  # there is a ledger at every moment
    place(staged, path)
    return kept


def _stamp(now: datetime) -> str:
    return now.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")


def _aside(path: str) -> str:
    """A path that is free."""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = f"{path}-{number}"
    return free

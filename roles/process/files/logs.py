#!/usr/bin/python3 -I
"""Write what each process of an application says into a file of its own, from the journal.

Every line is in the files exactly once, whatever happens to this program, to the journal daemon or to the disk. The state
file says how far the journal has been read (a cursor) and how long each log file was then. The log files reach the disk
before it does. A start cuts off what was written after the state was saved, and reads the journal from its cursor on. So
whatever goes wrong, this program ends, and systemd starts it again.

The processes are those of ``/etc/<app>/logs.json``; files of others, which have left the contract, stay as they are.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIGURATION = Path("/etc")
SAVE_SECONDS = 5.0  # so much is read again after a crash, at most
SAVE_BYTES = 8_000_000
BATCH_BYTES = 1_000_000
NAP_SECONDS = 1.0  # between looks at the journal, once all is read: many lines cost hardly more than one
LINE_BYTES = 1_000_000  # a longer line is written in pieces
LINE_SECONDS = 10.0  # what has no end after so long, ends here


@dataclass
class Line:
    """The pieces of a line that the journal has cut (``LineMax=``), until its end comes."""

    pieces: bytes
    touched: float


@dataclass
class State:
    """What the files hold: everything up to the cursor, without the lines that have no end yet."""

    cursor: str = ""
    files: dict[str, tuple[int, int]] = field(default_factory=dict)  # process -> inode and size
    lines: dict[str, str] = field(default_factory=dict)  # stream -> bytes, each as the character of its number


def load_state(path: Path) -> State:
    """Read the state; on the first start there is none."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return State()
    return State(data["cursor"], {name: (mark[0], mark[1]) for name, mark in data["files"].items()}, data["lines"])


def save_state(path: Path, state: State) -> None:
    """Replace the state, so that there is always a whole one."""
    temporary = path.with_suffix(".new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"cursor": state.cursor, "files": state.files, "lines": state.lines}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Have the names in a directory reach the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LogFile:
    """The file of one process, with its backups."""

    def __init__(self, path: Path, backups: int, mark: tuple[int, int] | None = None) -> None:
        self.path = path
        self.backups = backups
        self.dirty = False
        self.descriptor, self.inode, self.size = self._open()
        if mark and mark[0] == self.inode and mark[1] < self.size:  # the journal is read again from there
            os.ftruncate(self.descriptor, mark[1])
            self.size = mark[1]
            self.dirty = True

    def _open(self) -> tuple[int, int, int]:
        """The descriptor, inode and size of what is at the path now."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, 0o640)
        found = os.fstat(descriptor)
        return descriptor, found.st_ino, found.st_size

    @property
    def mark(self) -> tuple[int, int]:
        return self.inode, self.size

    def write(self, data: bytes) -> None:
        """Append; to a new file when somebody has taken the present one away."""
        if not self.is_in_place():
            os.close(self.descriptor)
            self.descriptor, self.inode, self.size = self._open()
        self.dirty = True
        while data:
            written = os.write(self.descriptor, data)
            self.size += written
            data = data[written:]

    def is_in_place(self) -> bool:
        """Whether the path still leads to the open file."""
        try:
            return self.path.lstat().st_ino == self.inode
        except FileNotFoundError:
            return False

    def sync(self) -> None:
        """Have all of it reach the disk."""
        if self.dirty:
            os.fsync(self.descriptor)
            self.dirty = False

    def backup(self, number: int) -> Path:
        """The path of a backup; number 0 is the file itself."""
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path

    def rotate(self) -> None:
        """Begin a new file. Interrupted anywhere, it may simply be done again: backups move up to the first gap only."""
        gap = next((number for number in range(1, self.backups) if not self.backup(number).exists()), self.backups)
        for number in range(gap, 0, -1):
            self.backup(number - 1).replace(self.backup(number))
        for number in range(self.backups + 1, self.backups + 100):  # fewer are wanted now than before
            if not self.backup(number).exists():
                break
            self.backup(number).unlink()
        os.close(self.descriptor)
        self.descriptor, self.inode, self.size = self._open()
        sync_directory(self.path.parent)


class Logs:
    """All files of an application, and how far the journal has been read into them."""

    def __init__(self, settings: Mapping[str, Any], state_path: Path) -> None:
        self.units: dict[bytes, str] = {unit.encode(): process for unit, process in settings["units"].items()}
        self.max_bytes: int = settings["max_bytes"]
        self.state_path = state_path
        self.clock = time.monotonic
        state = load_state(state_path)
        self.cursor = state.cursor
        self.files = {
            process: LogFile(Path(settings["directory"]) / f"{process}.log", settings["backups"], state.files.get(process))
            for process in self.units.values()
        }
        now = self.clock()
        self.lines = {stream: Line(pieces.encode("latin-1"), now) for stream, pieces in state.lines.items()}
        self.buffers: dict[str, bytearray] = {process: bytearray() for process in self.files}
        self.buffered = 0
        self.unsaved = 0
        self.saved_at = now
        self.save()  # from here on it is known what the files hold, those too that are new or not the ones of the state

    def add(self, entry: Mapping[str, bytes], cursor: str) -> None:
        """Take one entry of the journal."""
        process = self.units.get(entry["_SYSTEMD_UNIT"])
        if process:
            text = entry.get("MESSAGE", b"")
            stream = f"{process} {entry['_STREAM_ID'].decode()}" if "_STREAM_ID" in entry else ""
            if stream in self.lines:
                text = self.lines[stream].pieces + text
            if stream and entry.get("_LINE_BREAK") == b"line-max" and len(text) < LINE_BYTES:
                self.lines[stream] = Line(text, self.clock())
            else:
                self._put(process, text + b"\n")
                self.lines.pop(stream, None)
        self.cursor = cursor
        self.unsaved += 1
        if self.buffered >= BATCH_BYTES:
            self.flush()

    def _put(self, process: str, line: bytes) -> None:
        buffer, file = self.buffers[process], self.files[process]
        if file.size + len(buffer) and file.size + len(buffer) + len(line) > self.max_bytes:
            # The cursor is still that of the entry before this line: all that it stands for is saved before anything moves.
            self.flush()
            self.save()
            file.rotate()
            self.save()
        buffer += line
        self.buffered += len(line)

    def end_lines(self) -> None:
        """Write lines whose end has not come."""
        now = self.clock()
        for stream in [stream for stream, line in self.lines.items() if now - line.touched >= LINE_SECONDS]:
            process = stream.partition(" ")[0]
            if process in self.files:
                self._put(process, self.lines[stream].pieces + b"\n")
            del self.lines[stream]
            self.unsaved += 1

    def flush(self) -> None:
        """Write what is buffered."""
        for process, buffer in self.buffers.items():
            if buffer:
                self.files[process].write(bytes(buffer))
                self.unsaved += len(buffer)
                buffer.clear()
        self.buffered = 0
        if self.unsaved >= SAVE_BYTES:
            self.save()

    def save(self) -> None:
        """Have the files, then the state, reach the disk. The buffers are empty."""
        for file in self.files.values():
            file.sync()
        lines = {stream: line.pieces.decode("latin-1") for stream, line in self.lines.items()}
        save_state(self.state_path, State(self.cursor, {process: file.mark for process, file in self.files.items()}, lines))
        self.unsaved = 0
        self.saved_at = self.clock()

    def save_if_due(self) -> None:
        """Save now and then."""
        if self.unsaved and self.clock() - self.saved_at >= SAVE_SECONDS:
            self.save()


class Stopped(Exception):
    """systemd asks for the end while the program waits."""


class Follower:
    """Reads the journal into the files until systemd asks for the end."""

    def __init__(self, logs: Logs) -> None:
        self.logs = logs
        self.stopping = False
        self.waiting = False
        # the module is C and there on hosts alone
        self.reader = importlib.import_module("systemd._reader")._Reader(0)
        self.reader.data_threshold = 0
        for unit in logs.units:
            self.reader.add_match("_SYSTEMD_UNIT=" + unit.decode())
        self.poll = select.poll()
        self.poll.register(self.reader.fileno(), self.reader.get_events())
        self._seek()

    def _seek(self) -> None:
        if not self.logs.cursor:
            self.reader.seek_head()
            return
        self.reader.seek_cursor(self.logs.cursor)
        # the entry of the cursor itself has been written, unless the journal has forgotten it by now
        if self.reader._next() and not self.reader.test_cursor(self.logs.cursor):
            print("the journal has forgotten where the log files ended: lines in between may be missing from them", file=sys.stderr)
            self._take()

    def _take(self) -> None:
        self.logs.add(self.reader._get_all(), self.reader._get_cursor())

    def stop(self, *_signal: object) -> None:
        """systemd's SIGTERM: end as soon as the files and the state agree."""
        self.stopping = True
        if self.waiting:
            raise Stopped

    def run(self) -> None:
        while not self.stopping:
            while not self.stopping and self.reader._next():
                self._take()
            self.logs.end_lines()
            self.logs.flush()
            self.logs.save_if_due()
            with contextlib.suppress(Stopped):
                self._wait()
        self.logs.flush()
        self.logs.save()

    def _wait(self) -> None:
        """Until there may be more, or something is to be done."""
        busy = self.logs.unsaved or self.logs.lines
        self.waiting = True
        try:
            if not self.stopping:
                self.poll.poll(SAVE_SECONDS * 1000 if busy else None)
                time.sleep(NAP_SECONDS)
        finally:
            self.waiting = False
        self.reader.process()


def main(app: str) -> int:
    """Follow the journal."""
    state = Path(os.environ["STATE_DIRECTORY"]) / "state.json"
    try:
        settings = json.loads((CONFIGURATION / app / "logs.json").read_text(encoding="utf-8"))
        follower = Follower(Logs(settings, state))
        signal.signal(signal.SIGTERM, follower.stop)
        follower.run()
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(
            f"{app}: the log files are behind ({reason}). Nothing is lost as long as the journal keeps it (journalctl -u '{app}-*'); "
            "it goes on from where it was as soon as it can",
            file=sys.stderr,
        )
        return 1
    except (ValueError, KeyError, IndexError) as error:
        print(
            f"{app}: {state} or logs.json is damaged ({error}). Run playbooks/site.yml; if that does not help, remove {state}: "
            "the log files then get all that the journal holds once more",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

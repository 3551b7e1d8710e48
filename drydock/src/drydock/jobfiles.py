"""Job files: small JSON notes of a job in hand (how far it is, what it waits for) that processes of one host share.

They live on tmpfs: quick, and gone with a reboot; what must last is in PostgreSQL. Every access is under an exclusive
lock, and new content takes the old one's place in one step, so that a reader never sees half a file, no update is lost,
and a writer that is killed leaves the old content.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import portalocker

from drydock import config

LOCK_TIMEOUT_SECONDS = 10.0
LOCK_CHECK_SECONDS = 0.005
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class JobFileError(Exception):
    """A job file cannot be used; the message says which, why, and what to do."""


class JobFile:
    """One job file; it need not exist yet. All methods may be called by many processes and threads at once."""

    def __init__(self, path: Path, *, timeout_seconds: float = LOCK_TIMEOUT_SECONDS) -> None:
        self.path = path
        self.timeout_seconds = timeout_seconds

    def read(self) -> dict[str, Any]:
        """Return the content; nothing when there is no such file."""
        # Without this a look at a job that is over would make a lock file.
        if not self.path.exists():
            return {}
        with self._locked():
            return self._content()

    def update(self, **fields: Any) -> dict[str, Any]:
        """Set these fields, keep the others, and return the new content."""
        return self.change(lambda content: content | fields)

    def change(self, function: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """Put what the function makes of the content in its place, and return it; nobody else writes in between."""
        with self._locked():
            content = function(self._content())
            # One writer at a time: what a killed one left under this name is written over.
            new = self.path.with_name(f"{self.path.name}.new")
            new.write_text(json.dumps(content))
            new.replace(self.path)
        return content

    def remove(self) -> dict[str, Any]:
        """Remove the file, if it is there, and return what was in it last."""
        if not self.path.exists():
            return {}
        with self._locked():
            try:
                return self._content()
            finally:
                for path in (self.path, self.path.with_name(f"{self.path.name}.new")):
                    path.unlink(missing_ok=True)

    def _content(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise JobFileError(f"{self.path} holds no JSON ({error}): somebody else wrote it. Remove it.") from error
        if not isinstance(content, dict):
            raise JobFileError(f"{self.path} holds no JSON object: somebody else wrote it. Remove it.")
        return content

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock file, which goes with the file that it stands for."""
        path = self.path.with_name(f"{self.path.name}.lock")
        lock = portalocker.Lock(path, "a", timeout=self.timeout_seconds, check_interval=LOCK_CHECK_SECONDS)
        try:
            # A lock on a file that was removed in the meantime guards nothing.
            while not is_named(lock.acquire().fileno(), path):
                lock.release()
        except portalocker.LockException as error:
            raise JobFileError(
                f"{self.path} has been locked by another process for {self.timeout_seconds:g} s. "
                f"See who holds it (fuser {path}); a process that ends gives it back."
            ) from error
        except OSError as error:
            raise JobFileError(f"{self.path} cannot be used: {error}. Is DRYDOCK_RUN_DIR writable?") from error
        try:
            yield
        finally:
            if not self.path.exists():
                path.unlink(missing_ok=True)
            lock.release()


def job_file(name: str) -> JobFile:
    """Return the job file of this name in DRYDOCK_RUN_DIR."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a job file: letters, digits, dot, hyphen, underscore; at most 100")
    directory = config.load().run_dir / "jobs"
    try:
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise JobFileError(f"{directory} cannot be made: {error}. Is DRYDOCK_RUN_DIR writable?") from error
    return JobFile(directory / f"{name}.json")


def is_named(descriptor: int, path: Path) -> bool:
    """Say whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False

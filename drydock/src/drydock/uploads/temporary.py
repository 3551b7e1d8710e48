"""The temporary file of an upload, from the request's first byte to its end, and the removal of what was left behind.

A file is locked as long as its request lives, and the kernel gives the lock back when the process ends, however that
happens. So a file without a lock is a leftover; and nobody removes a file without holding its lock.
"""

import hashlib
import os
import stat
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import portalocker
from django.core.files.uploadedfile import UploadedFile
from portalocker import LockFlags

from drydock import config
from drydock.jobfiles import is_named


def directory(kind: str) -> Path:
    """Return where the temporary files of this kind are."""
    return config.load().data_dir / "uploads" / kind


class TemporaryUpload(UploadedFile):
    """A file that is being received, or was: hashed while it was written, removed when it is closed."""

    def __init__(self, kind: str, name: str, content_type: str | None) -> None:
        file = create_locked(directory(kind))
        super().__init__(file=file, name=name, content_type=content_type, size=0)
        self.path = Path(file.name)
        self._hash = hashlib.sha256()

    def append(self, chunk: bytes) -> None:
        """Write on."""
        self.write(chunk)
        # So that a full disk is noticed here and not at the end.
        self.flush()
        self._hash.update(chunk)
        self.size = (self.size or 0) + len(chunk)

    @property
    def sha256(self) -> str:
        """Return the hash of what was written so far."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Remove the file and give the lock back; may be called again."""
        self.path.unlink(missing_ok=True)
        super().close()


def create_locked(home: Path) -> IO[bytes]:
    """Create a file of a new name and lock it."""
    home.mkdir(mode=0o750, parents=True, exist_ok=True)
    while True:
        path = home / f"{uuid.uuid4().hex}.part"
        file = path.open("x+b")
        portalocker.lock(file, LockFlags.EXCLUSIVE)
        if is_named(file.fileno(), path):
            return file
        # It was pruned between the two, for which an age of nothing or a clock that was set is needed.
        file.close()


@dataclass
class Pruned:
    """What was removed, or would be."""

    files: int = 0
    size: int = 0


def prune(kind: str, stale_seconds: float, *, dry_run: bool = False) -> Pruned:
    """Remove the files of this kind that no request holds and that nobody has written to for so long."""
    pruned = Pruned()
    home = directory(kind)
    for path in sorted(home.iterdir()) if home.exists() else ():
        try:
            size = _prune_one(path, stale_seconds, dry_run=dry_run)
        except FileNotFoundError:
            # Its request is over.
            continue
        if size is not None:
            pruned.files += 1
            pruned.size += size
    return pruned


def _prune_one(path: Path, stale_seconds: float, *, dry_run: bool) -> int | None:
    """Return the size of a file that is stale, and remove it; None: it is not, or it is none of ours."""
    before = path.lstat()
    # Young ones are not even locked: one that was just made is never kept from its maker.
    if not stat.S_ISREG(before.st_mode) or time.time() - before.st_mtime < stale_seconds:
        return None
    with path.open("rb") as file:
        try:
            portalocker.lock(file, LockFlags.EXCLUSIVE | LockFlags.NON_BLOCKING)
        except portalocker.LockException:
            # A live upload, however old.
            return None
        # Only now it cannot change any more.
        status = os.fstat(file.fileno())
        if not is_named(file.fileno(), path) or time.time() - status.st_mtime < stale_seconds:
            return None
        if not dry_run:
            path.unlink()
        return status.st_size

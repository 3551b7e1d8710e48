"""Watch a compile from outside: resource limits bound each process and each file, and nothing bounds their sum."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

MEGABYTE = 1024 * 1024
MAX_FILE_BYTES = 64 * MEGABYTE
MAX_OUTPUT_BYTES = 256 * MEGABYTE
MAX_FILES = 5000
MAX_PATH_CHARACTERS = 1000
MAX_MEMORY_BYTES = 2048 * MEGABYTE
MAX_PROCESSES = 32
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ExcessError(Exception):
    """A compile uses too much; the message says of what, for the author."""


def check(work: Path, group: int) -> None:
    """Raise `ExcessError` when the processes of a group and their files in `work` use too much together."""
    processes = dict(_processes(group))
    if len(processes) > MAX_PROCESSES:
        raise ExcessError(f"it started more than {MAX_PROCESSES} processes")
    if sum(processes.values()) > MAX_MEMORY_BYTES:
        raise ExcessError(f"it used more than {MAX_MEMORY_BYTES // MEGABYTE} MB of memory")
    output = 0
    for number, status in enumerate(_files(work)):
        output += status.st_blocks * 512
        if stat.S_ISREG(status.st_mode) and status.st_size >= MAX_FILE_BYTES:
            raise ExcessError(f"a file grew over {MAX_FILE_BYTES // MEGABYTE} MB")
        if number >= MAX_FILES:
            raise ExcessError(f"it made more than {MAX_FILES} files")
        if output > MAX_OUTPUT_BYTES:
            break
    # Files that are removed while they are open are in no directory, but on the disk.
    removed = {
        (status.st_dev, status.st_ino): status.st_blocks * 512 for pid in processes for status in _removed_files(pid)
    }
    if output + sum(removed.values()) > MAX_OUTPUT_BYTES:
        raise ExcessError(f"the output grew over {MAX_OUTPUT_BYTES // MEGABYTE} MB")


def _processes(group: int) -> Iterator[tuple[int, int]]:
    """Find the processes of a group, and the memory that each has in use."""
    for process in os.scandir("/proc"):
        # Whoever has ended meanwhile uses nothing.
        with contextlib.suppress(OSError):
            if process.name.isdecimal():
                fields = Path(process.path, "stat").read_text(errors="replace").rpartition(")")[2].split()
                if int(fields[2]) == group:
                    yield int(process.name), int(fields[21]) * PAGE_BYTES


def _files(work: Path) -> Iterator[os.stat_result]:
    """Walk a directory that may change, be deep or be wide; not recursive, because a document decides how deep."""
    directories = [str(work)]
    while directories:
        try:
            for entry in os.scandir(directories.pop()):
                if len(entry.path) - len(str(work)) > MAX_PATH_CHARACTERS:
                    raise ExcessError("it made directories that are too deep")
                with contextlib.suppress(FileNotFoundError):
                    yield entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ExcessError(f"it made directories that cannot be read ({error.strerror})") from error


def _removed_files(pid: int) -> Iterator[os.stat_result]:
    with contextlib.suppress(OSError):
        for descriptor in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                status = descriptor.stat()
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                    yield status

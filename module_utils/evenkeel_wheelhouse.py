# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Wheelhouses on the controller: the wheels of a lock file, downloaded once. It is never shipped to a host."""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.module_utils.evenkeel_venv import (
    LOCK_NAME,
    LockError,
    build_command,
    check_wheels,
    digest_of,
    format_lock,
    parse_lock,
    pip_command,
    said,
    split_built,
    with_built,
)

ARCHITECTURES = ("x86_64", "aarch64")
DEFAULT_PYTHON_VERSION = "3.11"
DOWNLOAD_SECONDS = 1800


def fetch(wheelhouses: Path, lock: bytes, name: str, args: dict[str, Any]) -> tuple[Path, Path]:
    """Return the tar of a lock's wheels and the folder with them; downloaded once, under a lock.

    args: {build: packages built from source, architecture, python_version}, as the options of the module `venv`.
    """
    key = digest_of(lock + b"".join(f"\n{item}".encode() for item in sorted(args["build"])))
    if args["architecture"] != ARCHITECTURES[0] or args["python_version"] != DEFAULT_PYTHON_VERSION:
        key = f"{key}-{args['architecture']}-{args['python_version']}"
    wheelhouses.mkdir(parents=True, exist_ok=True)
    house, archive = wheelhouses / key, wheelhouses / f"{key}.tar"
    with locked(wheelhouses / f"{key}.lock"):
        if house.is_dir():
            try:
                check_wheels(parse_lock((house / LOCK_NAME).read_bytes(), name), str(house))
            except (LockError, OSError):  # damaged on the disk since: get it again
                shutil.rmtree(house)
                archive.unlink(missing_ok=True)
        if not house.is_dir():
            download(house, lock, name, args)
            archive.unlink(missing_ok=True)
        if not archive.is_file():
            pack(house, archive)
    return archive, house


def download(house: Path, lock: bytes, name: str, args: dict[str, Any]) -> None:
    """Download the wheels of a lock beside their final place and put them there when they are complete."""
    for left in house.parent.glob(f"{house.name}.part-*"):
        shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f"{house.name}.part-", dir=house.parent))
    try:
        binary, source = split_built(parse_lock(lock, name), args["build"])
        versions = {"python_version": args["python_version"], "architecture": args["architecture"]}
        wanted = part / "wanted.txt"
        wanted.write_bytes(format_lock(binary))
        run_pip(name, pip_command(sys.executable, str(wanted), str(part), **versions))
        if source:
            wanted.write_bytes(format_lock(source))
            run_pip(name, build_command(sys.executable, str(wanted), str(part)))
        wanted.unlink()
        complete = [*binary, *(with_built(item, str(part)) for item in source)]
        (part / LOCK_NAME).write_bytes(format_lock(complete))
        check_wheels(complete, str(part))
        part.chmod(0o755)
        part.rename(house)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def run_pip(name: str, command: list[str]) -> None:
    """Run pip; say in one line what went wrong."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise LockError(f"pip did not finish with {name} within {DOWNLOAD_SECONDS} s") from None
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        wrong = re.findall(r"^ +(\S+) from .*:$", done.stderr, re.MULTILINE) if "DO NOT MATCH" in done.stderr else []
        if wrong:
            raise LockError(f"{name}: what pip found for {', '.join(wrong)} does not have the sha256 that the lock names")
        source = "" if "No matching distribution" not in done.stderr else " (is it published only as source? see build)"
        raise LockError(f"pip could not provide {name}: {said(' '.join(errors) or done.stderr)}{source}")


def pack(house: Path, archive: Path) -> None:
    """Pack a wheelhouse into one file for the way to a host."""
    part = archive.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for path in sorted(house.iterdir()):
            tar.add(path, arcname=path.name)
    part.rename(archive)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes for the length of a block."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""What the `venv` module knows about locks and wheels. Standard library only; no Ansible."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LOCK_NAME = "requirements.lock"
STAMP_NAME = ".evenkeel-venv.json"
NEWEST_GLIBC_MINOR = 36  # Debian 12
OLDEST_GLIBC_MINOR = 5

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(\[[A-Za-z0-9._, -]*\])?\s*==\s*(?P<version>[^\s;,]+)")
_HASH = re.compile(r"--hash[= ]sha256:([0-9a-f]{64})")
_SEPARATORS = re.compile(r"[-_.]+")


class LockError(ValueError):
    """A lock, or the wheels beside it, that cannot be installed; the text is for people."""


@dataclass(frozen=True)
class Requirement:
    """One pinned package of a lock."""

    name: str
    version: str
    hashes: frozenset[str]

    @property
    def pin(self) -> str:
        """Return `name==version`."""
        return f"{self.name}=={self.version}"


def canonical(name: str) -> str:
    """Return a package's name in the one spelling that stands for all."""
    return _SEPARATORS.sub("-", name).lower()


def digest_of(data: bytes) -> str:
    """Return the SHA-256 that names a lock."""
    return hashlib.sha256(data).hexdigest()


def parse_lock(data: bytes, name: str = LOCK_NAME) -> list[Requirement]:
    """Read a requirements file with hashes, uv among them."""
    requirements = parse_pins(data, name)
    if not any(requirement.name == "uv" for requirement in requirements):
        raise LockError(f"{name} does not contain uv, which installs it on the host; add uv and resolve it again")
    return requirements


def parse_pins(data: bytes, name: str, only: str | None = None) -> list[Requirement]:
    """Read a requirements file with hashes; refuse what could install something else on another machine. only: look at no other package."""
    requirements: list[Requirement] = []
    for number, line in _logical_lines(data.decode("utf-8", "replace")):
        where = f"{name} line {number}"
        match = _REQUIREMENT.match(line)
        if only and not (match and canonical(match["name"]) == only):
            continue
        if line.startswith("-"):
            raise LockError(f"{where}: options have no place in a lock ({line.split()[0]}); resolve it without them")
        if match is None:
            raise LockError(f"{where}: {line.split()[0]} is not pinned with ==")
        rest = line[match.end() :]
        if ";" in rest.split("--hash")[0]:
            raise LockError(
                f"{where}: {match['name']} has an environment marker; resolve the lock for the hosts' Python alone "
                "(uv pip compile --python-version, without --universal)"
            )
        hashes = frozenset(_HASH.findall(rest))
        if not hashes:
            raise LockError(f"{where}: {match['name']} has no sha256 hash; resolve the lock with --generate-hashes")
        requirements.append(Requirement(canonical(match["name"]), match["version"], hashes))
    if not requirements:
        raise LockError(f"{name} names no package" if only is None else f"{name} does not pin {only}")
    return requirements


def _logical_lines(text: str) -> list[tuple[int, str]]:
    """Join continued lines and drop comments; return each with the number of its first line."""
    lines: list[tuple[int, str]] = []
    start, parts = 0, list[str]()
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*$", "", raw).strip()
        start = start if parts else number
        continued = line.endswith("\\")
        parts.append(line.rstrip("\\").strip())
        if not continued:
            joined = " ".join(part for part in parts if part)
            if joined:
                lines.append((start, joined))
            parts = []
    if any(parts):
        lines.append((start, " ".join(part for part in parts if part)))
    return lines


def platform_tags(architecture: str) -> list[str]:
    """Return the wheel platforms that run on a Debian 12 host, the newest first."""
    tags = [f"manylinux_2_{minor}_{architecture}" for minor in range(NEWEST_GLIBC_MINOR, OLDEST_GLIBC_MINOR - 1, -1)]
    old = ("manylinux2014", "manylinux2010", "manylinux1") if architecture == "x86_64" else ("manylinux2014",)
    return [*tags, *(f"{tag}_{architecture}" for tag in old), f"linux_{architecture}"]


def pip_command(interpreter: str, lock: str, destination: str, *, python_version: str, architecture: str) -> list[str]:
    """Return the command that downloads a lock's wheels for the hosts, with the user's own pip settings."""
    platforms = [word for tag in platform_tags(architecture) for word in ("--platform", tag)]
    return [
        interpreter,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-cache-dir",
        "--no-input",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        "--implementation=cp",
        f"--python-version={python_version}",
        *platforms,
        f"--requirement={lock}",
        f"--dest={destination}",
    ]


def build_command(interpreter: str, lock: str, destination: str) -> list[str]:
    """Return the command that makes wheels from the hashed source packages of a lock."""
    return [
        interpreter,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--disable-pip-version-check",
        "--no-cache-dir",
        "--no-input",
        "--use-pep517",
        "--no-deps",
        "--require-hashes",
        f"--requirement={lock}",
        f"--wheel-dir={destination}",
    ]


def format_lock(requirements: Iterable[Requirement]) -> bytes:
    """Write a lock, a package a line."""
    lines = [[item.pin, *(f"--hash=sha256:{digest}" for digest in sorted(item.hashes))] for item in requirements]
    return "".join(f"{' '.join(line)}\n" for line in lines).encode()


def split_built(requirements: Iterable[Requirement], build: Sequence[str]) -> tuple[list[Requirement], list[Requirement]]:
    """Return the packages that come as wheels and those that are built from source; refuse a name the lock lacks."""
    wanted = {canonical(name) for name in build}
    everything = list(requirements)
    absent = sorted(wanted - {item.name for item in everything})
    if absent:
        raise LockError(f"build names {', '.join(absent)}, which the lock does not contain")
    binary = [item for item in everything if item.name not in wanted]
    return binary, [item for item in everything if item.name in wanted]


def with_built(requirement: Requirement, directory: str) -> Requirement:
    """Return a package with the hash of the wheel that was built from its source."""
    for name in sorted(os.listdir(directory)):
        if name.endswith(".whl") and wheel_identity(name) == (requirement.name, requirement.version):
            if not name.endswith("-none-any.whl"):
                raise LockError(f"{requirement.pin} is not pure Python ({name}): it cannot be built here for a host")
            digest = file_digest(os.path.join(directory, name))
            return Requirement(requirement.name, requirement.version, frozenset([digest]))
    raise LockError(f"building {requirement.pin} made no wheel")


def wheel_identity(filename: str) -> tuple[str, str]:
    """Return the package and version that a wheel's name tells."""
    parts = filename.removesuffix(".whl").split("-")
    return (canonical(parts[0]), parts[1].replace("_", "+")) if len(parts) >= 5 else (canonical(parts[0]), "")


def file_digest(path: str) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_wheels(requirements: Iterable[Requirement], directory: str) -> list[str]:
    """Return the wheels, one for each requirement; name what is missing or corrupt."""
    names = sorted(name for name in os.listdir(directory) if name.endswith(".whl"))
    chosen: list[str] = []
    problems: list[str] = []
    for requirement in requirements:
        candidates = [name for name in names if wheel_identity(name)[0] == requirement.name]
        right = [name for name in candidates if file_digest(os.path.join(directory, name)) in requirement.hashes]
        same = [name for name in candidates if wheel_identity(name)[1] == requirement.version]
        if right:
            chosen.append(right[0])
        elif same:
            problems.append(f"{same[0]} is corrupt: its sha256 is not one that the lock allows for {requirement.pin}")
        else:
            problems.append(f"the wheel of {requirement.pin} is missing")
    if problems:
        raise LockError(f"{directory}: {'; '.join(problems)}")
    return chosen


def said(output: str, limit: int = 600) -> str:
    """Return what a program said as one short line."""
    text = " ".join(output.split())
    return text if len(text) <= limit else "... " + text[-limit:]


def python_version(python: str) -> str:
    """Return the version of an interpreter."""
    if os.path.realpath(python) == os.path.realpath(sys.executable):
        return ".".join(str(number) for number in sys.version_info[:3])
    try:
        done = subprocess.run(
            [python, "-I", "-c", "import sys; print('%d.%d.%d' % sys.version_info[:3])"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise LockError(f"the interpreter {python} does not run on this host: {said(str(error))}") from None
    return done.stdout.strip()


def pins(requirements: Sequence[Requirement]) -> list[str]:
    """Return the packages of a lock, sorted, as `name==version`."""
    return sorted(requirement.pin for requirement in requirements)

#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Host side of the `venv` module."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: venv
short_description: Install a locked set of wheels into a virtual environment, without a network on the host
description:
  - Makes a virtual environment hold exactly the packages of a lock. The wheels are downloaded once on the controller,
    with the pip settings of the user who runs Ansible, and sent as one file, and only to hosts that need them.
  - On the host C(uv), whose wheel is in the lock, does the installation, offline and with every hash checked.
  - The environment is built beside its place and exchanged with the old one when it is complete, so that an interrupted
    run changes nothing and programs find either the old or the new one. A stamp inside tells the next run what is
    installed.
  - In check mode the module compares the stamps and downloads nothing.
options:
  path:
    description: Absolute path of the virtual environment. Something else at this place is an error, never overwritten.
    type: str
    required: true
  lock:
    description: Requirements file with hashes in the C(files/) of the role or playbook, resolved for the hosts' Python
      without environment markers (C(uv pip compile --python-version 3.11.2 --generate-hashes --no-emit-index-url)).
      Give this or O(wheelhouse).
    type: str
  build:
    description: Packages of the lock that are published only as source. Their source, whose hash is in the lock, is
      made into a wheel on the controller. They must be pure Python.
    type: list
    elements: str
    default: []
  wheelhouse:
    description: Directory on the host with wheels and the C(requirements.lock) that names them all, uv too.
    type: str
  python:
    description: Interpreter on the host that the environment uses.
    type: str
    default: /usr/bin/python3
  python_version:
    description: Major and minor version of that interpreter. Another one on the host is an error.
    type: str
    default: "3.11"
  architecture:
    description: Processor architecture of the host.
    type: str
    choices: [x86_64, aarch64]
    default: x86_64
  state_dir:
    description: Folder on the controller below which the wheels are kept, in C(wheelhouses/). Defaults to the variable
      C(state_dir).
    type: str
author:
  - Evenkeel contributors (@evenkeel)
attributes:
  check_mode:
    support: full
    description: Predicts whether the environment would be built.
  diff_mode:
    support: full
    description: The packages before and after.
"""

EXAMPLES = r"""
- name: Install Patroni
  venv:
    path: /opt/patroni
    lock: patroni.lock
    build: [python-etcd, ydiff]

- name: Install a release from its own wheels
  venv:
    path: /opt/app/releases/1.4.0/venv
    wheelhouse: /opt/app/releases/1.4.0/wheelhouse
"""

RETURN = r"""
packages:
  description: The packages in it.
  returned: success
  type: list
  elements: str
  sample: [patroni==4.1.5, uv==0.9.1]
diff:
  description: The packages before and after, when diffs are asked for.
  returned: in diff mode
  type: dict
"""

import ctypes
import fcntl
import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_venv import (
    LOCK_NAME,
    STAMP_NAME,
    LockError,
    check_wheels,
    digest_of,
    parse_lock,
    pins,
    python_version,
    said,
    wheel_identity,
)

AT_FDCWD = -100
RENAME_EXCHANGE = 2
INSTALL_SECONDS = 900

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "path": {"type": "str", "required": True},
    "lock": {"type": "str"},
    "build": {"type": "list", "elements": "str", "default": []},
    "wheelhouse": {"type": "str"},
    "python": {"type": "str", "default": "/usr/bin/python3"},
    "python_version": {"type": "str", "default": "3.11"},
    "architecture": {"type": "str", "choices": ["x86_64", "aarch64"], "default": "x86_64"},
    "state_dir": {"type": "str"},
    "digest": {"type": "str"},
    "packages": {"type": "list", "elements": "str"},
    "archive": {"type": "str"},
}


def read_stamp(path: str) -> dict[str, Any]:
    """Return what a finished build wrote into the environment; nothing when there is none."""
    try:
        with open(os.path.join(path, STAMP_NAME), encoding="utf-8") as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def check_python(python: str, wanted: str) -> None:
    """Refuse an interpreter that the wheels are not made for."""
    found = python_version(python)
    if found.split(".")[:2] != wanted.split("."):
        raise LockError(
            f"{python} on this host is Python {found}, but the lock is for {wanted}; resolve the lock for {found} and set python_version"
        )


def is_current(path: str, wanted: dict[str, Any]) -> bool:
    """Say whether the environment is complete and the wanted one."""
    stamp = read_stamp(path)
    return all(stamp.get(key) == wanted[key] for key in wanted) and os.path.exists(os.path.join(path, "bin", "python"))


def check_place(path: str) -> None:
    """Refuse to replace anything but a virtual environment."""
    if os.path.islink(path):
        raise LockError(f"{path} is a symbolic link; the module replaces only virtual environments that it made")
    if not os.path.exists(path) or os.path.isfile(os.path.join(path, "pyvenv.cfg")):
        return
    if not os.path.isdir(path) or os.listdir(path):
        raise LockError(f"{path} exists and is not a virtual environment; move it away first")


def unpack_uv(wheel: str, directory: str) -> str:
    """Take the uv program out of its wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".data/scripts/uv")]
            if len(names) != 1:
                raise LockError(f"{os.path.basename(wheel)} does not contain the uv program")
            program = os.path.join(directory, "uv")
            with archive.open(names[0]) as source, open(program, "wb") as target:
                shutil.copyfileobj(source, target)
    except zipfile.BadZipFile:
        raise LockError(f"{os.path.basename(wheel)} is corrupt: it is no zip file") from None
    os.chmod(program, 0o755)
    return program


def run_uv(program: str, work: str, *words: str) -> None:
    """Run uv without a network and without anybody's settings."""
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        "HOME": work,
        "TMPDIR": work,
        "UV_CACHE_DIR": os.path.join(work, "cache"),
        "UV_NO_CONFIG": "1",
        "UV_OFFLINE": "1",
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_NO_PROGRESS": "1",
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        [program, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=work,
        timeout=INSTALL_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        output = done.stdout.decode("utf-8", "replace")
        raise LockError(f"uv {' '.join(words[:2])} failed (exit {done.returncode}): {said(output)}")


def unpack(archive: str, directory: str) -> None:
    """Unpack the wheels that the controller sent."""
    os.mkdir(directory)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if not member.isfile() or "/" in member.name or member.name.startswith("."):
                    raise LockError(f"the file from the controller holds an unexpected {member.name!r}")
                source = tar.extractfile(member)
                if source is not None:
                    with source, open(os.path.join(directory, member.name), "wb") as target:
                        shutil.copyfileobj(source, target)
    except (tarfile.TarError, EOFError) as error:
        raise LockError(f"the file from the controller is damaged: {error}") from None


def build(work: str, house: str, python: str, stamp: dict[str, Any]) -> str:
    """Build a complete environment inside the work folder and return its path."""
    lock = os.path.join(house, LOCK_NAME)
    requirements = parse_lock(read_lock(house), lock)
    wheels = check_wheels(requirements, house)
    uv = unpack_uv(next(os.path.join(house, name) for name in wheels if wheel_identity(name)[0] == "uv"), work)
    new = os.path.join(work, "venv")
    run_uv(uv, work, "venv", "--quiet", "--relocatable", "--python", python, new)
    target = os.path.join(new, "bin", "python")
    offline = ["--offline", "--no-index", "--find-links", house, "--require-hashes", "--no-build"]
    run_uv(uv, work, "pip", "install", "--quiet", "--python", target, *offline, "--compile-bytecode", "-r", lock)
    run_uv(uv, work, "pip", "check", "--quiet", "--python", target)
    with open(os.path.join(new, STAMP_NAME), "w", encoding="utf-8") as file:
        json.dump({**stamp, "packages": pins(requirements)}, file, indent=1, sort_keys=True)
        file.write("\n")
    os.chmod(new, 0o755)
    os.sync()
    return new


def exchange(new: str, path: str) -> None:
    """Put the new environment in its place; the old one ends up where the new one was."""
    if not os.path.lexists(path):
        os.rename(new, path)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(path), RENAME_EXCHANGE) != 0:
        old = f"{new}-old"  # a file system without an atomic exchange: two steps, one right after the other
        os.rename(path, old)
        os.rename(new, path)


def read_lock(house: str) -> bytes:
    """Return the lock of a wheelhouse."""
    try:
        with open(os.path.join(house, LOCK_NAME), "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise LockError(f"there is no {LOCK_NAME} in {house} on this host") from None


def install(path: str, python: str, stamp: dict[str, Any], *, archive: str | None, wheelhouse: str | None) -> None:
    """Build the environment in a work folder beside its place, then exchange it with what is there."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    work = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.evenkeel")
    with open(f"{work}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(work, ignore_errors=True)  # what an interrupted run left
        os.mkdir(work, 0o700)
        try:
            house = wheelhouse or os.path.join(work, "wheelhouse")
            if archive:
                unpack(archive, house)
            exchange(build(work, house, python, stamp), path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            os.unlink(lock.name)


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    params = module.params
    path, wheelhouse, archive = params["path"], params["wheelhouse"], params["archive"]
    result: dict[str, Any] = {"changed": False}
    os.umask(0o022)
    try:
        packages, digest = params["packages"] or [], params["digest"]
        if wheelhouse and not (module.check_mode and not os.path.isdir(wheelhouse)):
            lock = read_lock(wheelhouse)
            packages, digest = pins(parse_lock(lock, os.path.join(wheelhouse, LOCK_NAME))), digest_of(lock)
        elif not wheelhouse and not digest:
            module.fail_json(msg="venv works through its action plugin: set action_plugins in ansible.cfg")
        check_python(params["python"], params["python_version"])
        stamp = {"requirements": digest, "python": params["python"], "python_version": params["python_version"]}
        result["packages"] = packages
        if not is_current(path, stamp):
            check_place(path)
            result["changed"] = True
            if module._diff:
                before, after = read_stamp(path).get("packages", []), packages
                headers = {"before_header": path, "after_header": path}
                result["diff"] = {**headers, "before": _lines(before), "after": _lines(after)}
            if not module.check_mode and (archive or wheelhouse):
                install(path, params["python"], stamp, archive=archive, wheelhouse=wheelhouse)
    except (LockError, OSError, subprocess.TimeoutExpired) as error:
        module.fail_json(msg=f"{path}: {said(str(error), 2000)}")
    module.exit_json(**result)


def _lines(packages: list[str]) -> str:
    return "".join(f"{package}\n" for package in packages)


if __name__ == "__main__":
    main()

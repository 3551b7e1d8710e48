# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Controller side of the `venv` module: ask the host, and only if it needs the wheels fetch and send them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ansible.module_utils
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.plugins.action import ActionBase
from ansible.template import trust_as_template

_UTILS = str(Path(__file__).resolve().parent.parent / "module_utils")
if _UTILS not in ansible.module_utils.__path__:
    ansible.module_utils.__path__.append(_UTILS)

from ansible.module_utils.evenkeel_controller import SourceError, Sources  # noqa: E402
from ansible.module_utils.evenkeel_venv import (  # noqa: E402
    LOCK_NAME,
    LockError,
    build_command,
    check_wheels,
    digest_of,
    format_lock,
    parse_lock,
    pins,
    pip_command,
    said,
    split_built,
    with_built,
)

OPTIONS = ("path", "lock", "build", "wheelhouse", "python", "python_version", "architecture", "state_dir")
ARCHITECTURES = ("x86_64", "aarch64")
DEFAULT_PYTHON_VERSION = "3.11"
DOWNLOAD_SECONDS = 1800


class ActionModule(ActionBase):  # type: ignore[misc]
    """Install a locked set of wheels into a virtual environment on the host, without a network there."""

    TRANSFERS_FILES = True
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask the host; fetch, send and install if its environment is another one."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        args = self._checked()
        if args.get("wheelhouse"):
            result.update(self._execute_module("venv", module_args=args, task_vars=task_vars))
            return result
        name = args["lock"]
        try:
            lock = Sources(self, task_vars).read(name)
            requirements = parse_lock(lock, name)
            split_built(requirements, args["build"])
            sent = {**args, "digest": digest_of(lock), "packages": pins(requirements)}
            result.update(self._execute_module("venv", module_args=sent, task_vars=task_vars))
            if not result.get("failed") and result.get("changed") and not self._task.check_mode:
                archive = fetch(self._wheelhouses(args), lock, name, args)
                diff = result.pop("diff", None)
                try:
                    sent["archive"] = self._send(archive)
                    result.update(self._execute_module("venv", module_args=sent, task_vars=task_vars))
                finally:
                    self._remove_tmp_path(self._connection._shell.tmpdir)
                if diff is not None:
                    result.setdefault("diff", diff)
        except (SourceError, LockError, OSError) as error:
            raise AnsibleActionFail(str(error)) from None
        result["invocation"] = {"module_args": args}
        return result

    def _checked(self) -> dict[str, Any]:
        given = {str(key): value for key, value in self._task.args.items() if value is not None}
        problems = [f"unknown option {key!r}; known are {', '.join(OPTIONS)}" for key in given if key not in OPTIONS]
        path = given.get("path")
        if not isinstance(path, str) or not path.startswith("/") or os.path.normpath(path) in ("/", "//"):
            problems.append("needs path, the absolute path of the virtual environment")
        if ("lock" in given) == ("wheelhouse" in given):
            problems.append("needs lock or wheelhouse, one of them")
        if "wheelhouse" in given and not str(given["wheelhouse"]).startswith("/"):
            problems.append("wheelhouse must be an absolute path on the host")
        build = given.setdefault("build", [])
        if not isinstance(build, list) or not all(isinstance(item, str) for item in build):
            problems.append("build must be a list of package names")
        elif build and "lock" not in given:
            problems.append("build has a meaning only with lock")
        given.setdefault("python_version", DEFAULT_PYTHON_VERSION)
        if not re.fullmatch(r"3\.\d+", str(given["python_version"])):
            problems.append(f'python_version must be like "3.11", quoted; it is {given["python_version"]!r}')
        given.setdefault("architecture", ARCHITECTURES[0])
        if given["architecture"] not in ARCHITECTURES:
            problems.append(f"architecture must be one of {', '.join(ARCHITECTURES)}")
        if problems:
            raise AnsibleActionFail("; ".join(problems))
        return {**given, "path": os.path.normpath(str(path))}

    def _wheelhouses(self, args: dict[str, Any]) -> Path:
        state_dir = args.get("state_dir")
        if not state_dir:
            try:
                state_dir = self._templar.template(trust_as_template("{{ state_dir }}"))
            except AnsibleError as error:
                raise LockError(f"where to keep the wheels is not known: {error}") from None
        return Path(str(state_dir)).expanduser() / "wheelhouses"

    def _send(self, archive: Path) -> str:
        shell = self._connection._shell
        if shell.tmpdir is None:
            self._make_tmp_path()
        remote = str(shell.join_path(shell.tmpdir, "wheelhouse.tar"))
        self._transfer_file(str(archive), remote)
        self._fixup_perms2((shell.tmpdir, remote))
        return remote


def fetch(wheelhouses: Path, lock: bytes, name: str, args: dict[str, Any]) -> Path:
    """Return the tar of a lock's wheels; download and pack them if that has not been done, one process at a time."""
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
    return archive


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
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise LockError(f"pip did not finish with {name} within {DOWNLOAD_SECONDS} s") from None
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
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

# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Controller side of the `venv` module: ask the host, and only if it needs the wheels fetch and send them."""

from __future__ import annotations

import os
import re
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
    LockError,
    digest_of,
    parse_lock,
    pins,
    split_built,
)
from ansible.module_utils.evenkeel_wheelhouse import ARCHITECTURES, DEFAULT_PYTHON_VERSION, fetch  # noqa: E402

OPTIONS = ("path", "lock", "build", "wheelhouse", "python", "python_version", "architecture", "state_dir")


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
                archive, _house = fetch(self._wheelhouses(args), lock, name, args)
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

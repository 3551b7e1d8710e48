# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Controller side of the `units` module: check every entry, render every template, then make one remote call."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import ansible.module_utils
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

_UTILS = str(Path(__file__).resolve().parent.parent / "module_utils")
if _UTILS not in ansible.module_utils.__path__:
    ansible.module_utils.__path__.append(_UTILS)

from ansible.module_utils.evenkeel_controller import SourceError, Sources  # noqa: E402
from ansible.module_utils.evenkeel_files import encode_payload  # noqa: E402
from ansible.module_utils.evenkeel_units import (  # noqa: E402
    check_units,
    drop_in_path,
    label_of,
    unit_path,
)

OPTIONS = ("units", "changed_files", "parallel", "timeout_seconds", "vars")
DEFAULT_TIMEOUT_SECONDS = 300


class ActionModule(ActionBase):  # type: ignore[misc]
    """Bring many systemd units of a role into their wanted state in one remote call."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Check, render, send."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        args = self._task.args
        self._check(args)
        changed_files = [str(path) for path in args.get("changed_files") or []]
        timeout = int(args.get("timeout_seconds") or DEFAULT_TIMEOUT_SECONDS)
        # templated once, as arguments of the task; what a template takes from the inventory is computed anew each time
        units = self._prepare(list(args["units"]), Sources(self, {**task_vars, **(args.get("vars") or {})}))
        if units:
            sent = {
                "payload": encode_payload({"units": units, "changed_files": changed_files}),
                "parallel": bool(args.get("parallel")),
                "timeout_seconds": timeout,
            }
            result.update(self._execute_module("units", module_args=sent, task_vars=task_vars))
        else:
            result.update(changed=False, changed_units=[], started=[], restarted=[], reloaded=[], due=[], waiting=[])
        shown = {"units": [dict(unit) for unit in args["units"]], "changed_files": changed_files}
        result["invocation"] = {"module_args": {**shown, "timeout_seconds": timeout}}
        return result

    def _check(self, args: Any) -> None:
        problems = [f"unknown option {key!r}; known are {', '.join(OPTIONS)}" for key in args if key not in OPTIONS]
        if not isinstance(args.get("units"), list):
            problems.append("needs units, the list of entries")
        else:
            problems += check_units(args["units"])
        if not isinstance(args.get("vars") or {}, dict):
            problems.append("vars must be a mapping of variable names to values")
        if not isinstance(args.get("parallel", False), bool):
            problems.append("parallel must be true or false")
        if not isinstance(args.get("changed_files") or [], list):
            problems.append("changed_files must be a list, the changed_files of a `files` task")
        timeout = args.get("timeout_seconds")
        if timeout is not None and not (str(timeout).isdecimal() and int(timeout) > 0):
            problems.append("timeout_seconds must be a whole number of seconds")
        _refuse("the task is wrong", problems)

    def _prepare(self, entries: list[Any], sources: Sources) -> list[dict[str, Any]]:
        prepared: list[dict[str, Any]] = []
        problems: list[str] = []
        for index, raw in enumerate(entries):
            entry = {str(key): value for key, value in raw.items() if value is not None}
            variables = entry.pop("vars", {})
            name = entry["name"]
            writes = []
            for source, dest in ((entry, unit_path(name)), (dict(entry.pop("drop_in", {})), drop_in_path(name))):
                try:
                    write = _write(source, dest, variables, sources)
                except SourceError as error:
                    problems.append(f"{label_of(index, raw)}: {error}")
                else:
                    writes += [write] if write else []
            prepared.append({**entry, "writes": writes})
        _refuse("a source is wrong", problems)
        return prepared


def _write(source: dict[str, Any], dest: str, variables: Any, sources: Sources) -> dict[str, str] | None:
    """Take the content out of an entry, in the form that the host gets."""
    template, content = source.pop("template", None), source.pop("content", None)
    if template is not None:
        data, origin = sources.render(template, dest, variables), f"{dest} (template {template})"
    elif content is not None:
        data, origin = content.encode("utf-8", "surrogateescape"), dest
    else:
        return None
    return {"dest": dest, "source": origin, "data": base64.b64encode(data).decode("ascii")}


def _refuse(head: str, problems: list[str]) -> None:
    if len(problems) == 1:
        raise AnsibleActionFail(problems[0])
    if problems:
        raise AnsibleActionFail(f"nothing was changed, because {head}:\n" + "\n".join(f"- {p}" for p in problems))

# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Controller side of the `files` module: check every entry, render every template, then make one remote call."""

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
from ansible.module_utils.evenkeel_files import (  # noqa: E402
    check_account,
    check_entries,
    encode_payload,
    label_of,
    normalise,
)

OPTIONS = ("owner", "group", "files")
LARGEST_FILE_BYTES = 16 * 1024 * 1024


class ActionModule(ActionBase):  # type: ignore[misc]
    """Write many files, directories and links of a role in one remote call."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Check, render, send."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        args = self._task.args
        entries = self._entries(args)
        defaults = {"owner": str(args.get("owner") or "root"), "group": str(args.get("group") or "root")}
        payload = self._prepare(entries, defaults, Sources(self, task_vars))
        if payload:
            sent = {"payload": encode_payload(payload)}
            result.update(self._execute_module("files", module_args=sent, task_vars=task_vars))
        else:
            result.update(changed=False, changed_files=[])
        result["invocation"] = {"module_args": {**defaults, "files": [_public(entry) for entry in entries]}}
        return result

    def _entries(self, args: Any) -> list[Any]:
        problems = [f"unknown option {key!r}; known are {', '.join(OPTIONS)}" for key in args if key not in OPTIONS]
        for key in ("owner", "group"):
            problems += check_account(key, args.get(key))
        entries = args.get("files")
        if not isinstance(entries, list):
            problems.append("needs files, the list of entries")
        else:
            problems += check_entries(entries)
        if problems:
            raise AnsibleActionFail(_listed("nothing was changed, because the task is wrong", problems))
        return list(entries)

    def _prepare(self, entries: list[Any], defaults: dict[str, str], sources: Sources) -> list[dict[str, Any]]:
        prepared: list[dict[str, Any]] = []
        problems: list[str] = []
        for index, raw in enumerate(entries):
            entry = normalise(raw, defaults)
            variables = entry.pop("vars", {})
            try:
                if entry["kind"] == "file":
                    data = _data(entry, variables, sources)
                    entry["data"] = base64.b64encode(data).decode("ascii")
            except SourceError as error:
                problems.append(f"{label_of(index, entry)}: {error}")
            entry["label"] = label_of(index, entry)
            prepared.append(entry)
        if problems:
            raise AnsibleActionFail(_listed("nothing was changed, because a source is wrong", problems))
        return prepared


def _data(entry: dict[str, Any], variables: Any, sources: Sources) -> bytes:
    """Return the bytes of a file entry and leave in it only the name of where they come from."""
    if "template" in entry:
        data = sources.render(entry["template"], entry["dest"], variables, secret=entry["secret"])
        entry["source"] = f"{entry['dest']} (template {entry.pop('template')})"
    elif "copy" in entry:
        data = sources.read(entry["copy"])
        entry["source"] = f"{entry['dest']} (copy {entry.pop('copy')})"
    else:
        data = str(entry.pop("content")).encode("utf-8", "surrogateescape")
        entry["source"] = entry["dest"]
    if len(data) > LARGEST_FILE_BYTES:
        raise SourceError(f"{len(data)} bytes are too many for one entry; use ansible.builtin.copy for large files")
    return bytes(data)


def _public(entry: Any) -> dict[str, Any]:
    """Return an entry as `-vvv` may show it."""
    shown = dict(entry)
    if shown.get("secret"):
        for key in ("content", "vars"):
            if key in shown:
                shown[key] = "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"
    return shown


def _listed(head: str, problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else head + ":\n" + "\n".join(f"- {problem}" for problem in problems)

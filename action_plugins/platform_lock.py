# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Controller side of the `platform_lock` module: says who takes the lock, and judges whether another owner still works."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import ansible.module_utils
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

_UTILS = str(Path(__file__).resolve().parent.parent / "module_utils")
if _UTILS not in ansible.module_utils.__path__:
    ansible.module_utils.__path__.append(_UTILS)

from ansible.module_utils.evenkeel_lock import ago, held_text, life, refusal, this_process, wanted_take_over, whoami  # noqa: E402

OPTIONS = ("state", "id", "run", "purpose", "hours", "take_over", "path")


class ActionModule(ActionBase):  # type: ignore[misc]
    """Take, give back or read the platform's lock on a host."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask the host; when somebody else's lock may be taken over, ask once more."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = {str(key): value for key, value in self._task.args.items() if value is not None}
        unknown = [key for key in args if key not in OPTIONS]
        if unknown:
            raise AnsibleActionFail(f"unknown option {unknown[0]!r}; known are {', '.join(OPTIONS)}")
        who, named = whoami(), str(args.pop("take_over", ""))
        sent = {**args, "owner": {"who": who, "process": this_process()}}
        told = self._execute_module("platform_lock", module_args=sent, task_vars=task_vars)
        result.update(told, who=who, note="")
        if "lock" not in told:
            return result  # unreachable, or failed with its own words
        held = args.get("state") == "held"
        if held:
            result.update(refused="", resumed={}, taken=bool(told["changed"]))
        lock = told["lock"]
        if not lock or lock["id"] == args.get("id"):
            return result
        if args.get("state") == "released":
            owner = f"{lock['purpose']} ({lock['run']}) by {lock['who']}"
            result["note"] = f"this run does not have the lock any more: {owner} has taken it over"
            return result
        alive, now = life(lock["process"]), datetime.fromisoformat(told["now"])
        if not held or self._task.check_mode:
            result["note"] = held_text(lock, now, alive)
            return result
        take = wanted_take_over(lock, who, named, alive)
        if take:
            told = self._execute_module("platform_lock", module_args={**sent, "take_over": take}, task_vars=task_vars)
            result.update(told)
            if "lock" not in told:
                return result
        if result["lock"].get("id") != args.get("id"):
            result["refused"] = refusal(result["lock"], named, now, alive)
            return result
        ended = "An earlier run of yours ended without its last words: its lock" if lock["who"] == who else f"The lock of {lock['who']}"
        result.update(
            taken=True,
            resumed={"run": lock["run"], "purpose": lock["purpose"]},
            note=f"{ended} is taken over ({lock['purpose']}, {lock['run']}, {ago(lock['since'], now)})",
        )
        return result

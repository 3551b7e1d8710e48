# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Which machine answers under a host's name, and how far its clock is from the controller's. Needs nothing but a shell there."""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase

COMMAND = "date +%s.%N; cat /etc/machine-id; cat /proc/sys/kernel/random/boot_id"
GOOD_ROUND_TRIP_SECONDS = 0.5  # the first answer may wait for the connection to be made
TRIES = 3


def identity(answer: str, before: float, after: float) -> dict[str, Any]:
    """What one answer says; the host read its clock at some moment between `before` and `after` on the controller's."""
    words = answer.split()
    return {
        "clock_offset_seconds": round(float(words[0]) - (before + after) / 2, 3),
        "clock_error_seconds": round((after - before) / 2, 3),
        "machine_id": words[1],
        "boot_id": words[2],
    }


class ActionModule(ActionBase):  # type: ignore[misc]
    """Ask a host who it is and what time it has. Reads only, in check mode, too."""

    _supports_check_mode = True
    _supports_async = False
    _requires_connection = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask until an answer came quickly, for only then it says much about the clock; keep the best."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        found: list[dict[str, Any]] = []
        for _ in range(TRIES):
            before = time.time()
            answer = self._low_level_execute_command(COMMAND, sudoable=False)
            try:
                found.append(identity(answer["stdout"], before, time.time()))
            except (IndexError, ValueError):
                said = " ".join(str(answer.get("stderr") or answer.get("stdout") or "nothing").split())[:200]
                result.update(failed=True, msg=f"the host does not say which machine it is and what time it has: {said}")
                return result
            if found[-1]["clock_error_seconds"] * 2 < GOOD_ROUND_TRIP_SECONDS:
                break
        result.update(changed=False, **min(found, key=lambda one: float(one["clock_error_seconds"])))
        return result

# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Run a unit that works and ends, and show its lines as they come: nobody looks at a silent terminal for an hour.

The work is the unit's, not the connection's: it goes on when this run is interrupted, and a second one shows it to its end.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

BEGIN_SECONDS = 30
POLL_SECONDS = (1, 5)  # at first, and after the first ten times
LOST_TRIES = 6  # of a connection that breaks meanwhile, so many poll pauses apart
PROPERTIES = "ActiveState,InvocationID,Result"
RUNNING = ("activating", "active", "deactivating", "reloading")
CURSOR = "-- cursor: "


@dataclass(frozen=True)
class Look:
    """What one look at the unit tells."""

    state: str
    invocation: str
    result: str
    lines: list[str]
    cursor: str


def parse(answer: str) -> Look:
    """Read what the commands of `question` print: the unit's properties, a line `--`, then its lines, and the cursor behind them."""
    head, _, tail = answer.replace("\r\n", "\n").partition("--\n")
    shown = dict(line.split("=", 1) for line in head.splitlines() if "=" in line)
    lines = tail.splitlines()
    cursor = ""
    if lines and lines[-1].startswith(CURSOR):
        cursor = lines.pop().removeprefix(CURSOR)
    return Look(shown.get("ActiveState", ""), shown.get("InvocationID", ""), shown.get("Result", ""), lines, cursor)


def question(unit: str, invocation: str, cursor: str) -> str:
    """The shell commands of one look. The state is asked for first: what was written before the end is read then."""
    command = f"export LC_ALL=C.UTF-8; systemctl show --no-pager --property={PROPERTIES} {shlex.quote(unit)}; echo --"
    if invocation:
        after = f"--after-cursor={shlex.quote(cursor)} " if cursor else ""
        command += "; journalctl --sync; journalctl --quiet --no-pager --output=cat --show-cursor "
        command += f"{after}_SYSTEMD_INVOCATION_ID={invocation}"
    return command


class ActionModule(ActionBase):  # type: ignore[misc]
    """Start a unit, follow it, and fail if it does."""

    _supports_check_mode = True
    _supports_async = False
    _requires_connection = True

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Start, follow, judge."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        unit = self._task.args.get("unit")
        if not isinstance(unit, str) or set(self._task.args) != {"unit"}:
            raise AnsibleActionFail("run_unit needs unit, the name of a systemd unit that works and ends, and knows no other option")
        host = (task_vars or {}).get("inventory_hostname", "")
        result["changed"] = True
        if self._task.check_mode:
            return result
        before = self._look(unit)
        if before.state not in RUNNING:
            started = self._low_level_execute_command(f"systemctl start --no-block {shlex.quote(unit)}")
            if started["rc"]:
                return {**result, "failed": True, "msg": started["stderr"].strip() or f"{unit} could not be started"}
        else:
            Display().display(f"{host}: {unit} is at work already; its lines from its beginning on:")
        lines, look = self._follow(unit, host, "" if before.state in RUNNING else before.invocation)
        result.update(lines=lines, result=look.result)
        if look.result != "success":
            last = lines[-1] if lines else "it wrote nothing"
            result.update(failed=True, msg=f"{unit} on {host} has failed ({look.result}): {last}")
        return result

    def _follow(self, unit: str, host: str, other: str) -> tuple[list[str], Look]:
        """Show the lines of the run that is not `other`, until it has ended."""
        shown: list[str] = []
        invocation = cursor = ""
        began, looks = time.monotonic(), 0
        while True:
            look = self._look(unit, invocation, cursor)
            if not invocation and look.invocation != other:
                invocation = look.invocation
                continue
            if not invocation and time.monotonic() - began > BEGIN_SECONDS:
                raise AnsibleActionFail(f"{unit} on {host} has not begun within {BEGIN_SECONDS} s. Next, there: systemctl status {unit}")
            for line in look.lines:
                Display().display(f"{host}: {line}")
            shown += look.lines
            cursor = look.cursor or cursor
            if invocation and look.state not in RUNNING:
                return shown, look
            looks += 1
            time.sleep(POLL_SECONDS[0] if looks <= 10 else POLL_SECONDS[1])

    def _look(self, unit: str, invocation: str = "", cursor: str = "") -> Look:
        """Look once; a connection that breaks is tried again, for the unit goes on."""
        for number in range(1, LOST_TRIES + 1):
            try:
                return parse(self._low_level_execute_command(question(unit, invocation, cursor))["stdout"])
            except AnsibleConnectionFailure:
                if number == LOST_TRIES:
                    raise
                time.sleep(POLL_SECONDS[1])
        raise AssertionError("unreachable")

"""Running a unit in sight: its lines come once and in order, its end is known, and a broken connection does not end it."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from programs import ROOT, load

plugin = load(ROOT / "action_plugins/run_unit.py", "evk_run_unit")


def look(state: str, invocation: str, result: str = "success", lines: str = "", cursor: str = "") -> str:
    tail = f"{lines}{plugin.CURSOR}{cursor}\n" if cursor else lines
    return f"Result={result}\nActiveState={state}\nInvocationID={invocation}\n--\n{tail}"


class Host:
    """A host that gives these answers, one after another; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, command: str) -> dict[str, Any]:
        self.asked.append(command)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return {"stdout": answer, "rc": 0}


@pytest.fixture
def action(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(plugin.time, "sleep", lambda _seconds: None)
    return object.__new__(plugin.ActionModule)


def follow(action: Any, host: Host, other: str = "old") -> tuple[list[str], Any]:
    action._low_level_execute_command = host
    lines, end = action._follow("work@core.service", "pg-1", other)
    return lines, end


def test_lines_come_once_and_in_order_until_the_unit_has_ended(action: Any, capsys: pytest.CaptureFixture[str]) -> None:
    host = Host(
        look("inactive", "old"),  # systemd has not begun yet
        look("activating", "new"),
        look("activating", "new", lines="one\ntwo\n", cursor="s=1;i=2"),
        AnsibleConnectionFailure("gone"),
        look("activating", "new", lines="", cursor="s=1;i=2"),
        look("inactive", "new", lines="three\n", cursor="s=1;i=3"),
    )
    lines, end = follow(action, host)
    assert (lines, end.result) == (["one", "two", "three"], "success")
    assert capsys.readouterr().out == "pg-1: one\npg-1: two\npg-1: three\n"
    assert "--after-cursor" not in host.asked[2]
    assert "--after-cursor='s=1;i=2'" in host.asked[-1] and "_SYSTEMD_INVOCATION_ID=new" in host.asked[-1]


def test_a_unit_that_fails_tells_how(action: Any) -> None:
    _lines, end = follow(action, Host(look("failed", "new"), look("failed", "new", "exit-code", "bad\n", "s=1")))
    assert end.result == "exit-code"


def test_a_unit_that_never_begins_is_not_waited_for_without_end(action: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "BEGIN_SECONDS", -1)
    with pytest.raises(AnsibleActionFail, match="has not begun within"):
        follow(action, Host(look("inactive", "old")))


def test_a_host_that_stays_away_ends_it(action: Any) -> None:
    with pytest.raises(AnsibleConnectionFailure):
        follow(action, Host(*[AnsibleConnectionFailure("gone")] * plugin.LOST_TRIES))


def test_a_terminal_s_line_ends_are_understood() -> None:
    assert plugin.parse(look("activating", "new", lines="one\n", cursor="c").replace("\n", "\r\n")).lines == ["one"]

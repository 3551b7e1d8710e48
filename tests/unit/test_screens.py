"""What people read."""

from __future__ import annotations

from typing import Any

from filter_plugins import screens


def answer(status: int, content: str = "", **check: Any) -> dict[str, Any]:
    return {
        "item": {"name": "n", "method": "GET", "path": "/p", "status": 200, "contains": [], **check},
        "status": status,
        "content": content,
    }


def test_failures_say_what_was_asked_and_answered() -> None:
    assert screens.check_failures([answer(200, "a b", contains=["a"])]) == []
    assert screens.check_failures([answer(503, "down")]) == ["n: GET /p answered 503, not 200: down"]
    assert screens.check_failures([answer(200, "x", contains=["a"])]) == ["n: GET /p answered 200 without 'a': x"]
    assert screens.check_failures([{**answer(-1), "msg": "refused"}]) == ["n: GET /p got no answer: refused"]

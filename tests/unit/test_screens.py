"""What people read: the migration plan, failed checks."""

from __future__ import annotations

from typing import Any

from filter_plugins import screens


def test_plan_shows_each_database_and_what_cannot_be_undone() -> None:
    step = {"database": "core", "app": "shop", "name": "0002_x", "operations": ["Remove field y"], "reversible": False}
    text = screens.migration_plan_text({"pending": [step, {**step, "database": "plugins"}], "fingerprint": "abc"}, "1.0-f")
    assert text.count("database core") == text.count("database plugins") == 1
    assert "shop.0002_x  (cannot be reversed)" in text
    assert text.endswith("fingerprint of this plan: abc")
    assert screens.migration_plan_text({"pending": [], "fingerprint": "x"}, "1.0-f") == "No migration is pending for release 1.0-f."


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

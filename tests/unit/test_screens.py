"""What people read: the migration plan, failed checks, the status screen."""

from __future__ import annotations

import json
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


def row(name: str, status: str = "healthy") -> dict[str, Any]:
    return {"name": name, "status": status, "since": 1.0, "message": "m"}


def collected(*rows: dict[str, Any], release: str | None = "releases/1") -> dict[str, Any]:
    return {"status_health": {"stdout": json.dumps(rows)}, "status_current": {"stat": {"lnk_target": release} if release else {}}}


def cluster(name: str, *members: dict[str, Any], status: int = 200) -> dict[str, Any]:
    return {"item": [name, {}], "status": status, "json": {"members": list(members)}}


PRIMARY = {"name": "a", "role": "leader", "state": "running"}


def report(hosts: dict[str, Any], answers: list[dict[str, Any]], carriers: list[str]) -> dict[str, Any]:
    return screens.status_report(hosts, dict.fromkeys(hosts, "10.0.0.1"), answers, carriers, "platform x")


def test_a_healthy_platform_is_well() -> None:
    said = report({"a": collected(row("redis"))}, [cluster("core", PRIMARY)], ["a"])
    assert said["problems"] == []
    assert "release    1 on a" in said["text"]
    assert "primary a" in said["text"]
    assert said["text"].endswith("all is well")


def test_everything_that_is_not_well_is_a_problem() -> None:
    hosts = {
        "a": collected(row("redis", "unhealthy"), release="releases/1"),
        "b": collected(release="releases/2"),
        "c": {"status_health": {"msg": "unreachable"}},
        "d": collected(release=None),
    }
    said = report(hosts, [cluster("core", status=503), cluster("core", {**PRIMARY, "role": "replica"})], ["a", "b", "d"])
    text = "\n".join(said["problems"])
    for words in (
        "redis on a is unhealthy: m",
        "c does not answer",
        "no release on d",
        "hosts carry different releases",
        "PostgreSQL cluster core has no running primary",
    ):
        assert words in text
    assert "NOT WELL: 5 problems" in said["text"]


def test_a_member_that_does_not_answer_is_outvoted_by_one_that_does() -> None:
    standby = {"name": "b", "role": "sync_standby", "state": "streaming", "lag": 0}
    said = report({"a": collected(row("redis"))}, [cluster("core", status=-1), cluster("core", PRIMARY, standby)], ["a"])
    assert said["problems"] == []
    assert "standby b (sync_standby, streaming, lag 0)" in said["text"]

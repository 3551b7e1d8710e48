"""What deploy.yml and rollback.yml decide by data alone."""

from __future__ import annotations

from typing import Any

import pytest

from filter_plugins import delivery

NOW = 1_800_000_000.0


def facts(**hosts: tuple[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Host to what release_facts returns: which release runs, and which are kept."""
    return {host: {"converged": True, "current": current, "kept": kept, "free_mb": 9000} for host, (current, kept) in hosts.items()}


def well(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"state": {"health": [{"name": "redis", "status": "healthy"}, *rows]}}


TWO = facts(a=("r1", ["r0", "r1"]), b=("r1", ["r0", "r1"]))


def test_a_deploy_begins_on_a_healthy_platform() -> None:
    assert delivery.deploy_obstacle(TWO, {"a": well()}, [], 30, "shop") == ""


@pytest.mark.parametrize(
    ("changed", "answers", "dangers", "words"),
    [
        ({"converged": False}, {}, [], "a has not been converged: run playbooks/site.yml first"),
        ({"free_mb": 900}, {}, [], "a has 900 MB: run playbooks/prune.yml"),
        ({}, {}, ["etcd has no quorum; next: start it"], "the platform is in danger: etcd has no quorum"),
        ({}, {"a": well({"name": "postgresql-core", "status": "unhealthy"})}, [], "postgresql-core on a is unhealthy"),
    ],
)
def test_what_speaks_against_a_deploy_is_named(changed: dict[str, Any], answers: dict[str, Any], dangers: list[str], words: str) -> None:
    there = {**TWO, "a": {**TWO["a"], **changed}}
    assert words in delivery.deploy_obstacle(there, answers, dangers, 30, "shop")


def test_an_unwell_application_may_be_mended_by_a_deploy() -> None:
    unwell = well({"name": "shop-web", "status": "unhealthy"}, {"name": "backups", "status": "unhealthy", "timers": ["x.timer"]})
    assert delivery.deploy_obstacle(TWO, {"a": unwell}, [], 30, "shop") == ""


def test_a_big_release_needs_more_room() -> None:
    assert "needs 10000 MB" in delivery.deploy_obstacle(TWO, {}, [], 2000, "shop")


def holdings(hours: float, failed: bool = False) -> dict[str, Any]:
    return {"core": [{"repository": "host", "backups": [{"stopped": NOW - hours * 3600, "failed": failed}]}]}


def test_backups_must_be_there_and_young() -> None:
    assert delivery.backup_obstacle(holdings(3), NOW, 30) == ""
    assert "cluster core has no backup: make one: playbooks/backup.yml" in delivery.backup_obstacle(holdings(3, failed=True), NOW, 30)
    assert "is 31 hours old, more than 30" in delivery.backup_obstacle(holdings(31), NOW, 30)


def test_it_goes_back_to_what_ran_well_and_is_on_all_hosts() -> None:
    there = facts(a=("r2", ["r0", "r1", "r2"]), b=("r1", ["r1", "r2"]))
    assert delivery.release_before(there, "r1", "r2") == "r1"
    assert delivery.release_before(there, "r0", "r2") == "r1"  # r0 is not on b: what runs elsewhere stands in
    assert delivery.release_before(facts(a=("", ["r1"])), "", "r1") == ""
    # what all hosts ran a moment ago counts more than what the ledger has: it may have stayed for its migrations
    same = facts(a=("r1", ["r0", "r1", "r2"]), b=("r1", ["r0", "r1", "r2"]))
    assert delivery.release_before(same, "r0", "r2") == "r1"
    assert delivery.release_before(same, "r0", "r1") == "r0"
    assert delivery.releases_kept_on_all(there) == ["r1", "r2"]


def test_a_mixed_platform_runs_what_was_not_finished() -> None:
    assert delivery.release_current(facts(a=("r2", []), b=("r1", []), c=("r1", [])), "r1") == "r2"
    assert delivery.release_current(TWO, "r1") == "r1"
    assert delivery.release_current(facts(a=("", [])), "") == ""


KEPT = facts(a=("1.1-bbbbbbbbbbbb", ["1.0-aaaaaaaaaaaa", "1.1-bbbbbbbbbbbb"]))


@pytest.mark.parametrize(
    ("wanted", "commit", "chosen", "words"),
    [
        ("", "", "1.0-aaaaaaaaaaaa", ""),
        ("1.0-aaaaaaaaaaaa", "", "1.0-aaaaaaaaaaaa", ""),
        ("aaaaaaa", "", "1.0-aaaaaaaaaaaa", ""),
        ("v1.0", "a" * 40, "1.0-aaaaaaaaaaaa", ""),
        ("1.0", "", "1.0-aaaaaaaaaaaa", ""),
        ("v9", "", "", "'v9' names 0 releases: on all hosts are 1.0-aaaaaaaaaaaa and 1.1-bbbbbbbbbbbb"),
        ("1.1-bbbbbbbbbbbb", "", "1.1-bbbbbbbbbbbb", ""),  # to end what was interrupted
    ],
)
def test_a_rollback_finds_its_release(wanted: str, commit: str, chosen: str, words: str) -> None:
    found = delivery.rollback_target(KEPT, wanted, commit, "1.0-aaaaaaaaaaaa", [])
    assert (found["id"], found["problem"]) == (chosen, words)


def test_a_rollback_never_goes_to_a_bad_release_and_says_when_none_is_known() -> None:
    bad = delivery.rollback_target(KEPT, "aaaaaaa", "", "", ["1.0-aaaaaaaaaaaa"])
    assert "is marked bad" in bad["problem"]
    assert "no earlier release that ran well is known" in delivery.rollback_target(KEPT, "", "", "", [])["problem"]


HOW = {
    "problems": [], "not_back": [], "begun": True, "migrated": False, "back": False, "heads": {}, "stays": [],
    "began": NOW, "noticed": NOW + 40, "back_at": NOW + 61, "now": NOW + 65,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "succeeded"),
        ({"problems": ["x"], "begun": False}, "refused"),
        ({"problems": ["x"], "begun": False, "migrated": True}, "failed"),
        ({"problems": ["x"], "back": True}, "rolled back"),
        ({"problems": ["x"], "back": True, "not_back": ["y"]}, "failed"),
        ({"problems": ["x"]}, "failed"),
    ],
)
def test_what_the_ledger_keeps_of_a_deploy(changes: dict[str, Any], outcome: str) -> None:
    entry = delivery.delivery_entry("deploy", "r2", "r1", {**HOW, **changes})
    assert entry["outcome"] == outcome
    assert entry["seconds"] == 65
    assert ("back_seconds" in entry) == ("back" in changes)
    words = delivery.deploy_farewell(entry, "inventories/x", ["a", "b"])
    assert ("x" in words) and ("r2" in words)


def test_the_way_back_is_told_in_seconds() -> None:
    entry = delivery.delivery_entry("deploy", "r2", "r1", {**HOW, "problems": ["login answered 500"], "back": True})
    assert entry["back_seconds"] == 21
    assert "Every host is back on release r1 after 21 s" in delivery.deploy_farewell(entry, "i", ["a"])


def test_lost_hosts_are_those_that_said_nothing() -> None:
    assert delivery.lost_hosts(["a", "b", "c"], ["", "switching", "switching"], ["", "", "why"]) == ["b was lost while switching"]


CONTRACT: dict[str, Any] = {
    "secrets": {"TOKEN": "s3cret"},
    "processes": {
        "web": {"kind": "web", "members": ["a"], "path": "/", "port": 8000},
        "api": {"kind": "web", "members": ["a"], "path": "/api/", "port": 8001},
        "worker": {"kind": "worker", "members": ["a", "b"], "path": None, "port": None},
    },
    "checks": [
        {"name": "ready", "path": "/ready", "method": "GET", "status": 200, "contains": []},
        {"name": "api", "path": "/api/x", "method": "GET", "status": 200, "contains": []},
        {"name": "ping", "path": "/ping", "method": "POST", "status": 200, "contains": [], "bearer": "TOKEN"},
    ],
}


def test_a_host_is_asked_only_what_reads_and_what_its_process_serves() -> None:
    asked = delivery.contract_host_checks(CONTRACT, "a", {"a": "10.0.0.1"})
    assert asked["url"] == "http://10.0.0.1:8000"
    assert [check["name"] for check in asked["checks"]] == ["ready"]
    assert delivery.contract_host_checks(CONTRACT, "b", {"b": "10.0.0.2"})["checks"] == []


def test_tokens_are_put_in_from_the_secrets() -> None:
    assert [check.get("token") for check in delivery.contract_checks(CONTRACT)] == [None, None, "s3cret"]
    assert "bearer" not in delivery.contract_checks(CONTRACT)[2]


def test_too_many_failures_are_a_rate_and_not_one_request() -> None:
    assert delivery.watch_problem({"requests": 10, "failures": 4, "seen": []}, 2) == ""
    assert delivery.watch_problem({"requests": 1000, "failures": 20, "seen": []}, 2) == ""
    problem = delivery.watch_problem({"requests": 900, "failures": 30, "seen": ["GET /login answered 500, 30 times"]}, 2)
    assert "30 of 900 requests failed" in problem and "GET /login answered 500, 30 times" in problem


def test_restore_points_are_named_where_the_application_has_a_database() -> None:
    clusters = {"core": {"port": 5432, "members": [{"name": "a"}, {"name": "b"}]}, "plugins": {"port": 5433, "members": [{"name": "c"}]}}
    assert [place["host"] for place in delivery.restore_point_places(clusters, {"core": {}})] == ["a", "b"]


def test_a_failure_has_its_own_words() -> None:
    assert delivery.failure_words({"stderr": "no such table", "msg": "non-zero return code"}, "Plan", "a") == "Plan on a: no such table"
    assert delivery.failure_words({"msg": "refused"}, "Choose", "localhost") == "Choose: refused"
    looped = {"msg": "One or more items failed", "results": [{"failed": True, "msg": "this"}, {"failed": False, "msg": "that"}]}
    assert delivery.failure_words(looped, "Ask", "a") == "Ask on a: this"


def test_a_host_without_a_release_among_others_is_named() -> None:
    there = {**TWO, "b": {**TWO["b"], "current": "", "kept": []}}
    assert "b has no release, while a has one: run playbooks/replace_host.yml -e host=b" in delivery.deploy_obstacle(
        there, {}, [], 30, "shop"
    )
    assert delivery.deploy_obstacle(there, {}, [], 30, "shop", delivered=False) == "", "a first deploy that ended midway is repeated"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        (["web-1", "web-2", "work-1", "work-2"], ["web-1", "work-1"]),
        (["web-1", "web-2", "work-1"], ["web-1", "work-1"]),
        (["web-2", "work-2"], ["web-2", "work-2"]),  # of those that answer
        (["web-1", "web-2"], ["web-1"]),
        (["web-1"], ["web-1"]),
    ],
)
def test_each_half_of_a_rollback_has_its_part_of_those_that_serve_users(hosts: list[str], first: list[str]) -> None:
    processes = {
        "web": {"kind": "web", "members": ["web-1", "web-2"]},
        "work": {"kind": "worker", "members": ["web-1", "work-1", "work-2"]},
    }
    assert [host for host in hosts if delivery.rollback_turn({"processes": processes}, hosts, host) == 0] == first


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"begun": False, "migrated": True}, "The hosts still run r1"),
        ({"back": True, "not_back": ["b did not come back"]}, "rollback.yml -e release=r1"),
        ({}, "To go back: ansible-playbook -i inventories/x playbooks/rollback.yml -e release=r1"),
        ({"back": True, "noticed": 0}, "Every host is back on release r1, and answers as it should"),
    ],
)
def test_the_last_words_name_the_release_to_go_back_to(changes: dict[str, Any], words: str) -> None:
    entry = delivery.delivery_entry("deploy", "r2", "r1", {**HOW, "problems": ["x"], **changes})
    assert words in delivery.deploy_farewell(entry, "inventories/x", ["a", "b"])


def test_migrations_that_the_release_before_cannot_bear_are_why_the_hosts_stay() -> None:
    stays = [{"app": "shop", "name": "0002_drop", "why": "column note is gone"}]
    assert (
        "the release before cannot bear shop.0002_drop: column note is gone"
        in delivery.delivery_entry("deploy", "r2", "r1", {**HOW, "problems": ["x"], "stays": stays})["why"]
    )
    assert "cannot bear" not in delivery.delivery_entry("deploy", "r2", "r1", {**HOW, "stays": stays})["why"]


def test_a_rollback_without_a_host_says_what_is_left() -> None:
    entry = delivery.delivery_entry("rollback", "r1", "r2", HOW)
    assert "runs on a again" in delivery.rollback_farewell(entry, "i", ["a"], [])
    assert "b did not answer and was left as it was" in delivery.rollback_farewell(entry, "i", ["a"], ["b"])
    failed = delivery.delivery_entry("rollback", "r1", "r2", {**HOW, "problems": ["x"]})
    assert "playbooks/rollback.yml -e release=r1" in delivery.rollback_farewell(failed, "i", ["a"], [])
    assert "The ledger does not have this: disk full" in delivery.unrecorded("disk full", "i")
    assert delivery.unrecorded("", "i") == ""

"""The status screen of a platform of thirteen hosts: well, failing over, torn apart; and what the hosts are asked."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, load

from filter_plugins.status import WIDTH, patroni_addresses, status_report
from filter_plugins.topology import topology

module = load(ROOT / "library" / "platform_state.py", "evenkeel_platform_state")

NAMES = ["pg-core-1", "pg-core-2", "pg-plugins-1", "pg-plugins-2", "redis-1", "redis-2", "ops-1"]
NAMES += ["web-1", "web-2", "worker-1", "worker-2", "proxy-1", "proxy-2"]
ADDRESSES = {name: f"10.0.0.{number}" for number, name in enumerate(NAMES, 11)}
DOOR = "10.0.0.10"
GROUPS = {
    "all": NAMES,
    "postgresql_core": ["pg-core-1", "pg-core-2"],
    "postgresql_plugins": ["pg-plugins-1", "pg-plugins-2"],
    "etcd": ["redis-1", "redis-2", "ops-1"],
    "redis": ["redis-1", "redis-2", "ops-1"],
    "object_storage": ["ops-1"],
    "backup": ["ops-1"],
    "web": ["web-1", "web-2"],
    "worker": ["worker-1", "worker-2"],
    "proxy": ["proxy-1", "proxy-2"],
}
CARRIERS = ["web-1", "web-2", "worker-1", "worker-2"]
OFF = {"unreachable": True, "msg": "Failed to connect to the host via ssh: Connection timed out"}


def leader(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "role": "leader", "state": "running", "timeline": 3, **more}


def standby(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "role": "sync_standby", "state": "streaming", "timeline": 3, "lag": 0, **more}


def primary_says(view: list[dict[str, Any]]) -> dict[str, Any]:
    return {"own": {"role": "primary", "state": "running", "timeline": 3}, "cluster": {"members": view}}


def standby_says(view: list[dict[str, Any]]) -> dict[str, Any]:
    return {"own": {"role": "replica", "state": "running", "replication_state": "streaming", "timeline": 3}, "cluster": {"members": view}}


def platform() -> dict[str, Any]:
    """What the hosts of a platform say that is well."""
    answers: dict[str, Any] = {}
    for name in NAMES:
        health = [{"name": "main", "unit": "main.service", "status": "healthy", "since": 1.0, "message": "m"}]
        answers[name] = {"changed": False, "state": {"health": health, "failures": {}, "patroni": {}}}
    for cluster in ("core", "plugins"):
        view = [leader(f"pg-{cluster}-1"), standby(f"pg-{cluster}-2")]
        answers[f"pg-{cluster}-1"]["state"]["patroni"] = {cluster: primary_says(view)}
        answers[f"pg-{cluster}-2"]["state"]["patroni"] = {cluster: standby_says(view)}
    for name in GROUPS["etcd"]:
        answers[name]["state"] |= {"etcd": {"leader": name == "ops-1", "has_leader": True}, "sentinel": {"master": "redis-1"}}
        answers[name]["state"]["redis"] = {"role": "replica", "master": "redis-1", "link": "connected", "offset": 900}
    replicas = [{"name": "redis-2", "offset": 1000}, {"name": "ops-1", "offset": 1000}]
    answers["redis-1"]["state"]["redis"] = {"role": "master", "offset": 1000, "replicas": replicas}
    for name in CARRIERS:
        answers[name]["state"]["release"] = "1.0-abc"
    for name in GROUPS["proxy"]:
        answers[name]["state"] |= {"addresses": [ADDRESSES[name]], "drained": [], "page": {}}
    answers["proxy-1"]["state"]["addresses"].append(DOOR)
    return answers


def report(answers: dict[str, Any]) -> tuple[list[str], str]:
    said = status_report(answers, topology(GROUPS, ADDRESSES, None, DOOR), CARRIERS, "platform x")
    text = said["text"]
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all("; next: " in problem for problem in said["problems"])
    return said["problems"], text


def test_a_healthy_platform_fits_one_screen() -> None:
    problems, text = report(platform())
    assert problems == []
    assert text.splitlines()[0] == "all is well: 13 hosts, 13 services, release 1.0-abc"
    for line in (
        "core        primary   pg-core-1     timeline 3",
        "            standby   pg-core-2     synchronous, streaming, lag 0 B",
        "etcd        leader    ops-1         3/3 voters: redis-1 redis-2 ops-1",
        "redis       master    redis-1       Sentinels 3/3 agree",
        "            replica   redis-2       connected to redis-1, lag 0 B",
        "proxy       address   proxy-1       10.0.0.10; standing by: proxy-2",
        "  ok  web-1          10.0.0.18        1/1",
    ):
        assert line in text.splitlines()
    assert len(text.splitlines()) <= 30


def test_a_host_that_is_down_is_named_and_the_rest_is_shown() -> None:
    answers = platform()
    answers["pg-core-1"] = OFF
    answers["pg-core-2"]["state"]["patroni"]["core"] = primary_says([leader("pg-core-2", timeline=4)]) | {
        "own": {"role": "primary", "state": "running", "timeline": 4}
    }
    problems, text = report(answers)
    assert text.splitlines()[0] == "NOT WELL: 2 problems, listed below"
    assert "core        primary   pg-core-2     timeline 4" in text
    assert "            !!        pg-core-1     its host does not answer" in text
    assert "  --  pg-core-1      10.0.0.11        DOES NOT ANSWER: Connection timed out" in text
    assert problems[0].endswith("ansible-playbook playbooks/replace_host.yml -e host=pg-core-1")
    assert problems[1].startswith("cluster core stands on pg-core-2 alone")


def test_a_failover_under_way_says_that_it_takes_a_moment() -> None:
    answers = platform()
    answers["pg-core-1"] = OFF
    answers["pg-core-2"]["state"]["patroni"]["core"] = standby_says([standby("pg-core-2", state="running", lag="unknown")])
    problems, text = report(answers)
    assert text.startswith("DANGER: cluster core has no primary: nothing can be written")
    assert "NO PRIMARY" in text
    assert "half a minute" in problems[0]
    assert "cluster plugins" not in "".join(problems)


def test_two_primaries_are_loud_and_the_one_to_stop_is_named() -> None:
    answers = platform()
    view = [leader("pg-core-2"), standby("pg-core-1", role="replica")]
    answers["pg-core-1"]["state"]["patroni"]["core"] = primary_says([])
    answers["pg-core-2"]["state"]["patroni"]["core"] = primary_says(view)
    problems, text = report(answers)
    assert text.startswith("DANGER: cluster core has TWO PRIMARIES: pg-core-1 and pg-core-2")
    assert "core        PRIMARY   pg-core-1" in text
    assert "core        PRIMARY   pg-core-2" in text
    assert problems[0].endswith("etcd names pg-core-2; on pg-core-1: systemctl stop patroni@core")


def test_a_lost_quorum_is_told_with_what_still_works() -> None:
    answers = platform()
    answers["redis-1"] = answers["redis-2"] = OFF
    answers["ops-1"]["state"]["etcd"] = {"leader": False, "has_leader": False}
    for name in GROUPS["postgresql_core"]:
        answers[name]["state"]["patroni"]["core"]["cluster"] = {"error": "etcd is not available"}
    problems, text = report(answers)
    assert "NO QUORUM" in text
    assert "etcd has no quorum: PostgreSQL goes on as it is" in problems[0]
    assert "until 2 of 3 run" in problems[0]
    assert "core        primary   pg-core-1     timeline 3, by its own word: etcd does not say" in text
    assert "            standby   pg-core-2     asynchronous, streaming, lag unknown" in text
    assert "NO MASTER" in text


def test_one_voter_lost_is_a_problem_but_no_danger() -> None:
    answers = platform()
    answers["redis-2"]["state"] |= {"etcd": {"error": "Connection refused"}, "sentinel": {"error": "Connection refused"}}
    problems, text = report(answers)
    assert "2/3 voters: redis-1 ops-1" in text
    assert "Sentinels 2/3 agree" in text
    assert [problem.partition(";")[0] for problem in problems] == [
        "voter redis-2 is lost to etcd: Connection refused",
        "Sentinel on redis-2 is of no help: Connection refused",
    ]
    assert text.startswith("NOT WELL: 2 problems")


def test_two_masters_and_a_sentinel_that_disagrees() -> None:
    answers = platform()
    answers["redis-2"]["state"]["redis"] = {"role": "master", "offset": 1200, "replicas": []}
    answers["redis-2"]["state"]["sentinel"] = {"master": "redis-2"}
    problems, _ = report(answers)
    assert "Redis has TWO MASTERS: redis-1 and redis-2; the Sentinels name redis-1" in problems[0]
    assert "on redis-2: systemctl restart" in problems[0]
    assert "Sentinel on redis-2 is of no help: it names redis-2, the others redis-1" in problems[1]


@pytest.mark.parametrize(
    ("holders", "words"),
    [([], "no proxy holds 10.0.0.10"), (["proxy-1", "proxy-2"], "proxy-1 and proxy-2 both hold 10.0.0.10")],
)
def test_one_proxy_holds_the_address(holders: list[str], words: str) -> None:
    answers = platform()
    for name in GROUPS["proxy"]:
        answers[name]["state"]["addresses"] = [ADDRESSES[name]] + ([DOOR] if name in holders else [])
    problems, text = report(answers)
    assert words in problems[0]
    assert text.startswith("DANGER")


def test_drained_hosts_are_shown_and_a_proxy_that_missed_it_is_named() -> None:
    answers = platform()
    entry = {"host": "web-1", "reason": "kernel update", "by": "anna", "since": "2026-11-22T03:30:04Z"}
    for name in GROUPS["proxy"]:
        answers[name]["state"]["drained"] = [entry]
    problems, text = report(answers)
    assert problems == []
    assert "drained               web-1         kernel update (anna, 2026-11-22T03:30:04Z)" in text
    answers["proxy-2"]["state"]["drained"] = []
    problems, _ = report(answers)
    assert problems[0].startswith("web-1 is drained at proxy-1, but not at proxy-2; next: on all of them evenkeel-drain in web-1")


def test_a_maintenance_page_that_is_on_is_the_first_line_and_a_proxy_that_missed_it_is_named() -> None:
    answers = platform()
    for name in GROUPS["proxy"]:
        answers[name]["state"]["page"] = {"reason": "new hall", "by": "anna", "since": "2026-11-22T03:30:04Z"}
    (problem,), text = report(answers)
    assert text.startswith("MAINTENANCE PAGE IS ON: new hall (anna, 2026-11-22T03:30:04Z)")
    assert problem.endswith("next: when the work is done: playbooks/maintenance.yml -e page=off")
    answers["proxy-2"]["state"]["page"] = {}
    (problem,), _ = report(answers)
    assert problem.startswith("users get the maintenance page at proxy-1, but not at proxy-2")
    answers["proxy-1"]["state"]["page"] = {"error": "no answer"}
    (problem,), _ = report(answers)
    assert problem.startswith("whether proxy-1 shows the maintenance page is unknown: no answer")


def test_everything_else_that_is_not_well_is_a_problem() -> None:
    answers = platform()
    bad = {"name": "latex", "unit": "l.service", "status": "unhealthy", "since": 1.0, "message": "no answer " * 30}
    answers["worker-1"]["state"]["health"] += [bad, {**bad, "name": "export", "unit": "e.service"}]
    answers["worker-2"]["state"]["failures"] = {"x.service": "2026 x.service has failed: y. Next: journalctl -u x.service -n 50"}
    answers["web-1"]["state"]["release"] = "0.9-old"
    answers["web-2"]["state"]["release"] = {"error": "FileNotFoundError"}
    answers["proxy-1"]["state"]["health"] = {"error": "evenkeel-health: No such file or directory"}
    answers["pg-core-2"]["state"]["patroni"]["core"]["own"]["replication_state"] = "stopped"
    view = answers["pg-plugins-1"]["state"]["patroni"]["plugins"]["cluster"]
    view["pause"] = True
    problems, text = report(answers)
    assert [problem.partition("; next: ")[0] for problem in problems] == [
        "no release on web-2",
        "hosts carry different releases",
        "standby pg-core-2 of cluster core does not follow: it is stopped",
        "cluster core stands on pg-core-1 alone: no synchronous standby",
        "the failover of cluster plugins is paused",
        "latex and export on worker-1 are not healthy",
        "x.service on worker-2 has failed",
        "the health of proxy-1 is unknown: evenkeel-health: No such file or directory",
    ]
    assert "on worker-1: journalctl -u l.service -u e.service -n 50" in problems[5]
    assert problems[6].endswith("on worker-2: journalctl -u x.service -n 50")
    assert "  !!  worker-1       10.0.0.20        1/3" in text


def timer_row(name: str, **more: Any) -> dict[str, Any]:
    row = {"name": name, "unit": "", "timers": [f"{name}.timer"], "status": "healthy", "since": 1.0, "message": "active"}
    return {**row, **more}


def test_a_timer_whose_last_run_failed_is_a_problem_that_says_what_to_type() -> None:
    answers = platform()
    said = "the last run of prune.service failed (exit-code, exit status 1). Next: journalctl -u prune.service -n 50; then this"
    answers["web-1"]["state"]["health"] += [timer_row("prune", status="unhealthy", message=said), timer_row("other")]
    problems, text = report(answers)
    assert problems == [
        "prune on web-1 is unhealthy: the last run of prune.service failed (exit-code, exit status 1); "
        "next: on web-1: journalctl -u prune.service -n 50; then this"
    ]
    assert "  !!  web-1          10.0.0.18        2/3" in text
    note = "2026 prune.service has failed (exit-code): no space. Next: journalctl -u prune.service -n 50"
    answers["web-1"]["state"]["failures"] = {"prune.service": note}
    problems, text = report(answers)
    assert problems == ["prune.service on web-1 has failed; next: on web-1: journalctl -u prune.service -n 50"], "told once"
    assert "no space" in text


def test_restarts_by_policy_are_seen_and_only_those_that_did_not_help_are_a_problem() -> None:
    answers = platform()
    [row] = answers["web-1"]["state"]["health"]
    row["restarts"] = [1000.0, 2000.0]
    problems, text = report(answers)
    assert problems == []
    assert "main: was unhealthy and restarted 2 times within a day" in text
    row |= {"status": "unhealthy", "message": "no answer"}
    told = "2026 main.service is unhealthy and left alone after 3 restarts within 1 h: no answer. Next: journalctl -u main.service"
    answers["web-1"]["state"]["failures"] = {"main.service": told}
    problems, _ = report(answers)
    assert problems == ["main.service on web-1 is unhealthy and given up; next: on web-1: journalctl -u main.service"]


def test_a_platform_of_one_host_needs_no_words_about_pairs() -> None:
    answers = platform()
    state = copy.deepcopy(answers["redis-1"]["state"])
    state |= copy.deepcopy(answers["proxy-1"]["state"]) | {"release": "1.0-abc"}
    state["patroni"] = {cluster: primary_says([leader("one")]) for cluster in ("core", "plugins")}
    state |= {"etcd": {"leader": True, "has_leader": True}, "redis": {"role": "master", "offset": 5, "replicas": []}}
    groups = {name: ["one"] for name in GROUPS}
    said = status_report({"one": {"state": state}}, topology(groups, {"one": "10.0.0.1"}), ["one"], "t")
    assert said["problems"] == []
    assert said["text"].startswith("all is well: 1 host, 1 service, release 1.0-abc")
    assert "Sentinel" not in said["text"]
    assert len(said["text"].splitlines()) < 12


def test_each_member_is_asked_at_its_own_address() -> None:
    places = topology(GROUPS, ADDRESSES, None, DOOR)
    assert patroni_addresses(places, "pg-plugins-2") == {"plugins": "10.0.0.14:8009"}
    assert patroni_addresses(places, "web-1") == {}


def test_the_metrics_of_a_voter_and_the_roles_of_redis_are_understood() -> None:
    metrics = '# HELP x\netcd_server_has_leader 1\netcd_server_is_leader 0\netcd_other{a="b c"} 3\n'
    assert module.etcd_state(metrics) == {"leader": False, "has_leader": True}
    with pytest.raises(module.Unanswered, match="do not say"):
        module.etcd_state("")
    assert module.redis_state(["master", 118, [["redis-2", "6379", "110"]]]) == {
        "role": "master",
        "offset": 118,
        "replicas": [{"name": "redis-2", "offset": 110}],
    }
    assert module.redis_state(["slave", "redis-1", 6379, "sync", -1])["link"] == "sync"


def test_a_part_that_does_not_answer_is_told_and_the_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(argv: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        if argv[0] == "evenkeel-health":
            return subprocess.CompletedProcess(argv, 1, json.dumps([{"name": "web"}]), "")
        assert "secret" not in " ".join(argv)
        if "26379" in argv:
            raise subprocess.TimeoutExpired(argv, 4)
        assert how["env"]["REDISCLI_AUTH"] == "secret"
        return subprocess.CompletedProcess(argv, 0, 'error:"NOPERM no"', "")

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(module, "FAILURES", tmp_path / "failures")
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "a.service").write_text("it has failed\n")
    (tmp_path / "failures" / ".b.new").write_text("half")
    (tmp_path / "current").symlink_to("releases/1.0-abc")
    asked = {"current": str(tmp_path / "current"), "ca_file": "/ca", "etcd_metrics_port": None, "patroni": {}, "proxy": False}
    asked |= {"redis": "h:6379", "redis_password": "secret", "sentinel": "h:26379", "sentinel_password": "x", "timeout_seconds": 4}
    assert module.read(asked) == {
        "health": [{"name": "web"}],
        "failures": {"a.service": "it has failed"},
        "release": "1.0-abc",
        "redis": {"error": 'error:"NOPERM no"'},
        "sentinel": {"error": "no answer within 4 s"},
        "patroni": {},
    }

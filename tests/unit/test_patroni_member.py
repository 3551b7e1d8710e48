"""Who of a cluster may restart and hand over, and what keeps a cluster from being whole."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.module_utils import evenkeel_patroni as patroni
from conftest import ROOT, load

module = load(ROOT / "roles/postgresql/library/patroni_member.py")
PAIR = ["pg1", "pg2"]
LOWERED = {"max_connections": {"old_value": "100", "new_value": "80"}}
STREAMS = {"application_name": "pg2", "state": "streaming", "sync_state": "sync"}


def answer(
    one: str = "running", two: str = "streaming", role: str = "sync_standby", paused: bool = False, lowered: bool = False
) -> dict[str, Any]:
    """What Patroni says about a pair; `two` is empty when it is not there."""
    first: dict[str, Any] = {"name": "pg1", "role": "leader", "state": one, "api_url": "https://pg1:8008/patroni"}
    if lowered:
        first |= {"pending_restart": True, "pending_restart_reason": LOWERED}
    second = [{"name": "pg2", "role": role, "state": two, "api_url": "https://pg2:8008/patroni"}] if two else []
    return {"scope": "core", "members": [first, *second], **({"pause": True} if paused else {})}


@pytest.mark.parametrize(
    ("given", "replication", "missing"),
    [
        (answer(), [STREAMS], []),
        (answer(two=""), [], ["pg2 is not there"]),
        (answer(two="stopped"), [], ["pg2 is stopped"]),
        (answer(two="running"), [], ["pg2 is running"]),
        (answer(one="starting"), [STREAMS], ["its primary pg1 is starting"]),
        # etcd still says that it streams
        (answer(), [], ["pg2 does not stream from pg1"]),
        (answer(), [{**STREAMS, "state": "catchup"}], ["pg2 does not stream from pg1"]),
        # it streams, and may not be promoted yet
        (answer(role="replica"), [{**STREAMS, "sync_state": "async"}], ["no standby is synchronous yet"]),
        (answer(role="replica"), [STREAMS], ["no standby is synchronous yet"]),
        (answer(), [{**STREAMS, "sync_state": "async"}], ["no standby is synchronous yet"]),
    ],
)
def test_whole(given: dict[str, Any], replication: Sequence[dict[str, Any]], missing: list[str]) -> None:
    assert patroni.shortcomings(patroni.parse_cluster(given), PAIR, replication, synchronous=True) == missing


def test_whole_without_a_primary_says_what_each_does() -> None:
    nobody = patroni.parse_cluster({"members": [{"name": "pg1", "role": "replica", "state": "running"}]})
    assert patroni.shortcomings(nobody, PAIR, [], synchronous=True) == ["it has no primary (pg1 is running, pg2 is not there)"]


def test_one_member_is_whole_when_it_runs() -> None:
    assert patroni.shortcomings(patroni.parse_cluster(answer(two="")), ["pg1"], [], synchronous=True) == []


def test_an_asynchronous_pair_is_whole_without_a_synchronous_standby() -> None:
    cluster = patroni.parse_cluster(answer(role="replica"))
    assert patroni.shortcomings(cluster, PAIR, [{**STREAMS, "sync_state": "async"}], synchronous=False) == []


def test_what_waits_for_a_restart() -> None:
    assert patroni.pending_of({}) == []
    assert patroni.pending_of({"pending_restart": True}) == ["some settings"]
    assert patroni.pending_of({"pending_restart": True, "pending_restart_reason": LOWERED}) == ["max_connections"]


@pytest.mark.parametrize(
    ("name", "old", "new", "lowered"),
    [
        ("max_connections", "100", "80", True),
        ("max_connections", "80", "100", False),
        ("max_worker_processes", "9", "10", False),  # as numbers, not as text
        ("shared_buffers", "256MB", "128MB", False),
        ("max_connections", "100", "?", False),
    ],
)
def test_lowered(name: str, old: str, new: str, lowered: bool) -> None:
    reason = {name: {"old_value": old, "new_value": new}}
    assert bool(patroni.lowered_of({"pending_restart": True, "pending_restart_reason": reason})) is lowered


def test_wait_for_counts_silence_as_missing_and_ends() -> None:
    def silent() -> list[str]:
        raise OSError("refused")

    assert patroni.wait_for(0, silent) == ["Patroni gives no answer (refused)"]
    assert patroni.wait_for(60, list) == []


# The module against a pair that obeys


class Pair:
    """Two members, as their REST APIs and systemd show them; keeps what was done to whom."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pending: Sequence[str] = (), **given: Any) -> None:
        self.given = answer(**given)
        self.pending: dict[str, dict[str, Any]] = {name: LOWERED if given.get("lowered") else {"shared_buffers": {}} for name in pending}
        self.did: list[str] = []
        self.warnings: list[str] = []
        monkeypatch.setattr(module, "Rest", lambda api: SimpleNamespace(url=api["url"], ask=self.ask, order=self.order))
        monkeypatch.setattr(module.subprocess, "run", self.systemctl)
        monkeypatch.setattr(module, "SUCCESSOR_SECONDS", 0)
        self.name = ""

    def ask(self, path: str, url: str = "") -> dict[str, Any]:
        if path == "/cluster":
            return self.given
        name = url.removeprefix("https://").removesuffix(":8008") or self.name
        reasons = self.pending.get(name)
        leads = [each["name"] for each in self.given["members"] if each["role"] == "leader"] == [name]
        others = [each for each in self.given["members"] if each["role"] != "leader"]
        streams = [{**STREAMS, "application_name": each["name"]} for each in others if each["state"] == "streaming"]
        said = {"pending_restart": True, "pending_restart_reason": reasons} if reasons else {}
        return {**said, **({"replication": streams} if leads else {})}

    def order(self, method: str, path: str, body: dict[str, Any], url: str = "", seconds: float = 10) -> None:
        if path == "/switchover":
            self.did.append(f"{body['leader']} hands over to {body['candidate']}")
            first, second = self.given["members"]
            first["role"], second["role"] = second["role"], first["role"]
            first["state"], second["state"] = second["state"], first["state"]
        else:
            self.did.append(f"{url} restarts in place")
            leader = next(each for each in self.given["members"] if each["role"] == "leader")
            leader.pop("pending_restart")
            self.pending.pop(leader["name"], None)

    def systemctl(self, command: list[str], **options: Any) -> SimpleNamespace:
        self.did.append(f"{self.name}: {command[0]} {command[2]} {command[-1]}")
        self.pending.pop(self.name, None)
        return SimpleNamespace(returncode=0, stderr="")

    def run(self, name: str, action: str, **given: Any) -> dict[str, Any]:
        self.name = name
        params = {
            "action": action, "phase": "rest", "due": False, "api": {"url": f"https://{name}:8008"}, "name": name, "members": PAIR,
            "unit": "patroni@core.service", "synchronous": True, "timeout_seconds": 0, **given,
        }  # fmt: skip
        host = SimpleNamespace(params=params, check_mode=given.get("check", False), warn=self.warnings.append)
        result: dict[str, Any] = module.work(host)
        return result


def both_phases(pair: Pair, due: bool = False) -> None:
    """As the role does it: the next phase begins when all members have been through the first."""
    done = {name: pair.run(name, "restart_if_needed", phase="standbys", due=due)["restarted"] for name in PAIR}
    for name in PAIR:
        if not done[name]:
            pair.run(name, "restart_if_needed", due=due)


def test_standby_first_then_the_primary_as_a_standby(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch)
    both_phases(pair, due=True)
    restart = "systemctl restart patroni@core.service"
    assert pair.did == [f"pg2: {restart}", "pg1 hands over to pg2", f"pg1: {restart}"]


def test_nothing_is_done_where_nothing_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch)
    both_phases(pair)
    assert pair.did == []


def test_only_the_member_whose_settings_wait_is_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch, pending=["pg2"])
    both_phases(pair)
    assert pair.did == ["pg2: systemctl restart patroni@core.service"]


def test_a_lowered_setting_goes_to_the_primary_first_and_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch, pending=PAIR, lowered=True)
    both_phases(pair)
    assert pair.did == ["https://pg1:8008 restarts in place", "pg2: systemctl restart patroni@core.service"]
    assert pair.pending == {}


def test_a_paused_cluster_is_left_alone_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch, paused=True, pending=PAIR, lowered=True)
    both_phases(pair, due=True)
    assert pair.did == []
    assert len(pair.warnings) == 3
    assert "patronictl resume core" in pair.warnings[0]
    with pytest.raises(patroni.ClusterError, match="is paused"):
        pair.run("pg2", "restart")


def test_check_mode_does_nothing_and_says_what_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch)
    assert pair.run("pg2", "restart_if_needed", phase="standbys", due=True, check=True)["changed"]
    assert pair.run("pg1", "restart", check=True)["changed"]
    assert pair.run("pg1", "step_down", check=True)["changed"]
    assert not pair.run("pg2", "step_down", check=True)["changed"]
    assert pair.did == []


@pytest.mark.parametrize("action", ["step_down", "restart"])
def test_the_primary_stays_when_nobody_can_take_over(monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    for given in ({"two": ""}, {"two": "stopped"}, {"role": "replica"}):
        pair = Pair(monkeypatch, **given)
        with pytest.raises(patroni.ClusterError, match="pg1 is the primary of cluster core, and no synchronous standby can take over"):
            pair.run("pg1", action)
        assert pair.did == []


def test_a_standby_stays_when_the_primary_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch, one="starting")
    with pytest.raises(patroni.ClusterError, match="pg2 was not restarted, because others are missing: its primary pg1 is starting"):
        pair.run("pg2", "restart")
    assert pair.did == []


def test_a_cluster_of_one_restarts_in_place_and_never_steps_down(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch, two="")
    assert not pair.run("pg1", "step_down", members=["pg1"])["changed"]
    assert pair.run("pg1", "restart_if_needed", members=["pg1"], due=True)["restarted"]
    assert pair.did == ["pg1: systemctl restart patroni@core.service"]


def test_waiting_for_a_whole_cluster_ends_and_names_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch, two="stopped")
    with pytest.raises(patroni.ClusterError, match=r"the cluster of pg1, pg2 was not whole after 0 s: pg2 is stopped"):
        pair.run("pg1", "wait_redundant")
    assert not Pair(monkeypatch).run("pg1", "wait_redundant")["changed"]

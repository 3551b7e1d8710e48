"""What a Redis node decides by what the others say: at its first start, and before planned work."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROLE = Path(__file__).resolve().parents[2] / "roles" / "redis"
MEMBERS = ["a", "b", "c"]


def load(path: Path, name: str) -> ModuleType:
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


module = load(ROLE / "library/redis_node.py", "redis_node")
program = load(ROLE / "files/redis-node", "redis_node_program")

# --- the first start -----------------------------------------------------------------------------------------------

NODE = {"name": "a", "members": MEMBERS, "port": 6379, "sentinel_port": 26379, "sentinel_password": "p", "ca_file": "/ca"}
REFUSED, SILENT = "refused", "silent"
EMPTY = ["role:slave"]
HOLDS = ["role:slave", "db0:keys=3,expires=0"]
MASTER = ["role:master", "db0:keys=3,expires=0"]


def answering(sentinels: dict[str, str], servers: dict[str, Any]) -> Callable[..., list[str]]:
    def ask(node: dict[str, Any], host: str, port: int, line: str) -> list[str]:
        said = sentinels.get(host, REFUSED) if port == 26379 else servers.get(host, REFUSED)
        if said == REFUSED:
            raise program.RefusedError(host)
        if said == SILENT:
            raise program.SilentError(host)
        return [said, "6379"] if isinstance(said, str) else list(said)

    return ask


@pytest.mark.parametrize(
    ("name", "sentinels", "servers", "followed"),
    [
        ("a", {}, {}, "a"),  # the founding: nothing runs anywhere
        ("b", {}, {}, "a"),
        ("a", {"b": "a", "c": "a"}, {"b": EMPTY, "c": EMPTY}, "a"),  # the founding, where the first comes last
        ("a", {"b": "c", "c": "c"}, {"b": HOLDS, "c": MASTER}, "c"),  # rebuilt after a failover
        ("a", {"b": SILENT, "c": "c"}, {}, "c"),
        ("a", {}, {"c": MASTER}, "c"),  # one that ran alone gets company
        ("b", {"a": "a"}, {"a": MASTER}, "a"),
    ],
)
def test_node_without_a_past_follows_whom_the_others_name(
    monkeypatch: pytest.MonkeyPatch, name: str, sentinels: dict[str, str], servers: dict[str, Any], followed: str
) -> None:
    monkeypatch.setattr(program, "ask_as_sentinel", answering(sentinels, servers))
    assert program.whom_to_follow({**NODE, "name": name}) == followed


@pytest.mark.parametrize(
    ("sentinels", "servers", "why"),
    [
        ({"b": "a", "c": "a"}, {"b": HOLDS, "c": HOLDS}, "b and c hold data"),  # rebuilt before the failover
        ({"b": "a", "c": "a"}, {"b": HOLDS, "c": EMPTY}, "b hold data"),
        ({}, {"b": ["role:slave", "loading:1"]}, "b hold data"),
        ({"b": SILENT}, {}, "not everybody was heard"),  # b's host is off: it may be the master
        ({}, {"c": SILENT}, "not everybody was heard"),
    ],
)
def test_empty_node_never_becomes_a_master_whose_replicas_would_empty_themselves(
    monkeypatch: pytest.MonkeyPatch, sentinels: dict[str, str], servers: dict[str, Any], why: str
) -> None:
    monkeypatch.setattr(program, "ask_as_sentinel", answering(sentinels, servers))
    with pytest.raises(program.SilentError, match=why):
        program.whom_to_follow(NODE)


def test_sentinel_without_a_past_watches_what_others_or_else_its_node_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "ask_as_sentinel", answering({"b": "c"}, {"a": ["slave", "b"]}))
    assert program.whom_to_watch(NODE) == "c"
    monkeypatch.setattr(program, "ask_as_sentinel", answering({}, {"a": ["slave", "b", "6379"]}))
    assert program.whom_to_watch(NODE) == "b"
    monkeypatch.setattr(program, "ask_as_sentinel", answering({}, {"a": ["master", "0"]}))
    assert program.whom_to_watch(NODE) == "a"


# --- planned work --------------------------------------------------------------------------------------------------


def info_of_master(*replicas: str) -> dict[str, str]:
    lines = {f"slave{n}": f"ip={name},port=6379,state=online,offset=9,lag=0" for n, name in enumerate(replicas)}
    return {"role": "master", **lines}


def info_of_replica(master: str, link: str = "up") -> dict[str, str]:
    return {"role": "slave", "master_host": master, "master_link_status": link}


def sentinel_of(master: str, **changed: str) -> dict[str, str]:
    return {"ip": master, "flags": "master", "num-slaves": "2", "num-other-sentinels": "2", **changed}


def healthy() -> Any:
    seen = module.Seen()
    seen.servers = {"a": info_of_master("b", "c"), "b": info_of_replica("a"), "c": info_of_replica("a")}
    seen.sentinels = {member: sentinel_of("a") for member in MEMBERS}
    return seen


def test_nothing_is_missing_where_all_are_well() -> None:
    assert module.missing(healthy(), MEMBERS) == []
    assert healthy().master == "a"


def test_whoever_is_missing_is_named() -> None:
    seen = healthy()
    del seen.servers["c"]
    seen.silent["Redis on c"] = "Connection refused"
    assert module.missing(seen, MEMBERS) == ["Redis on c does not answer (Connection refused)"]

    seen = healthy()
    seen.servers["b"] = info_of_master()
    assert module.missing(seen, MEMBERS)[0] == "a and b both say that they are master"

    seen = healthy()
    seen.servers["b"] = info_of_replica("c")
    seen.servers["c"] = info_of_replica("a", "down")
    assert module.missing(seen, MEMBERS) == ["b follows c, not a", "c is not in sync with a"]

    seen = healthy()
    seen.servers["a"] = info_of_master("b")
    assert module.missing(seen, MEMBERS) == ["c is not in sync with a"]

    seen = healthy()
    seen.sentinels["c"] = sentinel_of("b")
    seen.sentinels["b"] = sentinel_of("a", flags="s_down,master")
    seen.sentinels["a"] = sentinel_of("a", **{"num-other-sentinels": "3"})
    assert module.missing(seen, MEMBERS) == [
        "Sentinel on a knows 3 other Sentinels instead of 2",
        "Sentinel on b says of the master: s_down,master",
        "Sentinel on c names b as master",
    ]

    seen = healthy()
    seen.servers["a"] = info_of_replica("b")
    assert "no member is master" in module.missing(seen, MEMBERS)


def test_member_about_to_be_restarted_need_not_be_well_but_the_others_must() -> None:
    seen = healthy()
    del seen.servers["b"]
    seen.silent["Redis on b"] = "Connection refused"
    seen.sentinels["a"] = sentinel_of("a", **{"num-slaves": "1"})
    assert module.missing(seen, MEMBERS, without="b") == []
    assert module.missing(seen, MEMBERS, without="c") == ["Redis on b does not answer (Connection refused)"]
    assert module.missing(healthy(), MEMBERS, without="a") == ["a is the master"]


def test_single_node_is_redundant_enough_when_it_is_master() -> None:
    seen = module.Seen(servers={"a": info_of_master()})
    assert module.missing(seen, ["a"]) == []
    assert module.missing(module.Seen(servers={"a": info_of_replica("b")}), ["a"]) == ["no member is master"]


def test_only_replicas_that_follow_closely_may_take_over() -> None:
    info = info_of_master("b", "c")
    info["slave1"] = "ip=c,port=6379,state=online,offset=9,lag=7"
    assert module.in_sync(info) == ["b"]
    info["slave0"] = "ip=b,port=6379,state=wait_bgsave,offset=9,lag=0"
    assert module.in_sync(info) == []


PARAMS = {"units": [module.SENTINEL, module.SERVER], "master": False, "timeout_seconds": 1}


@pytest.mark.parametrize(
    ("role", "master", "done", "left"),
    [
        ("slave", False, ["restart redis-sentinel.service", "restart redis-server.service"], []),
        ("master", False, ["restart redis-sentinel.service"], [module.SERVER]),
        ("master", True, ["restart redis-sentinel.service", "step down", "restart redis-server.service"], []),
        ("", False, ["restart redis-sentinel.service", "restart redis-server.service"], []),  # one that is down harms nobody
    ],
)
def test_replicas_restart_first_and_a_master_steps_down_before(
    monkeypatch: pytest.MonkeyPatch, role: str, master: bool, done: list[str], left: list[str]
) -> None:
    did: list[str] = []
    checks: list[str] = []
    monkeypatch.setattr(module, "own_role", lambda node: role)
    monkeypatch.setattr(module, "wait_redundant", lambda node, seconds, without="": checks.append(without))
    monkeypatch.setattr(module, "watches", lambda node: True)
    monkeypatch.setattr(module, "systemctl_restart", lambda unit: did.append(f"restart {unit}"))
    monkeypatch.setattr(module, "step_down", lambda node: did.append("step down") or 0.9)
    node = module.Node(**NODE)
    predicted = module.restart(node, {**PARAMS, "master": master}, check_mode=True)
    assert did == []
    result = module.restart(node, {**PARAMS, "master": master}, check_mode=False)
    assert did == done
    assert result["left"] == predicted["left"] == left
    assert result["changed"] is predicted["changed"] is True
    if left:
        assert checks == []  # the Sentinel alone: the others watch on meanwhile
    else:
        assert checks[0] == ("" if role == "master" else "a")  # before: everybody else is well
        assert checks[-1] == ""  # after: everybody is


def test_nothing_is_asked_of_a_master_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "own_role", lambda node: "master")
    monkeypatch.setattr(module, "wait_redundant", lambda *_, **__: pytest.fail("asked"))
    assert module.restart(module.Node(**NODE), {**PARAMS, "units": [module.SERVER]}, check_mode=False) == {
        "changed": False,
        "left": [module.SERVER],
    }


def test_single_node_restarts_in_place_and_has_no_sentinel(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []
    monkeypatch.setattr(module, "own_role", lambda node: "master")
    monkeypatch.setattr(module, "wait_redundant", lambda node, seconds: did.append("look"))
    monkeypatch.setattr(module, "systemctl_restart", lambda unit: did.append(unit))
    alone = module.Node(**{**NODE, "members": ["a"]})
    assert module.restart(alone, PARAMS, check_mode=False) == {"changed": True, "left": []}
    assert did == [module.SERVER, "look"]

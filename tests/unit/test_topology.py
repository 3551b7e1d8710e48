"""Who is where, and what an inventory that cannot work is told."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from programs import ROOT, load

from filter_plugins import topology as t

health = load(ROOT / "roles/healthcheck/files/health.py", "evk_topology_health")
health_filter = load(ROOT / "filter_plugins/health.py", "evk_topology_health_filter")
SERVICES = ["etcd", "postgresql_core", "postgresql_plugins", "redis", "object_storage", "web", "worker", "proxy", "backup"]


def groups(**changes: list[str]) -> dict[str, list[str]]:
    return {"all": ["a", "b"], **{name: ["a"] for name in SERVICES}, **changes}


ADDRESSES = {"a": "10.0.0.1", "b": "10.0.0.2"}
APP: dict[str, Any] = {
    "name": "shop",
    "databases": {"core": {"name": "shop", "owner": "shop"}},
    "processes": {
        "web": {"hosts": "web", "port": 8000, "members": ["a"], "after": ["redis", "postgresql-core"]},
        "worker": {"hosts": "worker", "members": ["b"], "after": ["redis"]},
    },
}


def test_members_and_ports() -> None:
    topo = t.topology(groups(web=["a", "b"]), ADDRESSES, {"redis": 7000})
    assert topo["web"]["members"] == [{"name": "a", "address": "10.0.0.1"}, {"name": "b", "address": "10.0.0.2"}]
    assert topo["redis"]["port"] == 7000
    assert topo["postgresql"]["plugins"]["port"] == 5433


def test_object_storage_may_be_elsewhere() -> None:
    assert t.topology(groups(object_storage=[]), ADDRESSES)["object_storage"]["members"] == []


@pytest.mark.parametrize(
    ("given", "addresses", "ports", "words"),
    [
        (groups(redis=[]), ADDRESSES, {}, "inventory group 'redis' (the message broker) has no host"),
        (groups(), {"a": "10.0.0.1", "b": ""}, {}, "host 'b' has no address"),
        (groups(), {"a": "10.0.0.1", "b": "10.0.0.1"}, {}, "hosts 'a' and 'b' have the same address 10.0.0.1"),
        (groups(), ADDRESSES, {"rediss": 1}, "platform_ports names unknown services: rediss"),
    ],
)
def test_wrong_inventories_are_told_in_one_sentence(
    given: dict[str, list[str]], addresses: dict[str, str], ports: dict[str, int], words: str
) -> None:
    with pytest.raises(AnsibleFilterError, match=words.replace("(", r"\(").replace(")", r"\)")):
        t.topology(given, addresses, ports)
    assert words in t.problem_of(t.topology)(given, addresses, ports)
    assert t.problem_of(t.topology)(groups(), ADDRESSES, {}) == ""


def test_endpoints_are_complete_and_conflicts_named() -> None:
    topo = t.topology(groups(), ADDRESSES)
    table = t.endpoints(topo, APP, groups())
    assert {"host": "a", "service": "shop-web", "port": 8000} in table
    assert {"host": "a", "service": "postgresql-plugins", "port": 5433} in table
    with pytest.raises(AnsibleFilterError, match="redis and postgresql-core both want TCP port 5432"):
        t.endpoints(t.topology(groups(), ADDRESSES, {"redis": 5432}), APP, groups())
    # the same port on two hosts is no conflict
    assert t.endpoints(t.topology(groups(redis=["b"]), ADDRESSES, {"redis": 5432}), APP, groups(redis=["b"]))


def test_url_names_every_member_and_holds_no_password() -> None:
    service = {"members": [{"name": "a"}, {"name": "b"}], "port": 5432}
    url = t.libpq_url(service, "u", "d", "/ca.crt")
    address, _, options = url.partition("?")
    assert address == "postgresql://u@a:5432,b:5432/d"
    given = dict(option.split("=") for option in options.split("&"))
    assert given["target_session_attrs"] == "read-write"
    assert (given["sslmode"], given["sslrootcert"]) == ("verify-full", "/ca.crt")
    # libpq alone would wait for minutes for a host that has gone
    assert (given["connect_timeout"], given["tcp_user_timeout"], given["keepalives_idle"]) == ("2", "3000", "5")


def test_empty_secrets() -> None:
    assert t.empty_secrets({"a": "x", "b": "", "c": None, "d": " "}) == ["b", "c", "d"]


def test_health_rows_of_a_host_and_of_what_it_waits_for_elsewhere() -> None:
    topo = t.topology(groups(worker=["b"]), ADDRESSES)
    here = {row["name"]: row for row in t.platform_health_services(topo, "a", APP, "/pki")}
    assert {name for name, row in here.items() if row["kind"] != "timer"} == {*topo["services"], "backup-repository", "backup-agent"}
    assert not any(row.get("remote") for row in here.values())
    assert here["postgresql-core"]["command"][-4:] == ["-U", "shop", "-d", "shop"]
    assert "-e" in here["redis"]["command"], "without -e redis-cli calls a refused PING a success"
    there = t.platform_health_services(topo, "b", APP, "/pki")
    assert [(row["name"], row["remote"]) for row in there] == [("redis", True)]
    assert "10.0.0.1" in there[0]["command"]
    assert "alternatives" not in there[0]


def test_nothing_of_the_platform_is_restarted_for_its_health_a_database_least_of_all() -> None:
    rows = t.platform_health_services(t.topology(groups(), ADDRESSES), "a", APP, "/pki", "10.0.0.9")
    assert not [row["name"] for row in rows if "restart" in row]
    assert all(row["protocol"] for row in rows if row["kind"] != "timer")


def test_what_the_clock_starts_is_watched_where_it_runs() -> None:
    topo = t.topology(groups(backup=["b"]), ADDRESSES)
    rows = {host: t.platform_health_services(topo, host, APP, "/pki") for host in "ab"}
    timers = {host: {row["name"]: row["timers"] for row in rows[host] if row["kind"] == "timer"} for host in "ab"}
    assert timers["a"] == {
        **{f"archive-{cluster}": [f"archive-watch@{cluster}.timer"] for cluster in t.CLUSTERS},
        **{f"pg-maintenance-{c}": [f"pg-maintenance-{action}@{c}.timer" for action in ("vacuum", "reindex")] for c in t.CLUSTERS},
    }
    assert timers["b"] == {
        **{f"backup-{cluster}": [f"backup-{kind}@{cluster}.timer" for kind in ("full", "diff", "incr")] for cluster in t.CLUSTERS},
        **{f"restore-drill-{cluster}": [f"restore-drill@{cluster}.timer"] for cluster in t.CLUSTERS},
    }


def test_a_second_repository_host_is_refused() -> None:
    assert "leave one" in t.problem_of(t.topology)(groups(backup=["a", "b"]), ADDRESSES)


def test_any_member_may_answer_for_a_service_elsewhere_but_only_the_one_that_takes_writes() -> None:
    addresses = {name: f"10.0.0.{number}" for number, name in enumerate("abcd", 1)}
    hosts = {"all": list("abcd"), **{name: ["a"] for name in SERVICES}, "redis": ["a", "b", "c"], "postgresql_core": ["a", "b"]}
    topo = t.topology(hosts, addresses)
    waits = {"worker": {"hosts": "worker", "members": ["d"], "after": ["redis", "postgresql-core", "postgresql-plugins"]}}
    there = {row["name"]: row for row in t.platform_health_services(topo, "d", {**APP, "processes": waits}, "/pki")}
    assert there["postgresql-core"]["url"] == "https://10.0.0.1:8008/primary"
    assert there["postgresql-core"]["alternatives"] == [{"url": "https://10.0.0.2:8008/primary"}]
    assert "alternatives" not in there["postgresql-plugins"]
    redis = there["redis"]
    commands = [redis["command"], *[other["command"] for other in redis["alternatives"]]]
    assert [command[command.index("-h") + 1] for command in commands] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    # as CSV, so that a replica of a host called "master" is not taken for one
    assert all(command[-2:] == ["--csv", "ROLE"] for command in commands)
    assert (redis["expected"], redis["packages"]) == ('"master",', ["redis-tools"])
    rows = health_filter.health_table([{**row, "interval_seconds": 1} for row in there.values()], {})
    for row in rows:
        health.Service(**row)


def test_a_row_of_a_host_is_about_its_own_member() -> None:
    addresses = {name: f"10.0.0.{number}" for number, name in enumerate("abc", 1)}
    hosts = {
        "all": list("abc"),
        **{name: ["a"] for name in SERVICES},
        "redis": list("abc"),
        "postgresql_core": ["a", "b"],
        "proxy": ["a", "b"],
    }
    topo = t.topology(hosts, addresses, front_door="10.0.0.9")
    here = {row["name"]: row for row in t.platform_health_services(topo, "b", APP, "/pki", "10.0.0.9")}
    assert {"postgresql-core", "redis", "redis-sentinel", "proxy", "keepalived"} <= set(here)
    assert not any(row.get("alternatives") or row.get("packages") for name, row in here.items() if not row.get("remote"))
    assert here["postgresql-core"]["command"][0].endswith("/pg_isready"), "a standby is healthy when it accepts connections"
    assert here["redis-sentinel"]["command"][here["redis-sentinel"]["command"].index("-p") + 1] == "26379"
    assert here["keepalived"]["url"] == "https://10.0.0.9:443/nginx-health", "the address answers, wherever it is"
    in_front = {row["name"] for row in t.platform_health_services(topo, "b", APP, "/pki", "")}
    assert "keepalived" not in in_front, "a load balancer in front has the address"


@pytest.mark.parametrize("group", ["etcd", "redis"])
def test_voters_without_a_majority_are_refused(group: str) -> None:
    hosts = {"all": list("abcd"), **{name: ["a"] for name in SERVICES}}
    addresses = {name: f"10.0.0.{number}" for number, name in enumerate("abcd", 1)}
    for count in (1, 3):
        t.topology({**hosts, group: list("abcd")[:count]}, addresses)
    for count in (2, 4):
        with pytest.raises(AnsibleFilterError, match=f"'{group}' has {count} hosts.*no safer than {count - 1}"):
            t.topology({**hosts, group: list("abcd")[:count]}, addresses)


def test_two_proxies_need_an_address_of_their_own() -> None:
    two = groups(proxy=["a", "b"])
    with pytest.raises(AnsibleFilterError, match="platform_address is not set"):
        t.topology(two, ADDRESSES)
    with pytest.raises(AnsibleFilterError, match="is the address of host 'b'"):
        t.topology(two, ADDRESSES, front_door="10.0.0.2")
    assert t.topology(two, ADDRESSES, front_door="10.0.0.9")["platform"] == {"name": "platform", "address": "10.0.0.9"}
    assert t.topology(groups(), ADDRESSES)["platform"]["address"] == "10.0.0.1"


def test_redis_url_names_the_sentinels_where_there_are_several() -> None:
    one = {"members": [{"name": "a"}], "port": 6379, "sentinel_port": 26379}
    assert t.redis_url(one, "shop") == "rediss://shop@a:6379/0"
    three = {**one, "members": [{"name": name} for name in "abc"]}
    assert t.redis_url(three, "shop", 1) == "rediss+sentinel://shop@a:26379,b:26379,c:26379/main/1"


def test_object_storage_that_is_not_ours_is_asked_at_its_own_address() -> None:
    app = {**APP, "processes": {"web": {**APP["processes"]["web"], "after": ["object-storage"]}}}
    topo = t.topology(groups(object_storage=[]), ADDRESSES, s3_url="https://s3.example.org")
    rows = {row["name"]: row for row in t.platform_health_services(topo, "a", app, "/pki")}
    assert rows["object-storage"]["command"][-1] == rows["object-storage"]["endpoint"] == "https://s3.example.org"
    assert rows["object-storage"]["remote"] is True

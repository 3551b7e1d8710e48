"""What is refused about the hosts themselves: unreachable, one machine twice, clocks apart; and what is not."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import ROOT, load

from filter_plugins.preflight import hosts_problem

identity = load(ROOT / "action_plugins" / "host_identity.py")
GROUPS = {"all": ["db-1", "db-2", "web-1"], "postgresql_core": ["db-1", "db-2"], "web": ["web-1"]}
OFF = {"unreachable": True, "msg": "Failed to connect to the host via ssh: ssh: connect to host\n 10.0.0.9 port 22: timed out"}


def host(name: str, offset: float = 0.0, error: float = 0.1, **more: str) -> dict[str, Any]:
    ids = {"machine_id": f"m-{name}", "boot_id": f"b-{name}", **more}
    return {"clock_offset_seconds": offset, "clock_error_seconds": error, **ids}


def problem(*offsets: float, error: float = 0.1, **answers: dict[str, Any]) -> str:
    hosts = {name: host(name, offset, error) for name, offset in zip(GROUPS["all"], offsets, strict=False)}
    return hosts_problem({**hosts, **{name.replace("_", "-"): answer for name, answer in answers.items()}}, GROUPS, 5)


@pytest.mark.parametrize("offsets", [(0, 0, 0), (0, 4.9, 0), (-2.4, 2.4, 0), (3, 3, 3)])
def test_hosts_of_one_time_are_well(offsets: tuple[float, ...]) -> None:
    assert problem(*offsets) == ""


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ((0, 0, 30), "web-1 is 30 s ahead of the others"),
        ((100, 100, 70), "web-1 is 30 s behind the others"),
        ((-4, 4, 0), "db-2 is 8 s ahead of db-1"),
        ((-30, -30.5, -29), "web-1 is 29 s behind this machine's, and so are all others"),
        ((0, 3600), "db-2 is 3600 s ahead of the others"),
        ((60,), "db-1 is 60 s ahead of this machine's;"),
    ],
)
def test_clocks_apart_are_told_with_the_one_that_is_wrong(offsets: tuple[float, ...], words: str) -> None:
    assert words in problem(*offsets)
    assert "timedatectl" in problem(*offsets)


def test_a_slow_answer_is_no_proof() -> None:
    assert problem(0, 0, 8, error=3.1) == ""
    assert "web-1 is 12 s ahead of" in problem(0, 0, 12, error=3.1)


def test_hosts_that_do_not_answer_are_named_with_the_way_to_leave_them_out() -> None:
    said = problem(0, 0, web_1=OFF)
    assert said.startswith("web-1 cannot be asked (web-1: ssh: connect to host 10.0.0.9 port 22: timed out)")
    assert said.endswith("only site.yml can go on without it: --limit 'all,!web-1'")
    assert "\n" not in said
    assert "db-2 and web-1 cannot be asked" in problem(0, db_2=OFF, web_1=OFF)


def test_one_machine_under_two_names_is_refused_and_a_clone_is_not() -> None:
    assert "db-1 and web-1 are one machine under two names" in problem(0, 0, web_1=host("x", machine_id="m-db-1", boot_id="b-db-1"))
    assert problem(0, 0, web_1=host("x", machine_id="m-db-1")) == ""


def test_a_pair_in_containers_of_one_machine_is_refused_and_strangers_are_not() -> None:
    assert "db-1 and db-2 of group postgresql_core run on one kernel" in problem(0, db_2=host("x", boot_id="b-db-1"))
    assert problem(0, 0, web_1=host("x", boot_id="b-db-1")) == ""


def test_what_is_certain_of_a_clock_is_computed_from_the_round_trip() -> None:
    assert identity.identity("110.5\nmachine\nboot\n", 100.0, 101.0) == {
        "clock_offset_seconds": 10.0,
        "clock_error_seconds": 0.5,
        "machine_id": "machine",
        "boot_id": "boot",
    }

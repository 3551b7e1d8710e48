"""Any one host may die: each fault under load, then what became of everything that was promised (D1, D2, Q8)."""

from __future__ import annotations

import re

import pytest
from load.faults import FAULTS, Fault
from load.places import CLUSTERS, Platform
from load.run import Run
from load.writing import TABLE

#: Machines are noisy: the promised times are published with the figures, and only what is hopeless fails.
INTERRUPTION_LIMIT_SECONDS = 60
UNTOUCHED_LIMIT_SECONDS = 10


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title.replace(" ", "-"))
def test_fault_costs_seconds_and_nothing_else(run: Run, fault: Fault) -> None:
    """It heals with no hand, loses no acknowledged commit, and whom it does not concern does not notice."""
    window = run.inflict(fault)
    assert window.commits["lost"] == 0, window
    assert window.commits["doubled"] == 0, window
    for name, seconds in window.interruption_seconds.items():
        if name in fault.interrupts:
            assert seconds < INTERRUPTION_LIMIT_SECONDS, window
        else:
            assert window.write_errors[name] == 0, window
            assert seconds < UNTOUCHED_LIMIT_SECONDS, window


def test_load_was_real(over: Run) -> None:
    """Figures of a load that stood still would say nothing."""
    for writer in over.writers:
        assert len(writer.times) > (over.ended - over.began) * 3, writer.name
    assert len(over.browsing.requests) > (over.ended - over.began) * 3
    assert over.outcome is not None
    assert over.outcome.accepted > (over.ended - over.began) / 60 * 5


def test_nothing_that_was_promised_is_lost_or_there_twice(over: Run) -> None:
    assert over.broken() == []


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_set_check_notices_a_lost_and_a_doubled_commit(over: Run, cluster: str) -> None:
    """A check that cannot fail proves nothing: one acknowledged row is removed from the real table, another is put in twice."""
    writer = over.clusters[cluster]
    lost, doubled = writer.acknowledged[len(writer.acknowledged) // 3], writer.acknowledged[-1]
    writer.ask(f"DELETE FROM {TABLE} WHERE number = %s", lost)
    writer.ask(f"INSERT INTO {TABLE} VALUES (%s)", doubled)
    found = writer.findings()
    assert (found.lost, found.doubled) == ([lost], [doubled])
    writer.ask(f"INSERT INTO {TABLE} VALUES (%s)", lost)
    writer.ask(f"DELETE FROM {TABLE} WHERE ctid = (SELECT max(ctid) FROM {TABLE} WHERE number = %s)", doubled)
    assert writer.findings().lost == writer.findings().doubled == []


@pytest.mark.usefixtures("over")
def test_site_changes_nothing_after_all_that_and_moves_no_leader(platform: Platform) -> None:
    """Whoever leads now is right: the inventory does not say who is primary."""
    leaders = platform.leaders()
    shown = platform.playbook("site")
    recap = shown.rpartition("PLAY RECAP")[2]
    assert sum(int(number) for number in re.findall(r"\bchanged=(\d+)", recap)) == 0, shown[-5000:]
    assert platform.leaders() == leaders


@pytest.mark.usefixtures("over")
def test_status_is_green_after_all_that(platform: Platform) -> None:
    assert "all is well" in platform.playbook("status")

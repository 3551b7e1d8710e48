"""The walls around every unit that the suite makes (exposure at most 2.0) or overrides (at most 4.0), and their bounds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import testinfra

sys.path.append(str(Path(__file__).resolve().parents[2]))

import exposure


@pytest.fixture(scope="module")
def units(host: testinfra.host.Host) -> list[exposure.Unit]:
    if not host.file("/run/converged").exists:
        pytest.skip("tested before the reboot")
    found = exposure.table(host.check_output)
    print(exposure.report(found))
    return found


def test_every_unit_is_walled_in(units: list[exposure.Unit]) -> None:
    assert {"nginx", "patroni@core", "drydock-web", "drydock-logs", "evenkeel-failure@test"} <= {unit.name for unit in units}
    assert {unit.name: unit.exposure for unit in units if unit.exposure > unit.limit} == {}


def test_every_unit_is_bounded(units: list[exposure.Unit]) -> None:
    """As set: a lab host shares its machine's kernel, where memory and tasks are not enforced."""
    assert {unit.name: unit.unbounded for unit in units if unit.unbounded} == {}


def test_no_process_leaves_its_memory_on_the_disk(host: testinfra.host.Host) -> None:
    """A core dump holds secrets."""
    limits = host.check_output("systemctl show --property=LimitCORE --value 'drydock-*.service' 'patroni@*' nginx redis-server").split()
    assert set(limits) == {"0"}

"""What only pairs have (keepalived, Sentinel, standbys) is walled in and bounded as on one host."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

import exposure
from load.places import Platform


@pytest.mark.parametrize("group", ["etcd", "core", "redis", "backup", "worker", "proxy"])
def test_every_unit_is_walled_in_and_bounded(platform: Platform, group: str) -> None:
    host = platform.hosts_of(group)[-1]
    units = exposure.table(lambda command: platform.ssh(host, command))
    print(host, exposure.report(units))
    assert units
    assert {unit.name: unit.exposure for unit in units if unit.exposure > unit.limit} == {}
    assert {unit.name: unit.unbounded for unit in units if unit.unbounded} == {}

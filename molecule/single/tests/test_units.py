"""The walls around every unit that the suite makes (exposure at most 2.0) or overrides (at most 4.0), and their bounds."""

from __future__ import annotations

import re

import pytest
import testinfra

OURS, OVERRIDDEN = 2.0, 4.0
FOLDER = "/etc/systemd/system"
# Bounds that the suite leaves out on purpose, with the reason beside the unit's other settings.
MEMORY_OPEN = {"etcd", "patroni@core", "patroni@plugins", "redis-server"}
# A service that the suite cannot wall in: it would no longer do what it is for.
SYSTEM_S_OWN = {"systemd-journald"}


def units(host: testinfra.host.Host) -> dict[str, float]:
    """Service -> limit, found from the files with the suite's header: unit files are its own, drop-ins override."""
    found: dict[str, float] = {}
    files = host.check_output(
        f"grep --recursive --files-with-matches --include=*.service --include=*.conf '^# Ansible managed' {FOLDER}"
    ).split()
    for file in files:
        relative = file.removeprefix(f"{FOLDER}/")
        name, _, drop_in = relative.partition(".service")
        limit = OVERRIDDEN if drop_in else OURS
        if name.endswith("@"):
            name += "test"  # an instance stands for all
        # a drop-in beside a unit file of the suite's own belongs to it
        own = f"{FOLDER}/{name}.service" in files or f"{FOLDER}/{name.partition('@')[0]}@.service" in files
        found[name] = OURS if own else limit
    return {name: limit for name, limit in found.items() if name not in SYSTEM_S_OWN}


def test_every_unit_is_walled_in(host: testinfra.host.Host) -> None:
    limits = units(host)
    assert len(limits) > 20, limits
    exposures: dict[str, float] = {}
    for name in limits:
        text = host.check_output(f"systemd-analyze security --no-pager {name}.service")
        exposure = re.search(r"exposure level for \S+: ([0-9.]+)", text)
        assert exposure, text[-500:]
        exposures[name] = float(exposure[1])
    print("\nexposure  limit  unit")
    for name, exposure_level in sorted(exposures.items()):
        print(f"{exposure_level:8}  {limits[name]:5}  {name}")
    assert {name: level for name, level in exposures.items() if level > limits[name]} == {}


@pytest.mark.parametrize(("setting", "open_to"), [("MemoryMax", MEMORY_OPEN), ("TasksMax", set())])
def test_every_unit_is_bounded(host: testinfra.host.Host, setting: str, open_to: set[str]) -> None:
    """As set: a lab host shares its machine's kernel, which does not enforce it there."""
    names = sorted(units(host))
    shown = host.check_output(
        f"systemctl show --property=Id --property={setting} --property=FragmentPath {' '.join(f'{n}.service' for n in names)}"
    )
    unbounded = set()
    for block in shown.split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines())
        default = setting == "TasksMax" and "TasksMax=" not in host.check_output(f"systemctl cat {values['Id']}")
        if values[setting] == "infinity" or default:
            unbounded.add(values["Id"].removesuffix(".service"))
    assert {name for name in unbounded if not name.endswith("@test")} <= open_to


def test_no_process_leaves_its_memory_on_the_disk(host: testinfra.host.Host) -> None:
    """A core dump holds secrets."""
    for block in host.check_output("systemctl show --property=Id --property=LimitCORE 'drydock-*.service'").split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines())
        assert values["LimitCORE"] == "0", values

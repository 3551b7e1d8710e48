"""How far every unit that the suite makes or overrides on a host is walled in and bounded, found from the host's own files."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

OURS, OVERRIDDEN = 2.0, 4.0
FOLDER = "/etc/systemd/system"
# Without a bound on memory on purpose; the reason stands in the unit.
MEMORY_OPEN = ("etcd", "patroni@", "redis-server")
SEPARATOR = "== "


@dataclass(frozen=True)
class Unit:
    """One service: its exposure, the highest that is allowed, and what it lacks of the bounds."""

    name: str
    exposure: float
    limit: float
    unbounded: tuple[str, ...]


def services(run: Callable[[str], str]) -> dict[str, float]:
    """Service -> highest exposure. A unit file with the suite's header is its own, a drop-in beside a package's overrides."""
    found = f"grep --recursive --files-with-matches --include=*.service --include=*.conf '^# Ansible managed' {FOLDER}"
    files = [file.removeprefix(f"{FOLDER}/") for file in run(found).split() if ".service" in file]
    own = {file.removesuffix(".service") for file in files if file.endswith(".service")}
    limits = {}
    for name in {file.partition(".service")[0] for file in files}:
        template = name.partition("@")[0] + "@" if "@" in name else name
        limits[f"{name}test" if name.endswith("@") else name] = OURS if {name, template} & own else OVERRIDDEN
    return limits


def table(run: Callable[[str], str]) -> list[Unit]:
    """All of them, in one call to the host."""
    limits = services(run)
    names = " ".join(f"{name}.service" for name in sorted(limits))
    said = run(
        f"for unit in {names}; do echo '{SEPARATOR}'$unit; systemd-analyze security --no-pager $unit | tail -1;"
        " systemctl cat $unit | grep -E '^(MemoryMax|TasksMax)=' || true; done"
    )
    rows = []
    for block in said.split(SEPARATOR)[1:]:
        name = block.split()[0].removesuffix(".service")
        exposure = re.search(r"exposure level for \S+: ([0-9.]+)", block)
        assert exposure, block
        wanted = ["TasksMax"] if name.startswith(MEMORY_OPEN) else ["MemoryMax", "TasksMax"]
        unbounded = tuple(bound for bound in wanted if not re.search(rf"^{bound}=(?!infinity)\S", block, re.MULTILINE))
        rows.append(Unit(name, float(exposure[1]), limits[name], unbounded))
    return rows


def report(units: list[Unit]) -> str:
    """For people."""
    lines = [
        f"{unit.exposure:8}  {unit.limit:5}  {unit.name}  {'without ' + ', '.join(unit.unbounded) if unit.unbounded else ''}"
        for unit in units
    ]
    return "\n".join(["", "exposure  limit  unit", *lines])

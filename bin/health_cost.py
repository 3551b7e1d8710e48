#!/usr/bin/env python3
"""What the health checks of this host cost, in seconds of processor time an hour: `bin/bench health` runs this on every host.

The daemons and the programs that they start are counted from /proc. With --whole also what their questions cost in the services that
answer: the processor time of the whole host, in turns with the daemons running and stopped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from pathlib import Path

HZ = os.sysconf("SC_CLK_TCK")
DAEMONS = "evenkeel-health*.service"


def used(pid: str) -> tuple[float, float]:
    """Seconds that a process has used itself, and those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, children_user, children_system = (int(field) / HZ for field in fields[11:15])
    return user + system, children_user + children_system


def whole() -> float:
    """Seconds that all processes have used so far, the ended ones too."""
    total = 0.0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                total += sum(used(entry.name))
            except OSError:
                continue  # it has just ended; its parent has its seconds
    return total


def systemctl(*words: str) -> str:
    return subprocess.run(["systemctl", *words], capture_output=True, text=True, check=True).stdout


def daemons() -> dict[str, str]:
    """Unit to its main process."""
    shown = systemctl("show", "--property=Id,MainPID,ActiveState", DAEMONS)
    blocks = [dict(line.split("=", 1) for line in block.splitlines()) for block in shown.strip().split("\n\n")]
    return {block["Id"]: block["MainPID"] for block in blocks if block.get("MainPID", "0") != "0"}


def line(what: str, share: float) -> None:
    print(f"{what:<48} {share * 3600:6.1f} s an hour  {share * 100:5.2f} % of a core", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("seconds", type=float, nargs="?", default=300.0, help="how long to count; default 300")
    options.add_argument("--whole", action="store_true", help="stop and start the daemons in turns, three times each")
    given = options.parse_args()
    found = daemons()
    before, start = {unit: used(pid) for unit, pid in found.items()}, time.monotonic()
    time.sleep(given.seconds)
    after, elapsed = {unit: used(pid) for unit, pid in found.items()}, time.monotonic() - start
    total = 0.0
    for unit in found:
        own, children = ((now - then) / elapsed for now, then in zip(after[unit], before[unit], strict=True))
        line(f"{unit}: itself", own)
        line(f"{unit}: the programs it starts", children)
        total += own + children
    line("together", total)
    if not given.whole:
        return
    shares: dict[bool, list[float]] = {True: [], False: []}
    try:
        for turn in range(6):
            running = turn % 2 == 0
            systemctl("start" if running else "stop", *found)
            time.sleep(15)
            then, start = whole(), time.monotonic()
            time.sleep(given.seconds / 3)
            shares[running].append((whole() - then) / (time.monotonic() - start))
    finally:
        systemctl("start", *found)
    with_checks, without = (sorted(shares[running])[1] for running in (True, False))
    line("the whole host, medians: with checks", with_checks)
    line("the whole host, medians: without", without)
    line("so all that checks cause, in the services too", with_checks - without)


if __name__ == "__main__":
    main()

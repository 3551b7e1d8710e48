"""Deliver to a platform again and again while people use it: so many deploys and rollbacks in turn, then what users met.

Called by `bin/deliveries`. Prints a line for each delivery, and writes `deliveries/<inventory>.json` in the state folder after each, so
that what was seen is not lost when the series is cut off; report.py makes a page of these files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "pairs"))
sys.path.append(str(Path(__file__).resolve().parent))

import suite
from load.jobs import Outcome
from load.places import Platform
from load.run import commit, processor
from users import Load, users

WSGI = "drydock/src/drydock/wsgi.py"


def releases(folder: Path, inventory: Path, times: int) -> list[str]:
    """The releases of `times` commits one after the other, with nothing to migrate between them."""
    text = (suite.ROOT / WSGI).read_text()
    return [suite.build_release(folder, inventory, **{WSGI: f"{text}\n# delivery {number}\n"}) for number in range(times)]


def delivered(kind: str, *arguments: str, inventory: Path) -> float:
    """Run a playbook; seconds. Ends the program when it fails, with its last words."""
    began = time.monotonic()
    run = suite.playbook(kind, *arguments, inventory=inventory, timeout=1800)
    if run.code:
        sys.exit(f"{kind} {' '.join(arguments)} failed:\n{run.output[-6000:]}")
    return time.monotonic() - began


def report(load: Load, seconds: dict[str, list[float]], lasted: float, outcome: Outcome | None) -> dict[str, Any]:
    """What users met so far; `jobs` is null until it is known what became of all that were accepted."""
    times = [each.seconds for each in list(load.browsing.requests)]
    return {
        "seconds": seconds,
        "lasted_seconds": lasted,
        "requests": len(times),
        "requests_per_second": len(times) / lasted,
        "requests_failed": len(load.failures()),
        "asked_again": len(load.browsing.asked_again),
        "failures": sorted(set(load.failures())),
        "p50_seconds": statistics.median(times),
        "p99_seconds": statistics.quantiles(times, n=100)[98],
        "longest_seconds": max(times),
        "jobs": asdict(outcome) if outcome else None,
    }


def main() -> int:
    """Parse the command line, deliver, report."""
    parser = argparse.ArgumentParser(prog="bin/deliveries", description=__doc__)
    parser.add_argument("inventory", type=Path, help="of a platform on lab hosts that runs")
    parser.add_argument("--times", type=int, default=20, help="deploys, and as many rollbacks (%(default)s)")
    parser.add_argument("--requests", type=float, default=52, help="pages a second (%(default)s)")
    parser.add_argument("--jobs", type=float, default=6, help="documents and exports a minute (%(default)s)")
    chosen = parser.parse_args()
    inventory = chosen.inventory.resolve()
    platform = Platform.of(inventory)
    path = suite.STATE / "deliveries" / f"{platform.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "inventory": platform.name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {"cores": os.cpu_count(), "processor": processor(), "hosts": len(platform.topology["addresses"])},
        "jobs_per_minute": chosen.jobs,
    }
    seconds: dict[str, list[float]] = {"deploy": [], "rollback": []}
    with tempfile.TemporaryDirectory() as folder:
        # no release is deployed twice: each deploy copies, unpacks and installs
        built = releases(Path(folder), inventory, chosen.times)
        try:
            with users(platform, chosen.requests, chosen.jobs, people=int(chosen.jobs // 5) + 1) as load:
                began = time.monotonic()
                for number, release in enumerate(built, 1):
                    for kind, words in (("deploy", ("-e", f"release={release}")), ("rollback", ())):
                        seconds[kind].append(delivered(kind, *words, inventory=inventory))
                        found = about | report(load, seconds, time.monotonic() - began, None)
                        path.write_text(json.dumps(found, indent=2) + "\n")
                        took = f"{kind} {number} of {chosen.times}: {seconds[kind][-1]:.0f} s"
                        asked = f"{found['requests']} requests ({found['requests_per_second']:.0f}/s), {found['requests_failed']} failed"
                        longest = f"{found['asked_again']} asked again, longest {found['longest_seconds']:.1f} s"
                        print(f"{took}; so far {asked}, {longest}; {len(load.jobs.accepted())} jobs accepted", flush=True)
                lasted = time.monotonic() - began
                outcome = load.over()
        finally:
            for release in built:
                suite.remove_release(release)
    found = about | report(load, seconds, lasted, outcome)
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    well = not found["requests_failed"] and outcome.done == outcome.accepted and not (outcome.lost or outcome.wrong or outcome.refused)
    print("nothing was lost, no request failed" if well else "NOT WELL: see above", "-", path)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

"""Deliver to a platform again and again while people use it: so many deploys and rollbacks in turn, then what users met.

Called by `bin/deliveries`. Writes `deliveries/<inventory>.json` in the state folder, and prints a line for each delivery.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "pairs"))
sys.path.append(str(Path(__file__).resolve().parent))

import suite
from load.places import Platform
from users import users

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


def main() -> int:
    """Parse the command line, deliver, report."""
    parser = argparse.ArgumentParser(prog="bin/deliveries", description=__doc__)
    parser.add_argument("inventory", type=Path, help="of a platform on lab hosts that runs")
    parser.add_argument("--times", type=int, default=20, help="deploys, and as many rollbacks (%(default)s)")
    parser.add_argument("--requests", type=float, default=55, help="pages a second (%(default)s)")
    parser.add_argument("--jobs", type=float, default=6, help="documents and exports a minute (%(default)s)")
    chosen = parser.parse_args()
    inventory = chosen.inventory.resolve()
    platform = Platform.of(inventory)
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
                        asked, failed, jobs = len(load.browsing.requests), len(load.failures()), len(load.jobs.accepted())
                        rate = asked / (time.monotonic() - began)
                        took = f"{kind} {number} of {chosen.times}: {seconds[kind][-1]:.0f} s"
                        print(f"{took}; so far {asked} requests ({rate:.0f}/s), {failed} failed; {jobs} jobs accepted", flush=True)
                lasted = time.monotonic() - began
                outcome = load.over()
        finally:
            for release in built:
                suite.remove_release(release)
    failures = load.failures()
    times = [each.seconds for each in load.browsing.requests]
    report = {
        "inventory": platform.name,
        "deploys": len(seconds["deploy"]),
        "rollbacks": len(seconds["rollback"]),
        "deploy_seconds": statistics.median(seconds["deploy"]),
        "rollback_seconds": statistics.median(seconds["rollback"]),
        "requests": len(times),
        "requests_per_second": len(times) / lasted,
        "requests_failed": len(failures),
        "failures": sorted(set(failures)),
        "p50_seconds": statistics.median(times),
        "p99_seconds": statistics.quantiles(times, n=100)[98],
        "longest_seconds": max(times),
        "jobs": asdict(outcome),
    }
    path = suite.STATE / "deliveries" / f"{platform.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    well = not failures and outcome.done == outcome.accepted and not (outcome.lost or outcome.wrong or outcome.refused)
    print("nothing was lost, no request failed" if well else "NOT WELL: see above", "-", path)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

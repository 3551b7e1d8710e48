"""`python -m proof`: the whole proof on this machine; the figures as a table, and as JSON in the file that is named."""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from proof import harness
from proof.faults import ProofServers


def main() -> int:
    """Run the proof; 1 when a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m proof", description=__doc__)
    parser.add_argument("--jobs", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1, help="decides the order of the faults and their victims")
    parser.add_argument("--per-second", type=float, default=0, help="accept so many jobs at most (default: no limit)")
    parser.add_argument("--json", type=Path, help="write the report here, too")
    chosen = parser.parse_args()
    servers = ProofServers()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or its servers would stay
    try:
        servers.start_all()
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, "ledger.jsonl")
            report = harness.run(
                servers, harness.FULL, jobs=chosen.jobs, file=file, seed=chosen.seed, per_second=chosen.per_second
            )
    finally:
        servers.stop_all()
    sys.stdout.write(report.table() + "\n")
    if chosen.json:
        chosen.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    for promise in report.broken():
        sys.stdout.write(f"BROKEN: {promise}\n")
    sys.stdout.write("" if report.broken() else "0 lost, 0 duplicate effects.\n")
    return 1 if report.broken() else 0


if __name__ == "__main__":
    sys.exit(main())

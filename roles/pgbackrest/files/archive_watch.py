#!/usr/bin/python3 -IS
"""Say as metrics whether the WAL of a cluster is archived, and fail when it has waited for too long: archive_watch.py CLUSTER.

Only the primary archives. Elsewhere, and while the cluster is down, there is nothing to say: then the metrics go away.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SETTINGS = Path("/etc/evenkeel/backup-member.json")
METRICS = Path("/var/lib/evenkeel/metrics")
QUESTION = """
SELECT pg_is_in_recovery()::int, archived_count, failed_count, coalesce(extract(epoch FROM last_archived_time), 0),
  (SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'),
  (SELECT coalesce(extract(epoch FROM min(modification)), 0) FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready')
FROM pg_stat_archiver
"""


@dataclass(frozen=True)
class State:
    """What PostgreSQL says of its archiver."""

    standby: bool
    archived: int
    failed: int
    last: float
    ready: int
    oldest: float


def parse(text: str) -> State:
    """Read psql's answer."""
    standby, archived, failed, last, ready, oldest = text.strip().split("|")
    return State(standby == "1", int(archived), int(failed), float(last), int(ready), float(oldest))


def prometheus(cluster: str, state: State) -> str:
    """The metrics' text."""
    rows: Sequence[tuple[str, str, str, float]] = [
        ("last_archived_timestamp_seconds", "gauge", "When a segment of WAL was last archived; 0 when none was.", state.last),
        ("ready_segments", "gauge", "Segments that wait to be archived.", state.ready),
        ("oldest_ready_timestamp_seconds", "gauge", "Since when the oldest of them waits; 0 when none does.", state.oldest),
        ("segments_total", "counter", "Segments archived since the statistics began.", state.archived),
        ("failures_total", "counter", "Attempts that failed since then.", state.failed),
    ]
    lines = []
    for noun, kind, text, value in rows:
        name = f"evenkeel_archive_{noun}"
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f'{name}{{cluster="{cluster}"}} {value:.0f}']
    return "\n".join(lines) + "\n"


def complaint(cluster: str, state: State, now: float, patience: float) -> str:
    """What is wrong, in one line; empty when nothing is."""
    waited = now - state.oldest
    if not state.ready or waited <= patience:
        return ""
    return (
        f"{state.ready} segments of the WAL of cluster {cluster} wait for the archive, the oldest for {waited / 60:.0f} min: what is "
        "written now is in no repository. "
        f"Next: journalctl -u patroni@{cluster} -n 50; on the repository host: systemctl status backup-repository"
    )


def main() -> str:
    """Ask, write, judge."""
    cluster = sys.argv[1]
    settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
    file = METRICS / f"archive-{cluster}.prom"
    port = str(settings["clusters"][cluster]["port"])
    argv = [f"{settings['binaries']}/psql", "-XAtq", "-h", "/var/run/postgresql", "-p", port, "-U", "postgres", "-c", QUESTION, "postgres"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    except subprocess.TimeoutExpired:
        return f"cluster {cluster} gives no answer within 30 s. Next: journalctl -u patroni@{cluster} -n 50"
    state = parse(done.stdout) if done.returncode == 0 else None
    if state is None or state.standby:
        file.unlink(missing_ok=True)
        return ""
    new = METRICS / f".archive-{cluster}.new"
    new.write_text(prometheus(cluster, state), encoding="utf-8")
    new.chmod(0o644)
    new.replace(file)
    return complaint(cluster, state, time.time(), settings["stuck_seconds"])


if __name__ == "__main__":
    sys.exit(main() or 0)

"""`python -m proof.bench`: the job engine beside plain Celery, on the same Redis, with the same workers and work.

Both are asked from this process, in a burst from four threads: `engine.accept` in a transaction, and `delay()`. Rounds
alternate; medians count.

- burst: so many jobs at once; how many are accepted and done in a second, from the first acceptance on
- idle: one job after the other; how long from its acceptance to its start
"""

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from platform_servers import wait_for
from proof.faults import ProofServers
from proof.ledger import quantile

Ask = Callable[[], str]
THREADS = 4
ROWS = {
    "accepted per second": "{:.0f}",
    "done per second": "{:.0f}",
    "burst: accept to start, p50 (ms)": "{:.0f}",
    "burst: accept to start, p95 (ms)": "{:.0f}",
    "idle: accept to start, p50 (ms)": "{:.1f}",
    "idle: accept to start, p95 (ms)": "{:.1f}",
}


def ways() -> dict[str, Ask]:
    """Return how a job is asked for, in each way; the answer names the effect that it will have."""
    from proof import service, tasks

    def engine() -> str:
        return str(service.request(1, None).pk)

    def celery() -> str:
        name = str(uuid.uuid4())
        payload = {"request": name, "work_ms": service.random_work_ms(), "fails": False, "accepted": time.time()}
        tasks.plain.delay(payload)
        return name

    return {"engine": engine, "celery": celery}


def delays(names: list[str]) -> list[float]:
    """Return how long the jobs waited for their start, once all of them have had their effect."""
    from proof.models import Effect

    effects = Effect.objects.filter(request_id__in=names)
    wait_for("the end of the jobs", lambda: effects.count() == len(names), 300)
    return [1000 * float(delay) for delay in effects.values_list("delay_seconds", flat=True)]


def burst(ask: Ask, jobs: int) -> dict[str, float]:
    """Ask for many jobs at once."""
    from django.db import connections

    def close() -> None:
        all_of_them.wait(10)
        connections.close_all()

    all_of_them = threading.Barrier(THREADS)
    started = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        names = list(pool.map(lambda _: ask(), range(jobs)))
        accepted = time.monotonic()
        list(pool.map(lambda _: close(), range(THREADS)))
    waited = delays(names)
    done = time.monotonic()
    return {
        "accepted per second": jobs / (accepted - started),
        "done per second": jobs / (done - started),
        "burst: accept to start, p50 (ms)": quantile(waited, 0.5),
        "burst: accept to start, p95 (ms)": quantile(waited, 0.95),
    }


def idle(ask: Ask, jobs: int) -> dict[str, float]:
    """Ask for one job after the other."""
    waited = [delay for _ in range(jobs) for delay in delays([ask()])]
    return {
        "idle: accept to start, p50 (ms)": quantile(waited, 0.5),
        "idle: accept to start, p95 (ms)": quantile(waited, 0.95),
    }


def measure(rounds: int, jobs: int) -> dict[str, dict[str, float]]:
    """Measure all ways in turn, and return the median of each figure."""
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in ways()}
    for name, ask in ways().items():
        burst(ask, 20)  # connections, caches
        sys.stderr.write(f"{name} is warm\n")
    for number in range(rounds):
        for name, ask in ways().items():
            figures[name].append(burst(ask, jobs) | idle(ask, max(20, jobs // 10)))
        sys.stderr.write(f"round {number + 1} of {rounds} is done\n")
    return {
        name: {row: statistics.median(figure[row] for figure in found) for row in ROWS}
        for name, found in figures.items()
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """Return the figures for a person to read."""
    lines = [f"{'':<34}{'engine':>10}{'celery':>10}{'ratio':>8}"]
    for row, form in ROWS.items():
        engine, celery = found["engine"][row], found["celery"][row]
        lines.append(f"{row:<34}{form.format(engine):>10}{form.format(celery):>10}{engine / celery:>8.2f}")
    return "\n".join(lines)


def main() -> int:
    """Run the bench on servers of its own."""
    parser = argparse.ArgumentParser(prog="python -m proof.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=300, help="jobs in a burst")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    chosen = parser.parse_args()
    servers = ProofServers()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or its servers would stay
    try:
        servers.start_all()
        os.environ.update(servers.environment)
        import django

        django.setup()
        import drydock.celery  # noqa: F401 - makes it the current application

        load = os.getloadavg()[0]
        found = measure(chosen.rounds, chosen.jobs)
    finally:
        servers.stop_all()
    sys.stdout.write(f"{table(found)}\n")
    if chosen.json:
        machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "load_before": load}
        settings = {"rounds": chosen.rounds, "jobs": chosen.jobs, "workers": len(servers.workers)}
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({"machine": machine, **settings, "medians": found}, indent=2) + "\n")
        sys.stdout.write(f"written to {chosen.json}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

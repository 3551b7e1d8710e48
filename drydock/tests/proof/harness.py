"""Accept jobs under load while everything around them fails, then ask what became of them."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from platform_servers import wait_for
from proof import ledger
from proof.faults import Faults, ProofServers
from proof.ledger import Acceptance, Findings, Ledger, quantile

# What `make proof` does to 4,000 jobs.
FULL = {
    "kill_worker": 8,
    "kill_busy_worker": 8,
    "kill_worker_child": 6,
    "kill_worker_parent": 4,
    "freeze_busy_worker": 3,
    "kill_redis": 5,
    "kill_persistent_redis": 3,
    "flush_redis": 4,
    "restart_plugins_fast": 1,
    "restart_plugins_at_once": 2,
    "restart_core_at_once": 1,
    "kill_relay": 3,
    "kill_web": 1,
    "restart_web": 1,
}
# Jobs before the first fault: their delay is the measure for the others'.
UNDISTURBED = 100
# So many jobs may be open before more are accepted: else their delay would tell of the queue, not of the faults.
MOST_OPEN = 100
TALLIES = "SELECT event, sum(count) FROM jobs_tally WHERE subject = 'proof' GROUP BY event"
OPEN = "SELECT count(*) FROM proof_request WHERE finished IS NULL"
DELAYS = "SELECT extract(epoch FROM finished - created)::float FROM proof_request WHERE finished IS NOT NULL"


@dataclass
class Report:
    """The figures of a run."""

    findings: Findings
    faults: dict[str, int]
    worker_sigkills: int
    client_retries: int
    effects_without_request: int
    requests_never_asked_for: int
    leases_expired: int
    deferred: int
    attempts: int
    most_attempts: int
    undisturbed_seconds: float
    accepting_seconds: float
    total_seconds: float
    extra_delay: dict[str, float] = field(default_factory=dict)

    def broken(self) -> list[str]:
        """Return the promises that were not kept."""
        broken = self.findings.broken()
        if self.effects_without_request:
            broken.append(f"{self.effects_without_request} effects of nothing that was accepted")
        if self.requests_never_asked_for:
            broken.append(f"{self.requests_never_asked_for} requests that nobody asked for")
        return broken

    def as_json(self) -> dict[str, Any]:
        """Return everything but the single delays."""
        report = asdict(self) | {"broken": self.broken()}
        del report["findings"]["delays"]
        return report

    def table(self) -> str:
        """Return the figures for a person to read."""
        found = self.findings
        rows: list[tuple[str, object]] = [
            ("accepted", found.accepted),
            ("done", found.done),
            ("failed with a reason", found.failed),
            ("lost", len(found.lost)),
            ("duplicate effects", len(found.effects_doubled)),
            ("missing effects", len(found.effects_missing)),
            ("effects without acceptance", self.effects_without_request + self.requests_never_asked_for),
            ("accepted twice", len(found.accepted_twice)),
            ("delay undisturbed, median", f"{self.undisturbed_seconds:.2f} s"),
            *((f"extra delay, {name}", f"{seconds:.2f} s") for name, seconds in self.extra_delay.items()),
            ("leases expired", self.leases_expired),
            ("deferred", self.deferred),
            ("attempts, in all", self.attempts),
            ("attempts, most for one job", self.most_attempts),
            ("client retries", self.client_retries),
            ("worker SIGKILLs", self.worker_sigkills),
            *((f"fault: {name.replace('_', ' ')}", count) for name, count in sorted(self.faults.items())),
            ("accepting", f"{self.accepting_seconds:.0f} s"),
            ("all", f"{self.total_seconds:.0f} s"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def run(
    servers: ProofServers,
    plan: dict[str, int],
    *,
    jobs: int,
    file: Path,
    seed: int = 1,
    per_second: float = 0,
    wait_seconds: float = 180,
) -> Report:
    """Accept jobs while the planned faults happen in a random order, spread over the acceptances; then check."""
    started = time.monotonic()
    faults = Faults(servers, seed)
    person, book = servers.person(), Ledger(file)
    acceptance = Acceptance(person, book)
    undisturbed = min(UNDISTURBED, jobs // 4)
    acceptance.run("proof", undisturbed, per_second=per_second)
    ledger.check(person, book, wait_seconds=wait_seconds)
    normal = quantile((row[0] for row in servers.sql("plugins", DELAYS)), 0.5)
    order = [name for name, count in plan.items() for _ in range(count)]
    faults.rng.shuffle(order)
    shares = [(jobs - undisturbed) // len(order)] * (len(order) - 1) if order else []
    shares.append(jobs - undisturbed - sum(shares))
    with ThreadPoolExecutor(1) as background:
        for share, name in zip_longest(shares, order):
            wait_for("the queue getting shorter", lambda: servers.sql("plugins", OPEN)[0][0] <= MOST_OPEN, wait_seconds)
            enough = len(book.accepted) + faults.rng.randrange(max(1, share))
            accepting = background.submit(acceptance.run, "proof", share, per_second=per_second)
            while len(book.accepted) < enough and not accepting.done():
                time.sleep(0.005)
            if name:
                faults.inject(name)
            accepting.result()
    accepted = time.monotonic()
    findings = ledger.check(person, book, wait_seconds=wait_seconds)
    faults.heal()
    tallies = {event: int(count) for event, count in servers.sql("plugins", TALLIES)}
    ((requests, attempts, most),) = servers.sql(
        "plugins", "SELECT count(*), coalesce(sum(attempt), 0), coalesce(max(attempt), 0) FROM proof_request"
    )
    strays = servers.sql(
        "plugins", "SELECT count(*) FROM proof_effect WHERE request_id NOT IN (SELECT id FROM proof_request)"
    )
    return Report(
        findings=findings,
        faults=dict(faults.counts),
        worker_sigkills=faults.sigkilled,
        client_retries=next(acceptance.retries),
        effects_without_request=strays[0][0],
        requests_never_asked_for=requests - len(book.accepted),
        leases_expired=tallies.get("lease expired", 0),
        deferred=tallies.get("deferred", 0),
        attempts=int(attempts),
        most_attempts=most,
        undisturbed_seconds=normal,
        accepting_seconds=accepted - started,
        total_seconds=time.monotonic() - started,
        extra_delay=extra(findings.delays, normal),
    )


def extra(delays: Sequence[float], normal: float) -> dict[str, float]:
    """Return how much later than undisturbed ones jobs were over."""
    later = [max(0.0, delay - normal) for delay in delays]
    return {"p50": quantile(later, 0.5), "p95": quantile(later, 0.95), "worst": max(later, default=0.0)}

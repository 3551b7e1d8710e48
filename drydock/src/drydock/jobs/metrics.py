"""What the job tables of one database say, as figures for Prometheus.

Counts come from `Tally` and `Latency`, which outlive the jobs; gauges from the jobs that are there. A kind that has no
jobs is there with zeros: an alert on a series that is absent never fires.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from django.db import connections
from django.db.models import Sum
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

from drydock.jobs import kinds
from drydock.jobs.engine import OVER
from drydock.jobs.kinds import Kind
from drydock.jobs.models import Heartbeat, Job, Latency, Tally
from drydock.jobs.relay import HEARTBEAT

IN_HAND = """
SELECT kind, queue, state, count(*), coalesce(max(attempt), 0),
  coalesce(max(extract(epoch FROM now() - run_after)) FILTER (WHERE state = 'queued' AND run_after <= now()), 0)::float,
  count(*) FILTER (WHERE state IN ('queued', 'running') AND created < now() - after * interval '1 second')
FROM jobs_job LEFT JOIN unnest(%s::text[], %s::float8[]) AS late (kind, after) USING (kind)
GROUP BY kind, queue, state
"""
# What `engine.py` counts for a kind, beside how its jobs ended.
LEASE_EXPIRED, DEFERRED = "lease expired", "deferred"
BROKER = "broker"


@dataclass(frozen=True)
class InHand:
    """The jobs of one kind in one state."""

    kind: str
    queue: str
    state: str
    count: int
    most_attempts: int
    waiting_seconds: float
    late: int


@dataclass(frozen=True)
class Measured:
    """What one database said."""

    in_hand: tuple[InHand, ...]
    counts: Mapping[tuple[str, str], int]
    # (kind, state, until) -> bound -> (count, seconds)
    latencies: Mapping[tuple[str, str, str], Mapping[float, tuple[int, float]]]
    # Seconds since a relay has made a pass; infinite when none ever has.
    relay_age: float


def measure(database: str) -> Measured:
    """Ask a database."""
    known = _kinds_of(database)
    with connections[database].cursor() as cursor:
        cursor.execute(IN_HAND, [[kind.name for kind in known], [kind.late_after_seconds for kind in known]])
        in_hand = tuple(InHand(*row) for row in cursor.fetchall())
    counted = Tally.objects.using(database).values_list("subject", "event").annotate(total=Sum("count"))
    latencies: dict[tuple[str, str, str], dict[float, tuple[int, float]]] = defaultdict(dict)
    buckets = Latency.objects.using(database).values_list("kind", "state", "until", "le")
    for kind, state, until, le, count, seconds in buckets.annotate(total=Sum("count"), took=Sum("seconds")):
        latencies[kind, state, until][le] = (count, seconds)
    return Measured(
        in_hand, {(subject, event): total for subject, event, total in counted}, latencies, relay_age(database)
    )


def relay_age(database: str) -> float:
    """Return how many seconds ago a relay has made its last pass over this database; infinite: none ever has."""
    with connections[database].cursor() as cursor:
        table = Heartbeat._meta.db_table
        cursor.execute(f"SELECT extract(epoch FROM now() - at)::float8 FROM {table} WHERE name = %s", [HEARTBEAT])  # noqa: S608
        row = cursor.fetchone()
    return max(0.0, row[0]) if row else math.inf


def families(measured: Mapping[str, Measured], *, named: frozenset[str] = frozenset()) -> Iterator[Metric]:
    """Return the metrics of all databases that have answered; the caller has metrics for the subjects that it names."""
    yield from _gauges(measured)
    yield from _counters(measured, named | {BROKER})
    yield from _histograms(measured)
    relay = GaugeMetricFamily(
        "drydock_relay_last_pass_age_seconds",
        "Time since a relay has last made its round over this database. Above 30: no relay runs or it fails, and"
        " accepted jobs wait without being started.",
        labels=["database"],
    )
    for database, said in measured.items():
        relay.add_metric([database], said.relay_age)
    yield relay


def _gauges(measured: Mapping[str, Measured]) -> Iterable[Metric]:
    jobs = GaugeMetricFamily(
        "drydock_jobs",
        "Jobs in the table by state. 'queued' and 'running' are all there are; finished ones are pruned, so count those"
        " by drydock_jobs_finished_total.",
        labels=["kind", "queue", "state"],
    )
    waiting = GaugeMetricFamily(
        "drydock_jobs_oldest_due_age_seconds",
        "How long the oldest job that is due has waited for a worker; 0: none waits. If it grows, workers are too few"
        " or gone.",
        labels=["kind", "queue"],
    )
    late = GaugeMetricFamily(
        "drydock_jobs_late",
        "Accepted jobs that are not over although they are older than their kind may become: somebody waits in vain.",
        labels=["kind", "queue"],
    )
    attempts = GaugeMetricFamily(
        "drydock_jobs_most_attempts",
        "The most attempts that a job which is not over has had: one that climbs kills its workers or cannot be done.",
        labels=["kind", "queue"],
    )
    for database, said in measured.items():
        for kind, queue in sorted(_labels(database, said)):
            rows = {row.state: row for row in said.in_hand if (row.kind, row.queue) == (kind, queue)}
            for state in Job.State.values:
                jobs.add_metric([kind, queue, state], rows[state].count if state in rows else 0)
            unfinished = [row for state, row in rows.items() if state not in OVER]
            waiting.add_metric([kind, queue], max((row.waiting_seconds for row in unfinished), default=0.0))
            late.add_metric([kind, queue], sum(row.late for row in unfinished))
            attempts.add_metric([kind, queue], max((row.most_attempts for row in unfinished), default=0))
    return jobs, waiting, late, attempts


def _counters(measured: Mapping[str, Measured], named: frozenset[str]) -> Iterable[Metric]:
    finished = CounterMetricFamily(
        "drydock_jobs_finished",
        "Jobs that ended, by how: 'failed' could not be done (its author reads why), 'dead' was given up after its"
        " last attempt.",
        labels=["kind", "state"],
    )
    expired = CounterMetricFamily(
        "drydock_jobs_leases_expired",
        "Attempts lost because their worker fell silent: killed, frozen or cut off. The jobs run again.",
        labels=["kind"],
    )
    deferred = CounterMetricFamily(
        "drydock_jobs_deferred",
        "Times that a job was put off and tried again later, because something that it needs was missing or busy.",
        labels=["kind"],
    )
    broker = CounterMetricFamily(
        "drydock_broker_errors",
        "Times that the broker did not take the relay's bells. Jobs are safe, but none starts while this grows.",
        labels=["database"],
    )
    others = CounterMetricFamily(
        "drydock_events", "What else the apps count, by subject and event.", labels=["subject", "event"]
    )
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for database, said in measured.items():
        names = sorted({kind for kind, _ in _labels(database, said)})
        for name in names:
            for state in OVER:
                finished.add_metric([name, state], said.counts.get((name, state), 0))
            expired.add_metric([name], said.counts.get((name, LEASE_EXPIRED), 0))
            deferred.add_metric([name], said.counts.get((name, DEFERRED), 0))
        broker.add_metric([database], said.counts.get((BROKER, "error"), 0))
        for (subject, event), count in said.counts.items():
            if subject not in named and subject not in names:
                sums[subject, event] += count
    for labels, count in sorted(sums.items()):
        others.add_metric(labels, count)
    return finished, expired, deferred, broker, others


def _histograms(measured: Mapping[str, Measured]) -> Iterable[Metric]:
    start = HistogramMetricFamily(
        "drydock_job_start_seconds",
        "Time from a job's acceptance until the attempt began that ended it: how long work waits for workers.",
        labels=["kind"],
    )
    end = HistogramMetricFamily(
        "drydock_job_completion_seconds",
        "Time from a job's acceptance until it was over, by how it ended: what its user waits for.",
        labels=["kind", "state"],
    )
    for database, said in measured.items():
        for name in sorted({kind for kind, _ in _labels(database, said)}):
            _add(start, [name], [said.latencies.get((name, state, "start"), {}) for state in OVER])
            for state in OVER:
                _add(end, [name, state], [said.latencies.get((name, state, "end"), {})])
    return start, end


def _add(family: HistogramMetricFamily, labels: list[str], parts: list[Mapping[float, tuple[int, float]]]) -> None:
    """Add one histogram, cumulative as Prometheus wants it, from buckets that are not."""
    bounds = sorted({*Latency.BOUNDS, *(le for part in parts for le in part)})
    buckets, total = [], 0
    for le in bounds:
        total += sum(part[le][0] for part in parts if le in part)
        buckets.append((floatToGoString(le), total))
    family.add_metric(labels, buckets, sum(seconds for part in parts for _, seconds in part.values()))


def _kinds_of(database: str) -> list[Kind]:
    return [kind for kind in kinds.every() if kind.database == database]


def _labels(database: str, said: Measured) -> set[tuple[str, str]]:
    """Return the kinds, with their queues, that this release knows or that the table has."""
    known = {(kind.name, kind.queue) for kind in _kinds_of(database)}
    return known | {(row.kind, row.queue) for row in said.in_hand}

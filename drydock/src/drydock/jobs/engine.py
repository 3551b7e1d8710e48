"""How a job moves: accepted in its cause's transaction, claimed under a lease, finished behind the attempt's fence.

Every move is one conditional UPDATE (or works on rows that it has locked). It says by its row count whether it
happened, so two workers can never both believe that a job is theirs.
"""

import contextvars
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import Error as DatabaseClientError
from django.db import connections, models, transaction
from django.db.models import F, Q, Window
from django.db.models.expressions import Combinable
from django.db.models.functions import Now, RowNumber

from drydock.jobs import context, kinds
from drydock.jobs.kinds import Kind
from drydock.jobs.models import Heartbeat, Job, Latency, Tally

logger = logging.getLogger(__name__)

CHANNEL = "jobs"
OVER = (Job.State.DONE, Job.State.FAILED, Job.State.DEAD)
DEFERRAL_SECONDS = (2, 60)
BATCH = 100
# One round trip, where Django's `update` and `get` are two.
CLAIM = """
UPDATE jobs_job SET state = 'running', attempt = attempt + 1, started = now(), worker = %(worker)s, progress = 0,
  lease_until = now() + %(lease)s * interval '1 second'
WHERE uuid = %(uuid)s AND kind = %(kind)s AND state = 'queued' AND run_after <= now() RETURNING *
"""
# After so long nobody will come who knows the kind of a lost job.
UNKNOWN_KIND_SECONDS = 24 * 3600
# The soft limit speaks first; then this; and Celery's hard limit last.
GRACE_SECONDS = 10


class Failure(Exception):  # noqa: N818 - what it says, not an error of the program
    """This job cannot be done; the message is the reason that its user reads."""


class Again(Exception):  # noqa: N818
    """This job cannot be done now, but later; the message is why."""


class Fenced(Exception):  # noqa: N818
    """This attempt does not hold the job (any more): nothing that it did may be committed."""


# --- Acceptance -------------------------------------------------------------------------------------------------------


def accept(
    kind_name: str, payload: dict[str, Any], *, idempotency_key: str, run_after: datetime | Combinable | None = None
) -> Job:
    """Record a job in the caller's transaction and wake the relay once that has committed.

    The broker is not asked: an acceptance does not depend on it. The same key twice is an IntegrityError.
    """
    kind = kinds.get(kind_name)
    connection = transaction.get_connection(kind.database)
    if not connection.in_atomic_block:
        raise RuntimeError("accept a job in the transaction of what it is about")
    times = {} if run_after is None else {"run_after": run_after, "bell_after": run_after}
    job = Job.objects.using(kind.database).create(
        kind=kind.name,
        queue=kind.queue,
        payload=payload,
        max_attempts=kind.max_attempts,
        idempotency_key=idempotency_key,
        request_id=context.fields().get("request", ""),
        **times,
    )
    with connection.cursor() as cursor:
        # Delivered at the commit, never after a rollback.
        cursor.execute("SELECT pg_notify(%s, '')", [CHANNEL])
    return job


# --- A worker's moves -------------------------------------------------------------------------------------------------


def claim(kind: Kind, uuid: UUID | str, *, worker: str = "") -> Job | None:
    """Make a waiting job ours, under a lease. None: it is not to be had (any more), which is nothing to worry about."""
    values = {"uuid": str(uuid), "kind": kind.name, "lease": kind.lease_seconds, "worker": worker}
    return next(iter(Job.objects.using(kind.database).raw(CLAIM, values)), None)


def renew(kind: Kind, job: Job, *, progress: int | None = None) -> bool:
    """Keep the lease for another while, and tell how far the job is (percent); False: the job is not ours any more."""
    values: dict[str, Any] = {"lease_until": _from_now(kind.lease_seconds)}
    if progress is not None:
        values["progress"] = max(0, min(100, progress))
    return bool(_held(kind.database, job.uuid, job.attempt).update(**values))


@contextmanager
def finishing(
    kind: Kind, uuid: UUID | str, attempt: int, state: Job.State = Job.State.DONE, reason: str = ""
) -> Iterator[None]:
    """Commit the effect (the block) and the job's end in one transaction, or neither.

    Raises `Fenced` before the block when this attempt does not hold the job: a late worker has no effect. The job's row
    stays locked for the length of the block: keep it short.
    """
    with transaction.atomic(using=kind.database):
        ended = _held(kind.database, uuid, attempt).update(state=state, reason=reason, finished=Now(), lease_until=None)
        if not ended:
            raise Fenced(f"attempt {attempt} does not hold job {uuid}")
        yield
        tally(kind.database, kind.name, state)
        with connections[kind.database].cursor() as cursor:
            cursor.execute(TOOK, {"uuid": uuid, "bounds": list(Latency.BOUNDS), "shard": _shard()})


def fail(kind: Kind, job: Job, reason: str, state: Job.State = Job.State.FAILED) -> None:
    """End a job that cannot be done, and note the reason where its user looks."""
    with finishing(kind, job.uuid, job.attempt, state, reason):
        kind.failed(job, reason)
    logger.warning("job %s (%s) is %s: %s", job.uuid, kind.name, state, reason)


def defer(kind: Kind, job: Job, reason: str) -> None:
    """Queue a running job again, later each time; a job that was deferred too often is dead."""
    if job.deferred >= kind.max_deferrals:
        fail(kind, job, f"gave up after {job.deferred + 1} tries: {reason}", Job.State.DEAD)
        return
    first, most = DEFERRAL_SECONDS
    # The exponent is bounded too: 2.0**1024 is an OverflowError.
    later = _from_now(min(most, first * 2 ** min(job.deferred, 16)) * random.uniform(0.8, 1.2))  # noqa: S311
    with transaction.atomic(using=kind.database):
        changed = _held(kind.database, job.uuid, job.attempt).update(
            state=Job.State.QUEUED, lease_until=None, deferred=F("deferred") + 1,
            run_after=later, bell_after=later, bells=0, reason=reason,
        )  # fmt: skip
        if not changed:
            raise Fenced(f"attempt {job.attempt} does not hold job {job.uuid}")
        tally(kind.database, kind.name, "deferred")
    logger.info("job %s (%s) is tried again later: %s", job.uuid, kind.name, reason)


@contextmanager
def lease_kept(kind: Kind, job: Job) -> Iterator[None]:
    """Renew the lease from a thread while the block works; past the time limit, end the job instead.

    That is for work that no soft limit reaches: the hard limit kills the process, and nobody would be left to say why.
    """
    over = threading.Event()
    end = time.monotonic() + kind.time_limit_seconds + GRACE_SECONDS

    def keep() -> None:
        while not over.wait(max(0.0, min(kind.lease_seconds / 3, end - time.monotonic()))):
            try:
                if time.monotonic() >= end:
                    fail(kind, job, kind.time_limit_reason)
                    return
                if not renew(kind, job):
                    logger.warning("job %s (%s): attempt %d has lost its lease", job.uuid, kind.name, job.attempt)
                    return
            except Fenced:
                return
            except DatabaseClientError as error:
                # Tried again at the next turn; the lease outlasts two that fail.
                logger.warning("job %s (%s): the lease was not renewed: %s", job.uuid, kind.name, error)
            finally:
                # This thread's own connection: opened for each renewal, so that short jobs have none.
                connections.close_all()
            over.wait(1)

    # In a copy of the context, so that its log lines say which job they are about, too.
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=[keep], name=f"lease-{job.uuid}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


# --- An operator's move -----------------------------------------------------------------------------------------------


def run_now(database: str, uuid: UUID | str) -> bool:
    """Let a waiting job wait no longer, whatever it was deferred for; False: it is not waiting (any more)."""
    waiting = Job.objects.using(database).filter(uuid=uuid, state=Job.State.QUEUED)
    with transaction.atomic(using=database), connections[database].cursor() as cursor:
        changed = waiting.update(run_after=Now(), bell_after=Now(), bells=0)
        cursor.execute("SELECT pg_notify(%s, '')", [CHANNEL])
    return bool(changed)


# --- The relay's moves ------------------------------------------------------------------------------------------------


def reap(database: str) -> int:
    """Queue the jobs again whose leases ran out, bury those whose attempts are used up; return how many there were."""
    reaped = 0
    while reaped < BATCH and _reap_one(database):
        reaped += 1
    return reaped


def _reap_one(database: str) -> bool:
    # While a deploy is under way there may be kinds that only the other release knows: its relay knows what to do.
    ours = Q(kind__in=[kind.name for kind in kinds.every()], lease_until__lt=Now())
    with transaction.atomic(using=database):
        job = (
            Job.objects.using(database)
            .select_for_update(skip_locked=True)
            .filter(ours | Q(lease_until__lt=_from_now(-UNKNOWN_KIND_SECONDS)), state=Job.State.RUNNING)
            .order_by("lease_until")
            .first()
        )
        if job is None:
            return False
        with context.bound(**context.of(job)):
            _take_back(database, job)
        return True


def _take_back(database: str, job: Job) -> None:
    tally(database, job.kind, "lease expired")
    if job.attempt - job.deferred >= job.max_attempts:
        _bury(database, job)
        return
    _held(database, job.uuid, job.attempt).update(
        state=Job.State.QUEUED, lease_until=None, bells=0, run_after=Now(), bell_after=Now(),
        reason=f"attempt {job.attempt} was lost with its worker {job.worker}".rstrip(),
    )  # fmt: skip
    logger.warning("job %s (%s) was lost with its worker %s: queued again", job.uuid, job.kind, job.worker)


def _bury(database: str, job: Job) -> None:
    """End a job whose attempts are used up, with the reason, where its user looks, too."""
    lost = job.attempt - job.deferred
    reason = f"gave up: it lost its worker {lost} time{'s' if lost != 1 else ''}, last {job.worker or 'an unknown one'}"
    try:
        kind = kinds.get(job.kind)
    except KeyError as error:
        # A job of a release that is not here any more: it must not hold up the others.
        logger.error("job %s: %s", job.uuid, error)
        _held(database, job.uuid, job.attempt).update(
            state=Job.State.DEAD, reason=reason, finished=Now(), lease_until=None
        )
        return
    fail(kind, job, reason, Job.State.DEAD)


def prune(database: str, *, dry_run: bool = False) -> int:
    """Remove finished jobs, but for the last of each queue (done, and not done); return how many were removed.

    At most some thousands at a time, so that no transaction is long. With `dry_run` none is removed, all are counted.
    """
    kept = getattr(settings, "JOBS_KEPT_FOR_EACH_QUEUE", 200)
    ranked = (
        Job.objects.using(database)
        .filter(state__in=OVER)
        .annotate(
            rank=Window(
                RowNumber(),
                partition_by=[F("queue"), models.Case(models.When(state=Job.State.DONE, then=1), default=0)],
                order_by=[F("finished").desc(), F("uuid").asc()],
            )
        )
    )
    if dry_run:
        return ranked.filter(rank__gt=kept).count()
    old = list(ranked.filter(rank__gt=kept).values_list("uuid", flat=True)[: 50 * BATCH])
    return Job.objects.using(database).filter(uuid__in=old, state__in=OVER).delete()[0] if old else 0


# --- Counting ---------------------------------------------------------------------------------------------------------


def tally(database: str, subject: str, event: str, by: int = 1) -> None:
    """Count an event in the transaction in hand; the counts outlive the jobs."""
    with connections[database].cursor() as cursor:
        cursor.execute(
            "INSERT INTO jobs_tally (subject, event, shard, count) VALUES (%s, %s, %s, %s)"
            " ON CONFLICT (subject, event, shard) DO UPDATE SET count = jobs_tally.count + excluded.count",
            [subject, str(event), _shard(), by],
        )


# How long the job that has just ended took: one statement, by the times in its row. Every transaction takes the
# rows in the same order (a count, then `start`, then `end`), so that none waits for another in a circle.
TOOK = """
INSERT INTO jobs_latency (kind, state, until, le, shard, count, seconds)
SELECT kind, state, until, bounds[width_bucket(took, bounds) + 1], %(shard)s, 1, took
FROM jobs_job, (SELECT %(bounds)s::float8[]) AS histogram (bounds), LATERAL (VALUES
  ('start', greatest(0, extract(epoch FROM started - created)::float8)),
  ('end', greatest(0, extract(epoch FROM finished - created)::float8))
) AS measured (until, took)
WHERE uuid = %(uuid)s AND took IS NOT NULL
ON CONFLICT (kind, state, until, le, shard)
  DO UPDATE SET count = jobs_latency.count + 1, seconds = jobs_latency.seconds + excluded.seconds
"""


def beat(database: str, name: str) -> None:
    """Note that a service has just done its work for this database."""
    Heartbeat.objects.using(database).bulk_create(
        [Heartbeat(name=name, at=Now(), host=socket.gethostname())],
        update_conflicts=True, update_fields=["at", "host"], unique_fields=["name"],
    )  # fmt: skip


def in_hand(worker: str) -> int:
    """Return how many jobs this worker has in hand, under leases that it keeps."""
    held = {"state": Job.State.RUNNING, "worker": worker, "lease_until__gt": Now()}
    return sum(Job.objects.using(database).filter(**held).count() for database in kinds.databases())


def _shard() -> int:
    return random.randrange(Tally.SHARDS)  # noqa: S311 - spreads, and hides nothing


def _from_now(seconds: float) -> models.ExpressionWrapper:
    return models.ExpressionWrapper(Now() + timedelta(seconds=seconds), output_field=models.DateTimeField())


def _held(database: str, uuid: UUID | str, attempt: int) -> models.QuerySet[Job]:
    """Return the job if it is running in the hands of this attempt: the fence."""
    return Job.objects.using(database).filter(uuid=uuid, state=Job.State.RUNNING, attempt=attempt)

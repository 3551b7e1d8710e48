"""How a job moves: accepted in the request's transaction, claimed under a lease, finished behind the attempt's fence.

Every move is one conditional UPDATE. It says by its row count whether it happened, so two workers can never both
believe that a job is theirs.
"""

import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import models, transaction
from django.db.models import F, Q
from django.db.models.functions import Now

from drydock.celery import app
from drydock.jobs.models import Job

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A kind of job: where its rows live, which queue rings for it, which task does it."""

    name: str
    database: str
    queue: str
    task: str
    max_attempts: int
    lease_seconds: float


def accept(kind: Kind, payload: dict[str, Any], *, idempotency_key: str) -> Job:
    """Record a job in the caller's transaction; the bell rings once that has committed.

    A broker that is away does not undo the acceptance: the job stays `queued` in its table.
    """
    if not transaction.get_connection(kind.database).in_atomic_block:
        raise RuntimeError("accept a job in the transaction of what it is about")
    job = Job.objects.using(kind.database).create(
        kind=kind.name,
        queue=kind.queue,
        payload=payload,
        max_attempts=kind.max_attempts,
        idempotency_key=idempotency_key,
    )
    transaction.on_commit(lambda: ring(kind, job.uuid), using=kind.database, robust=True)
    return job


def ring(kind: Kind, uuid: UUID) -> None:
    """Tell the workers of this kind that a job waits. The message is only the job's id."""
    app.send_task(kind.task, args=[str(uuid)], queue=kind.queue, priority=settings.CELERY_TASK_DEFAULT_PRIORITY)


def claim(kind: Kind, uuid: UUID | str) -> Job | None:
    """Make a waiting job, or one whose worker let its lease run out, ours. None: it is not to be had."""
    to_be_had = Q(state=Job.State.QUEUED, run_after__lte=Now()) | Q(state=Job.State.RUNNING, lease_until__lt=Now())
    lease_until = models.ExpressionWrapper(
        Now() + timedelta(seconds=kind.lease_seconds), output_field=models.DateTimeField()
    )
    claimed = (
        Job.objects.using(kind.database)
        .filter(to_be_had, uuid=uuid, kind=kind.name, attempt__lt=F("max_attempts"))
        .update(state=Job.State.RUNNING, attempt=F("attempt") + 1, lease_until=lease_until, started=Now())
    )
    if not claimed:
        logger.info("job %s (%s) is not to be had: done, in other hands, or out of attempts", uuid, kind.name)
        return None
    return Job.objects.using(kind.database).get(uuid=uuid)


def finish(kind: Kind, uuid: UUID | str, attempt: int, state: Job.State, reason: str = "") -> bool:
    """End a running job, if this attempt still holds it. Call it in the transaction that commits the effect."""
    return bool(
        Job.objects.using(kind.database)
        .filter(uuid=uuid, kind=kind.name, state=Job.State.RUNNING, attempt=attempt)
        .update(state=state, reason=reason, finished=Now(), lease_until=None)
    )

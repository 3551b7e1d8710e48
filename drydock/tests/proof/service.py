"""What can be done with the proof's jobs: ask for one, and do one."""

import random
import time
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models.functions import Now

from drydock.jobs import engine, kinds
from drydock.jobs.models import Job
from proof.models import Effect, Request

PROOF = "proof"
WORK_MS = (5, 20)


def request(owner_id: int, key: str | None, *, work_ms: float | None = None, fails: bool = False) -> Request:
    """Record a request and its job; the same key again gives the same request."""
    work_ms = random_work_ms() if work_ms is None else work_ms
    try:
        with transaction.atomic(using="plugins"):
            made = Request.objects.create(owner_id=owner_id, request_key=key)
            payload = {"request": str(made.pk), "work_ms": work_ms, "fails": fails, "accepted": time.time()}
            made.job_id = engine.accept(PROOF, payload, idempotency_key=f"proof:{made.pk}").uuid
            made.save(update_fields=["job_id"])
    except IntegrityError:
        if key is None:
            raise
        return Request.objects.get(owner_id=owner_id, request_key=key)
    return made


def random_work_ms() -> float:
    """Return how long a short job works."""
    return random.uniform(*WORK_MS)  # noqa: S311


def work(payload: dict[str, Any]) -> float:
    """Be busy as the job wants it; return how long it had waited before."""
    waited = time.time() - payload["accepted"]
    time.sleep(payload["work_ms"] / 1000)
    return float(waited)


def run(job: Job) -> None:
    """Do a job: its effect and its end are committed together."""
    waited = work(job.payload)
    if job.payload["fails"]:
        raise engine.Failure("it was asked to fail")
    with engine.finishing(kinds.get(PROOF), job.uuid, job.attempt):
        Effect.objects.create(request_id=job.payload["request"], attempt=job.attempt, delay_seconds=waited)
        note_end(job, "done", "")


def note_end(job: Job, state: str, reason: str) -> None:
    """Say at the request how its job ended."""
    Request.objects.filter(pk=job.payload["request"]).update(
        state=state, reason=reason, attempt=job.attempt, finished=Now()
    )

"""The job table: what was accepted, and what became of it. Redis only rings the bell; the truth is here."""

import uuid

from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Now


class Job(models.Model):
    """One accepted piece of work.

    Its state changes only by the conditional updates in `engine.py`; `attempt` is the fence: who holds an older
    attempt can no longer change anything.
    """

    class State(models.TextChoices):
        """Where a job can be; `dead` is a job whose attempts are used up."""

        QUEUED = "queued"
        RUNNING = "running"
        DONE = "done"
        FAILED = "failed"
        DEAD = "dead"

    uuid = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    kind = models.CharField(max_length=64)
    queue = models.CharField(max_length=64)
    payload = models.JSONField(default=dict)
    state = models.CharField(max_length=8, choices=State.choices, default=State.QUEUED)
    attempt = models.PositiveSmallIntegerField(default=0)
    max_attempts = models.PositiveSmallIntegerField(default=1)
    lease_until = models.DateTimeField(null=True)
    # By the database's clock, which also decides when a job is due: the hosts' clocks differ.
    run_after = models.DateTimeField(db_default=Now())
    idempotency_key = models.CharField(max_length=200)
    reason = models.TextField(blank=True)
    created = models.DateTimeField(db_default=Now())
    started = models.DateTimeField(null=True)
    finished = models.DateTimeField(null=True)

    class Meta:
        """Constraints keep the table true whoever writes to it."""

        constraints = (
            models.UniqueConstraint(fields=["kind", "idempotency_key"], name="jobs_job_accepted_once"),
            models.CheckConstraint(
                condition=Q(state__in=["queued", "running", "done", "failed", "dead"]), name="jobs_job_known_state"
            ),
            models.CheckConstraint(condition=Q(attempt__lte=F("max_attempts")), name="jobs_job_attempts_capped"),
            models.CheckConstraint(
                condition=~Q(state="running") | Q(lease_until__isnull=False), name="jobs_job_running_has_lease"
            ),
        )
        indexes = (
            models.Index(fields=["queue", "run_after"], condition=Q(state="queued"), name="jobs_job_waiting"),
            models.Index(fields=["lease_until"], condition=Q(state="running"), name="jobs_job_leased"),
            models.Index(fields=["kind", "state", "finished"], name="jobs_job_history"),
        )

    def __str__(self) -> str:
        """Name the job for logs."""
        return f"{self.kind} {self.uuid}"

"""The job table: what was accepted, and what became of it. The broker only rings the bell; the truth is here."""

import math
import uuid

from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Now


class Job(models.Model):
    """One accepted piece of work.

    Its state changes only by the conditional updates in `engine.py`; `attempt` is the fence: who holds an older
    attempt can no longer change anything. All times are the database's: the hosts' clocks differ.
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
    # How often it was claimed. Attempts that were put back on purpose (`deferred`) do not count towards the cap.
    attempt = models.PositiveSmallIntegerField(default=0)
    deferred = models.PositiveSmallIntegerField(default=0, db_default=0)
    max_attempts = models.PositiveSmallIntegerField(default=1)
    lease_until = models.DateTimeField(null=True)
    run_after = models.DateTimeField(db_default=Now())
    # How often the relay has rung since the job was queued, and when it rings next.
    bells = models.PositiveSmallIntegerField(default=0, db_default=0)
    bell_after = models.DateTimeField(db_default=Now())
    idempotency_key = models.CharField(max_length=200)
    # The request that caused it and the worker that claimed it last: for logs and operators.
    request_id = models.CharField(max_length=64, blank=True, db_default="")
    worker = models.CharField(max_length=200, blank=True, db_default="")
    progress = models.PositiveSmallIntegerField(default=0, db_default=0)
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
            models.CheckConstraint(
                condition=Q(attempt__lte=F("max_attempts") + F("deferred")), name="jobs_job_attempts_bounded"
            ),
            models.CheckConstraint(
                condition=~Q(state="running") | Q(lease_until__isnull=False), name="jobs_job_running_has_lease"
            ),
            models.CheckConstraint(condition=Q(progress__lte=100), name="jobs_job_progress_is_percent"),
        )
        indexes = (
            models.Index(fields=["queue", "bell_after"], condition=Q(state="queued"), name="jobs_job_due"),
            models.Index(fields=["lease_until"], condition=Q(state="running"), name="jobs_job_leased"),
            models.Index(fields=["kind", "state", "finished"], name="jobs_job_history"),
        )

    def __str__(self) -> str:
        """Name the job for logs."""
        return f"{self.kind} {self.uuid}"


class Tally(models.Model):
    """How often something happened, since ever: what remains of pruned jobs, and what metrics are made of.

    A count is spread over several rows (`shard`), so that transactions that count the same seldom wait for each other.
    """

    SHARDS = 8

    subject = models.CharField(max_length=64)
    event = models.CharField(max_length=64)
    shard = models.PositiveSmallIntegerField()
    count = models.PositiveBigIntegerField(default=0)

    class Meta:
        """One row for each count and shard."""

        constraints = (models.UniqueConstraint(fields=["subject", "event", "shard"], name="jobs_tally_once"),)

    def __str__(self) -> str:
        """Name the count for logs."""
        return f"{self.subject} {self.event}: {self.count}"


class Latency(models.Model):
    """How long jobs took since their acceptance, counted in buckets: it outlives the jobs as `Tally` does.

    `start`: until the attempt began that ended the job; `end`: until the job was over. The buckets are not cumulative.
    """

    BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, math.inf)

    kind = models.CharField(max_length=64)
    state = models.CharField(max_length=8)
    until = models.CharField(max_length=5)
    # The bucket: the time is below this bound, and not below the one before.
    le = models.FloatField()
    shard = models.PositiveSmallIntegerField()
    count = models.PositiveBigIntegerField()
    seconds = models.FloatField()

    class Meta:
        """One row for each bucket and shard."""

        constraints = (
            models.UniqueConstraint(fields=["kind", "state", "until", "le", "shard"], name="jobs_latency_once"),
        )

    def __str__(self) -> str:
        """Name the bucket for logs."""
        return f"{self.kind} {self.state} {self.until} {self.le}: {self.count}"


class Heartbeat(models.Model):
    """When a service that nobody calls, such as the relay, last did its work for this database."""

    name = models.CharField(max_length=64, primary_key=True)
    at = models.DateTimeField(db_default=Now())
    host = models.CharField(max_length=200, blank=True, db_default="")

    def __str__(self) -> str:
        """Name the service for logs."""
        return f"{self.name} on {self.host}"

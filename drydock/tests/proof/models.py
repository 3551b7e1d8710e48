"""What was asked for, and what was done about it. On the plugins database."""

import uuid

from django.db import models
from django.db.models.functions import Now


class Request(models.Model):
    """One accepted request; its job is pruned some day, it stays."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner_id = models.BigIntegerField()
    request_key = models.CharField(max_length=100, null=True)  # noqa: DJ001 - unique, but only where there is one
    job_id = models.UUIDField(null=True)
    state = models.CharField(max_length=8, default="pending")
    reason = models.TextField(blank=True)
    attempt = models.PositiveSmallIntegerField(default=0)
    created = models.DateTimeField(db_default=Now())
    finished = models.DateTimeField(null=True)

    class Meta:
        """A key is accepted once."""

        constraints = (models.UniqueConstraint(fields=["owner_id", "request_key"], name="proof_request_once"),)

    def __str__(self) -> str:
        """Name the request for logs."""
        return f"proof {self.id}"


class Effect(models.Model):
    """That a job was done. Nothing keeps a second one out but the engine: doubles are what the proof looks for."""

    request_id = models.UUIDField(db_index=True)
    attempt = models.PositiveSmallIntegerField(default=0)
    # From acceptance to start, by the clock of a machine that runs both: for the bench.
    delay_seconds = models.FloatField(null=True)

    def __str__(self) -> str:
        """Name the effect for logs."""
        return f"effect on {self.request_id}"

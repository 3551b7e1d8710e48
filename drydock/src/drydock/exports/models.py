"""Exports of a user's documents. On the plugins database."""

import uuid

from django.db import models
from django.utils import timezone
from django.utils.functional import cached_property

from drydock.jobs.models import Job

CONTENT_TYPES = {"zip": "application/zip", "csv": "text/csv; charset=utf-8"}


class Export(models.Model):
    """One file made of a user's documents. The user lives on the other database, hence only an id."""

    class Format(models.TextChoices):
        """What the file is."""

        ZIP = "zip", "ZIP (sources, PDFs and a list)"
        CSV = "csv", "CSV (the list only)"

    class State(models.TextChoices):
        """What its owner wants to know about it."""

        PENDING = "pending"
        READY = "ready"
        FAILED = "failed"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner_id = models.BigIntegerField()
    format = models.CharField(max_length=3, choices=Format.choices)
    created = models.DateTimeField(default=timezone.now)
    # Finished jobs are pruned; what they gave stays here.
    job_id = models.UUIDField(null=True, unique=True)
    state = models.CharField(max_length=8, choices=State.choices, default=State.PENDING)
    reason = models.TextField(blank=True)
    documents = models.PositiveIntegerField(default=0)
    key = models.CharField(max_length=200, blank=True)
    sha256 = models.CharField(max_length=64, blank=True)
    size = models.PositiveBigIntegerField(default=0)
    finished = models.DateTimeField(null=True)
    # Runs whose processor was lost, or whose file did not read back: they are tried again, but not for ever.
    runs_lost = models.PositiveSmallIntegerField(default=0, db_default=0)
    # The wish's Idempotency-Key; absent is not empty, hence null.
    request_key = models.CharField(max_length=100, null=True)  # noqa: DJ001

    class Meta:
        """Newest first."""

        constraints = (models.UniqueConstraint(fields=["owner_id", "request_key"], name="exports_export_once"),)
        indexes = (models.Index(fields=["owner_id", "-created"], name="exports_by_owner"),)

    def __str__(self) -> str:
        """Name the export for logs."""
        return f"{self.format} export {self.id}"

    @cached_property
    def job(self) -> Job | None:
        """Its job, unless that is over and pruned."""
        return Job.objects.using("plugins").filter(uuid=self.job_id).first() if self.job_id else None

    @property
    def file_name(self) -> str:
        """Return the name under which it is downloaded."""
        return f"drydock-{self.created:%Y%m%d-%H%M%S}.{self.format}"

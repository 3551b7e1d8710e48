"""Files that people have sent. On the plugins database; the bytes are in object storage."""

import uuid

from django.db import models
from django.utils import timezone


class Upload(models.Model):
    """One file, complete and checked. The user lives on the other database, hence only an id."""

    class Kind(models.TextChoices):
        """What it is; each has its own size limit, its own checks and its own age at which a leftover is stale."""

        PHOTO = "photo"
        ATTACHMENT = "attachment"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner_id = models.BigIntegerField()
    kind = models.CharField(max_length=10, choices=Kind.choices)
    name = models.CharField(max_length=255)
    content_type = models.CharField(max_length=100)
    size = models.PositiveBigIntegerField()
    sha256 = models.CharField(max_length=64)
    key = models.CharField(max_length=200)
    created = models.DateTimeField(default=timezone.now)
    # The person's Idempotency-Key: the same request sent again makes nothing new.
    request_key = models.CharField(max_length=100, null=True)  # noqa: DJ001 - absent is not empty: only keys are unique

    class Meta:
        """A request is taken once; the list is newest first."""

        constraints = (models.UniqueConstraint(fields=["owner_id", "request_key"], name="uploads_upload_once"),)
        indexes = (models.Index(fields=["owner_id", "-created"], name="uploads_by_owner"),)

    def __str__(self) -> str:
        """Name the upload for logs."""
        return f"{self.kind} {self.id}"

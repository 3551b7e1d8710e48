"""LaTeX documents, their revisions, and the PDFs made from them. On the core database."""

import uuid

from django.conf import settings
from django.db import models
from django.utils import timezone
from django.utils.functional import cached_property

from drydock.jobs.models import Job


class Document(models.Model):
    """A learner's document. `applied` is the newest revision whose PDF was applied: it only ever grows."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="documents")
    title = models.CharField(max_length=200)
    latest = models.PositiveIntegerField(default=0)
    applied = models.PositiveIntegerField(default=0)
    created = models.DateTimeField(default=timezone.now)
    updated = models.DateTimeField(default=timezone.now)
    # The Idempotency-Key of the request that made it; null, because only keys that were sent are unique.
    request_key = models.CharField(max_length=100, null=True)  # noqa: DJ001

    class Meta:
        """Newest first; a request that is sent again makes no second document."""

        constraints = (models.UniqueConstraint(fields=["owner", "request_key"], name="documents_document_once"),)
        indexes = (models.Index(fields=["owner", "-updated"], name="documents_by_owner"),)

    def __str__(self) -> str:
        """Show the title."""
        return self.title


class Revision(models.Model):
    """One version of a document's source, and what its compile gave."""

    class State(models.TextChoices):
        """What a reader wants to know about it."""

        PENDING = "pending"
        COMPILED = "compiled"
        FAILED = "failed"

    document = models.ForeignKey(Document, on_delete=models.CASCADE, related_name="revisions")
    number = models.PositiveIntegerField()
    source = models.TextField()
    # Who asked for it (staff may, too) and the Idempotency-Key of their request.
    request_key = models.CharField(max_length=150, null=True)  # noqa: DJ001
    created = models.DateTimeField(default=timezone.now)
    # Finished jobs are pruned; what they gave stays here.
    job_id = models.UUIDField(null=True, unique=True)
    state = models.CharField(max_length=8, choices=State.choices, default=State.PENDING)
    reason = models.TextField(blank=True)
    log = models.TextField(blank=True)
    pdf_key = models.CharField(max_length=200, blank=True)
    pdf_sha256 = models.CharField(max_length=64, blank=True)
    pdf_size = models.PositiveIntegerField(default=0)
    compiled = models.DateTimeField(null=True)

    class Meta:
        """A document's revisions are numbered; a request that is sent again makes no second one."""

        constraints = (
            models.UniqueConstraint(fields=["document", "number"], name="documents_revision_numbered"),
            models.UniqueConstraint(fields=["document", "request_key"], name="documents_revision_once"),
        )

    def __str__(self) -> str:
        """Show what it is a revision of."""
        return f"{self.document_id} r{self.number}"

    @cached_property
    def job(self) -> Job | None:
        """Its job, unless that is over and pruned."""
        return Job.objects.using("core").filter(uuid=self.job_id).first() if self.job_id else None


def pdf_key(document: uuid.UUID | str, revision: int, attempt: int) -> str:
    """Return the object key of one attempt's PDF: no attempt ever writes over another's."""
    return f"documents/{document}/r{revision}/a{attempt}.pdf"

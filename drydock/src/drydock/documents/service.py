"""What can be done with documents: write a revision (which asks for a compile) and apply a compile's result."""

import re
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from django.db import IntegrityError, transaction
from django.db.models.functions import Now

from drydock.accounts.models import User
from drydock.documents.models import Document, Revision, pdf_key
from drydock.jobs import engine, kinds
from drydock.jobs.models import Job

COMPILE = "latex.compile"
MAX_SOURCE_BYTES = 1024 * 1024
MAX_LOG_CHARACTERS = 16_000


class InvalidInputError(ValueError):
    """What the user sent cannot be accepted; the message is for the user."""


class StaleResultError(Exception):
    """A compile's result came too late: its attempt was superseded, or a newer revision was applied."""


@dataclass(frozen=True)
class Result:
    """What a worker reports about one attempt at a compile."""

    job: UUID
    attempt: int
    succeeded: bool
    reason: str = ""
    log: str = ""
    sha256: str = ""
    size: int = 0

    @classmethod
    def from_json(cls, data: Any) -> "Result":
        """Read a report, refusing one that makes no sense."""
        try:
            result = cls(
                job=UUID(data["job"]),
                attempt=int(data["attempt"]),
                succeeded=data["succeeded"] is True,
                reason=str(data.get("reason", "")),
                log=str(data.get("log", ""))[-MAX_LOG_CHARACTERS:],
                sha256=str(data.get("sha256", "")),
                size=int(data.get("size", 0)),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(f"not a compile result: {error!r}") from error
        if result.succeeded and not (re.fullmatch("[0-9a-f]{64}", result.sha256) and result.size > 0):
            raise InvalidInputError("a successful compile has a sha256 and a size")
        if not result.succeeded and not result.reason:
            raise InvalidInputError("a failed compile has a reason")
        return result


def create_document(owner: User, title: str, source: str, request_key: str | None = None) -> Revision:
    """Create a document with its first revision and ask for its compile; the same key again is the same document."""
    title = title.strip()
    if not 1 <= len(title) <= 200:
        raise InvalidInputError("The title must have 1 to 200 characters.")
    try:
        with transaction.atomic(using="core"):
            document = Document.objects.create(owner=owner, title=title, request_key=request_key)
            return add_revision(document, source)
    except IntegrityError:
        # The database knows best whether this request came before, also when both came at once.
        first = Revision.objects.filter(number=1, document__owner=owner, document__request_key=request_key).first()
        if request_key is None or first is None:
            raise
        return first


def add_revision(document: Document, source: str, author: User | None = None, key: str | None = None) -> Revision:
    """Add the next revision and ask for its compile, both or neither; an author's same key is the same revision."""
    if not source.strip():
        raise InvalidInputError("The source is empty.")
    if "\x00" in source or len(source.encode()) > MAX_SOURCE_BYTES:
        raise InvalidInputError("The source must be text of at most 1 MiB.")
    request_key = f"{author.pk}:{key}" if author and key else None
    with transaction.atomic(using="core"):
        document = Document.objects.select_for_update().get(pk=document.pk)
        if request_key and (earlier := document.revisions.filter(request_key=request_key).first()):
            return earlier
        document.latest += 1
        revision = Revision.objects.create(
            document=document, number=document.latest, source=source, request_key=request_key
        )
        job = engine.accept(COMPILE, {"revision": revision.pk}, idempotency_key=f"revision:{revision.pk}")
        revision.job_id = job.uuid
        revision.save(update_fields=["job_id"])
        document.updated = revision.created
        document.save(update_fields=["latest", "updated"])
    return revision


def apply_result(result: Result) -> Revision:
    """Make a compile's result visible, unless it is stale. Applying the same result twice is applying it once."""
    with transaction.atomic(using="core"):
        revision = Revision.objects.select_related("document").filter(job_id=result.job).first()
        if revision is None:
            raise StaleResultError("no revision waits for this job")
        # Results of one document are applied one after another.
        document = Document.objects.select_for_update().get(pk=revision.document_id)
        job = Job.objects.using("core").filter(uuid=result.job).first()
        if job is None:
            raise StaleResultError("the job was over long ago")
        if _already_applied(job, revision, result):
            return revision
        if document.applied > revision.number:
            raise StaleResultError(
                f"revision {revision.number} was superseded: revision {document.applied} has been applied"
            )
        values: dict[str, Any] = {"log": result.log, "reason": result.reason, "compiled": Now()}
        if result.succeeded:
            key = pdf_key(document.pk, revision.number, result.attempt)
            values |= {"state": Revision.State.COMPILED, "pdf_key": key}
            values |= {"pdf_sha256": result.sha256, "pdf_size": result.size}
            document.applied = revision.number
        else:
            values |= {"state": Revision.State.FAILED}
        state = Job.State.DONE if result.succeeded else Job.State.FAILED
        try:
            with engine.finishing(kinds.get(COMPILE), result.job, result.attempt, state, result.reason):
                document.save(update_fields=["applied"])
                Revision.objects.filter(pk=revision.pk).update(**values)
        except engine.Fenced as error:
            raise StaleResultError(f"{error}: it is {job.state}") from error
        revision.refresh_from_db()
    return revision


def note_failure(job: Job, reason: str) -> None:
    """Say at the revision why there is no PDF of it."""
    Revision.objects.filter(job_id=job.uuid).update(state=Revision.State.FAILED, reason=reason, compiled=Now())


def _already_applied(job: Job, revision: Revision, result: Result) -> bool:
    if job.attempt != result.attempt or job.state not in (Job.State.DONE, Job.State.FAILED):
        return False
    return (job.state == Job.State.DONE) == result.succeeded and revision.pdf_sha256 == result.sha256

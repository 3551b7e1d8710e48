"""What can be done with exports: ask for one, and finish one."""

from django.db import IntegrityError, transaction
from django.db.models.functions import Now

from drydock.exports.models import Export
from drydock.jobs import engine, kinds
from drydock.jobs.models import Job

EXPORT = "export"


def request_export(owner_id: int, file_format: str, request_key: str | None = None) -> Export:
    """Record an export and its job, both or neither; for a key that the owner has used, return what it was used for."""
    if file_format not in Export.Format.values:
        raise ValueError(f"The format must be one of: {', '.join(Export.Format.values)}.")
    used = Export.objects.filter(owner_id=owner_id, request_key=request_key) if request_key else Export.objects.none()
    if export := used.first():
        return export
    try:
        return _record(owner_id, file_format, request_key)
    except IntegrityError:
        # The same request at the same time: the other one was first, and has committed.
        if export := used.first():
            return export
        raise


def _record(owner_id: int, file_format: str, request_key: str | None) -> Export:
    with transaction.atomic(using="plugins"):
        export = Export.objects.create(owner_id=owner_id, format=file_format, request_key=request_key)
        export.job_id = engine.accept(EXPORT, {"export": str(export.pk)}, idempotency_key=f"export:{export.pk}").uuid
        export.save(update_fields=["job_id"])
    return export


def complete(job: Job, *, key: str, sha256: str, size: int, documents: int) -> None:
    """Publish an export's file, if this attempt still holds the job."""
    with engine.finishing(kinds.get(EXPORT), job.uuid, job.attempt):
        Export.objects.filter(job_id=job.uuid).update(
            state=Export.State.READY, key=key, sha256=sha256, size=size, documents=documents, finished=Now()
        )


def note_failure(job: Job, reason: str) -> None:
    """Say at the export why there is no file."""
    Export.objects.filter(job_id=job.uuid).update(state=Export.State.FAILED, reason=reason, finished=Now())

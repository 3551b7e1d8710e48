"""What can be done with exports: ask for one, and finish one."""

from django.db import transaction
from django.db.models.functions import Now

from drydock.exports.models import Export
from drydock.jobs import engine, kinds
from drydock.jobs.models import Job

EXPORT = "export"


def request_export(owner_id: int, file_format: str) -> Export:
    """Record an export and its job, both or neither."""
    if file_format not in Export.Format.values:
        raise ValueError(f"The format must be one of: {', '.join(Export.Format.values)}.")
    with transaction.atomic(using="plugins"):
        export = Export.objects.create(owner_id=owner_id, format=file_format)
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

"""What can be done with exports: ask for one, and finish one."""

from django.conf import settings
from django.db import transaction
from django.db.models.functions import Now

from drydock.exports.models import Export
from drydock.jobs import engine
from drydock.jobs.models import Job

EXPORT = engine.Kind(
    name="export",
    database="plugins",
    queue="export",
    task="drydock.exports.tasks.build_export",
    max_attempts=5,
    lease_seconds=settings.EXPORT_TASK_TIME_LIMIT_SECONDS,
)


def request_export(owner_id: int, file_format: str) -> Export:
    """Record an export and its job, both or neither."""
    if file_format not in Export.Format.values:
        raise ValueError(f"The format must be one of: {', '.join(Export.Format.values)}.")
    with transaction.atomic(using="plugins"):
        export = Export.objects.create(owner_id=owner_id, format=file_format)
        export.job = engine.accept(EXPORT, {"export": str(export.pk)}, idempotency_key=f"export:{export.pk}")
        export.save(update_fields=["job"])
    return export


def complete(job: Job, *, key: str, sha256: str, size: int, documents: int) -> bool:
    """Publish an export's file, if this attempt still holds the job."""
    with transaction.atomic(using="plugins"):
        if not engine.finish(EXPORT, job.uuid, job.attempt, Job.State.DONE):
            return False
        Export.objects.filter(job=job).update(
            state=Export.State.READY, key=key, sha256=sha256, size=size, documents=documents, finished=Now()
        )
    return True


def fail(job: Job, reason: str) -> None:
    """End an export that cannot be made, keeping the reason."""
    with transaction.atomic(using="plugins"):
        if engine.finish(EXPORT, job.uuid, job.attempt, Job.State.FAILED, reason):
            Export.objects.filter(job=job).update(state=Export.State.FAILED, reason=reason, finished=Now())

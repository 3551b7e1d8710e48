"""The export as a kind of job."""

from django.conf import settings

from drydock import config
from drydock.exports import service, worker
from drydock.jobs import kinds

LIMIT = settings.EXPORT_TIME_LIMIT_SECONDS

kinds.register(
    kinds.Kind(
        name=service.EXPORT,
        database="plugins",
        queue="export",
        run=worker.build_export,
        failed=service.note_failure,
        lease_seconds=config.load().lease_seconds,
        time_limit_seconds=LIMIT,
        time_limit_reason=f"the export took longer than its time limit of {LIMIT} s (OMERO_IMS_CELERY_TIME_LIMIT)",
        # Waiting for a free processor is no failure: half a day of tries, a minute apart.
        max_deferrals=720,
    )
)

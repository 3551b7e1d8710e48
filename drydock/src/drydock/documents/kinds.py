"""The compile as a kind of job."""

from django.conf import settings

from drydock import config
from drydock.documents import service, worker
from drydock.jobs import kinds

kinds.register(
    kinds.Kind(
        name=service.COMPILE,
        database="core",
        queue="latex.compile",
        run=worker.compile_latex,
        failed=service.note_failure,
        lease_seconds=config.load().lease_seconds,
        time_limit_seconds=settings.LATEX_TASK_TIME_LIMIT_SECONDS,
        # A compile that fails is never tried again (that is `failed`); these attempts are for lost workers.
        max_attempts=5,
    )
)

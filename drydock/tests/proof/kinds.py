"""The kind of job of the proof: every figure that is not named is the product's default."""

from django.conf import settings

from drydock.jobs import kinds
from drydock.jobs.models import Job
from proof import service


def note_failure(job: Job, reason: str) -> None:
    """Say at the request why there is no effect."""
    service.note_end(job, "failed", reason)


kinds.register(
    kinds.Kind(
        name=service.PROOF,
        database="plugins",
        queue="proof",
        run=service.run,
        failed=note_failure,
        time_limit_seconds=60,
        lease_seconds=settings.PROOF_LEASE_SECONDS,
    )
)

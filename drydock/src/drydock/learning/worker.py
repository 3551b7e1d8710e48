"""The worker's side: recompute which units are open."""

import logging

from drydock.jobs import engine, kinds
from drydock.jobs.models import Job
from drydock.learning import availability

logger = logging.getLogger(__name__)


def recompute(job: Job) -> None:
    """Recompute the availability of the people of the job; a second time changes nothing."""
    users = job.payload["users"]
    with engine.finishing(kinds.get(availability.KIND), job.uuid, job.attempt):
        changes = availability.recompute(None if users == availability.EVERYBODY else users)
    logger.info("availability: %d changes", len(changes))


def note_failure(job: Job, reason: str) -> None:
    """Say to operators that units may be locked or open that should not be: no page shows this job."""
    logger.error(
        "availability was not recomputed for %s: %s. Run `drydock recompute_availability`.",
        job.payload["users"],
        reason,
    )

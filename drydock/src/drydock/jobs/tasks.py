"""The one Celery task: do the job that a bell is about."""

import logging
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import shared_task
from django.db import close_old_connections

from drydock import postgresql
from drydock.jobs import context, engine, kinds, relay
from drydock.jobs.kinds import Kind
from drydock.jobs.models import Job

logger = logging.getLogger(__name__)


@shared_task(name=relay.TASK, bind=True)
def run(self: Any, kind_name: str, uuid: str) -> None:
    """Claim the job and hand it to its kind; whatever comes of it, the job says so."""
    kind = kinds.get(kind_name)
    close_old_connections()
    job = engine.claim(kind, uuid, worker=self.request.hostname or "")
    if job is None:
        return
    with context.bound(**context.of(job)), engine.lease_kept(kind, job):
        perform(kind, job)


def perform(kind: Kind, job: Job) -> None:
    """Run a claimed job and note how it ended."""
    try:
        try:
            kind.run(job)
        except engine.Again as error:
            engine.defer(kind, job, str(error))
        except engine.Failure as error:
            engine.fail(kind, job, str(error))
        except SoftTimeLimitExceeded:
            engine.fail(kind, job, kind.time_limit_reason)
        except engine.Fenced:
            raise
        except Exception as error:
            if postgresql.is_away(error):
                # Perhaps it was the commit that got lost, and the job is over: then it is fenced.
                close_old_connections()
                engine.defer(kind, job, f"the database did not answer: {error}".splitlines()[0])
            else:
                logger.exception("job %s failed", job.uuid)
                engine.fail(kind, job, f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            if engine.renew(kind, job):
                engine.fail(kind, job, "its code ended without a result")
    except engine.Fenced:
        logger.warning("job %s: attempt %d was overtaken; what it did has no effect", job.uuid, job.attempt)

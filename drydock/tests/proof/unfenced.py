"""A Celery application whose workers lack the engine's fence: a late worker's effect is committed, too.

Only to see that the proof notices: `celery -A proof.unfenced worker …`.
"""

from typing import Any

from celery import signals

from drydock.celery import app

__all__ = ["app"]


@signals.worker_process_init.connect
def unfence(**_: Any) -> None:
    """Let everybody hold every job, once Django is there."""
    from drydock.jobs import engine
    from drydock.jobs.models import Job

    engine._held = lambda database, uuid, _attempt: Job.objects.using(database).filter(uuid=uuid)

"""Recomputing availability as a kind of job."""

from drydock.jobs import kinds
from drydock.learning import availability, worker

kinds.register(
    kinds.Kind(
        name=availability.KIND,
        database="core",
        queue="export",
        run=worker.recompute,
        failed=worker.note_failure,
        time_limit_seconds=120,
        # A learner waits for the next unit to open.
        late_after_seconds=60,
    )
)

"""The same work as a plain Celery task, for the bench."""

from typing import Any

from celery import shared_task

from proof import service
from proof.models import Effect


@shared_task(queue="proof")
def plain(payload: dict[str, Any]) -> None:
    """Work and leave the effect, with nothing that keeps the job."""
    waited = service.work(payload)
    Effect.objects.create(request_id=payload["request"], delay_seconds=waited)

"""What every log line of the request or job in hand carries, and what a job remembers of its cause."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drydock.jobs.models import Job

_fields: ContextVar[dict[str, str] | None] = ContextVar("fields", default=None)


def fields() -> dict[str, str]:
    """Return the fields that are bound now, for example `{"request": "4f…", "job": "9c…"}`."""
    return dict(_fields.get() or {})


def of(job: "Job") -> dict[str, str]:
    """Return the fields of a job."""
    return {"job": str(job.uuid), "kind": job.kind, "attempt": str(job.attempt), "request": job.request_id}


def add(**more: str) -> None:
    """Add fields until the enclosing `bound` block ends."""
    _fields.set(fields() | {name: value for name, value in more.items() if value})


@contextmanager
def bound(**more: str) -> Iterator[None]:
    """Add fields for the time of the block; empty ones are left out."""
    token = _fields.set(fields())
    add(**more)
    try:
        yield
    finally:
        _fields.reset(token)

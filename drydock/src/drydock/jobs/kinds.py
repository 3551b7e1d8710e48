"""The kinds of jobs that there are, each registered once by the app that it belongs to."""

from collections.abc import Callable
from dataclasses import dataclass

from drydock.jobs.models import Job


@dataclass(frozen=True)
class Kind:
    """A kind of job.

    `run(job)` does it and must end inside `engine.finishing`; it may raise `engine.Failure` (the job fails with that
    reason) or `engine.Again` (the job is queued again, with backoff); any other exception fails the job and is logged.
    `failed(job, reason)` notes a failure where the user looks; it is called in the transaction that ends the job, by
    whoever ends it: the worker, or the relay when the attempts are used up.
    """

    name: str
    database: str
    queue: str
    run: Callable[[Job], None]
    failed: Callable[[Job, str], None]
    # Seconds; the soft limit raises SoftTimeLimitExceeded in `run`, or fails the job with `time_limit_reason`.
    time_limit_seconds: float
    time_limit_reason: str = "it took longer than its time limit"
    # Attempts that may be lost with their workers, and times that `run` may ask for another try.
    max_attempts: int = 5
    max_deferrals: int = 20
    # A worker that is silent for so long has lost the job. It renews its lease three times as often.
    lease_seconds: float = 30
    # A job of this age that is not over is late: an alert.
    late_after_seconds: float = 300


_registered: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Make a kind known; a second kind of the same name is a mistake."""
    if kind.name in _registered:
        raise ValueError(f"there is a kind of job named {kind.name!r} already")
    _registered[kind.name] = kind
    return kind


def get(name: str) -> Kind:
    """Return the kind of this name; a KeyError says which there are."""
    try:
        return _registered[name]
    except KeyError:
        raise KeyError(f"no kind of job is named {name!r}; there are: {', '.join(sorted(_registered))}") from None


def every() -> tuple[Kind, ...]:
    """Return all kinds."""
    return tuple(_registered.values())


def databases() -> tuple[str, ...]:
    """Return the databases that have jobs, sorted."""
    return tuple(sorted({kind.database for kind in every()}))

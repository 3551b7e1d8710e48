"""The jobs of both databases, for operators: what waits, what runs, and why."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any, Concatenate, ParamSpec
from uuid import UUID

from django.contrib.auth.decorators import login_required
from django.db import Error as DatabaseClientError
from django.db import connections
from django.db.models import Count
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_safe

from drydock.jobs import engine, kinds
from drydock.jobs.engine import logger as jobs_logger
from drydock.jobs.models import Job
from drydock.operations import errors
from drydock.web import user_of

P = ParamSpec("P")

LISTED = 100
STATEMENT_TIMEOUT_MS = 5000
# How the page names a filter -> the job's field.
FILTERS = {"state": "state", "kind": "kind", "queue": "queue", "request": "request_id"}
SPANS = ((86400, "d"), (3600, "h"), (60, "min"))


def for_staff(view: Callable[Concatenate[HttpRequest, P], HttpResponse]) -> Callable[..., HttpResponse]:
    """Show the page to staff only; for others there is none."""

    @login_required
    @wraps(view)
    def guarded(request: HttpRequest, *args: P.args, **kwargs: P.kwargs) -> HttpResponse:
        if not user_of(request).is_staff:
            raise Http404
        return view(request, *args, **kwargs)

    return guarded


@for_staff
@require_safe
@never_cache
def jobs(request: HttpRequest) -> HttpResponse:
    """List jobs, the newest or the oldest first, with how many there are of each state."""
    wanted = {name: request.GET.get(name, "").strip() for name in FILTERS}
    oldest_first = request.GET.get("order") == "oldest"
    found: list[Job] = []
    counts: Counter[tuple[str, str, str]] = Counter()
    silent = []
    for database in kinds.databases():
        try:
            listed, counted = _ask(database, wanted, oldest_first=oldest_first)
        except DatabaseClientError:
            jobs_logger.warning("the jobs of %s cannot be listed", database, exc_info=True)
            silent.append(database)
            continue
        found += listed
        counts += counted
    found.sort(key=lambda job: job.created, reverse=not oldest_first)
    states = {state: sum(n for key, n in counts.items() if key[0] == state) for state in Job.State.values}
    context = {
        "wanted": wanted, "oldest_first": oldest_first, "silent": silent, "states": states,
        "rows": [described(job) for job in found[:LISTED]],
        "total": states.get(wanted["state"], 0) if wanted["state"] else sum(states.values()),
        "kinds": sorted({kind.name for kind in kinds.every()} | {kind for _, kind, _ in counts}),
        "queues": sorted({kind.queue for kind in kinds.every()} | {queue for _, _, queue in counts}),
    }  # fmt: skip
    return render(request, "operations/jobs.html", context)


@for_staff
@require_http_methods(["GET", "HEAD", "POST"])
@never_cache
def job(request: HttpRequest, job_id: UUID) -> HttpResponse:
    """Show everything about a job; a POST lets it run now if it waits."""
    for database in kinds.databases():
        shown = Job.objects.using(database).filter(uuid=job_id).first()
        if shown is None:
            continue
        if request.method != "POST":
            return render(request, "operations/job.html", _page(shown))
        if not engine.run_now(database, job_id):
            message = "This job does not wait any more: a worker has taken it, or it is over. Nothing was changed."
            return errors.error(request, 409, "Not waiting any more", message)
        jobs_logger.info("job %s (%s) shall run now, says %s", job_id, shown.kind, user_of(request).username)
        return redirect("job", job_id)
    raise Http404


def _page(shown: Job) -> dict[str, Any]:
    payload = json.dumps(shown.payload, indent=2, ensure_ascii=False)
    return {"row": described(shown), "payload": payload}


def _ask(
    database: str, wanted: dict[str, str], *, oldest_first: bool
) -> tuple[list[Job], Counter[tuple[str, str, str]]]:
    """Return the first jobs that fit, and how many there are by state, kind and queue (of any state)."""
    with connections[database].cursor() as cursor:
        cursor.execute("SELECT set_config('statement_timeout', %s, false)", [str(STATEMENT_TIMEOUT_MS)])
    try:
        fits = {FILTERS[name]: value for name, value in wanted.items() if value}
        listed = Job.objects.using(database).filter(**fits).order_by("created" if oldest_first else "-created")[:LISTED]
        fits.pop("state", None)
        grouped = Job.objects.using(database).filter(**fits).order_by().values_list("state", "kind", "queue")
        return list(listed), Counter({(s, k, q): number for s, k, q, number in grouped.annotate(number=Count("*"))})
    finally:
        connections[database].close()


def described(job: Job) -> dict[str, Any]:
    """Return a job with what an operator reads about its times."""
    now = timezone.now()
    return {
        "job": job,
        "database": job._state.db,
        "age": span((now - job.created).total_seconds()),
        "started": f"{span((now - job.started).total_seconds())} ago" if job.started else "not yet",
        "now": "; ".join(_now(job, now)),
        "attempts": f"{job.attempt - job.deferred} of {job.max_attempts}",
    }


def _now(job: Job, now: datetime) -> Iterator[str]:
    """Say what a job waits for, or when it ended."""
    if job.state == Job.State.QUEUED:
        seconds = (job.run_after - now).total_seconds()
        yield f"runs in {span(seconds)}" if seconds > 0 else f"due for {span(-seconds)}"
        seconds = (job.bell_after - now).total_seconds()
        yield f"bell {job.bells + 1} in {span(seconds)}" if seconds > 0 else f"bell {job.bells + 1} is due"
    elif job.state == Job.State.RUNNING and job.lease_until:
        seconds = (job.lease_until - now).total_seconds()
        yield f"lease for {span(seconds)}" if seconds > 0 else f"lease ran out {span(-seconds)} ago"
    elif job.finished:
        yield f"over {span((now - job.finished).total_seconds())} ago"
        yield f"took {span((job.finished - job.created).total_seconds())}"


def span(seconds: float) -> str:
    """Write a length of time as an operator says it: its two largest units."""
    left = max(0, round(seconds))
    parts = []
    for size, unit in SPANS:
        if left >= size:
            parts.append(f"{left // size} {unit}")
            left %= size
    if left or not parts:
        parts.append(f"{left} s")
    return " ".join(parts[:2])

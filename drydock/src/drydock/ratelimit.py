"""The rate limit: so many major actions of a person in any so many seconds, across all processes and hosts.

The truth is one row for each person in PostgreSQL, read and changed by one statement under the row's lock, by the
database's clock. A refused action is not counted.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

from django.db import connections
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.shortcuts import render

from drydock import config
from drydock.web import problem, user_of

P = ParamSpec("P")

# The clock is read once, behind the row's lock: a request that had to wait for it is later than whom it waited for.
TAKE = """
INSERT INTO accounts_recent_actions AS mine (user_id, times, allowed)
VALUES (%(user)s, ARRAY[clock_timestamp()], true)
ON CONFLICT (user_id) DO UPDATE SET (times, allowed) = (
  SELECT CASE WHEN cardinality(recent) < %(actions)s THEN recent || at ELSE recent END,
    cardinality(recent) < %(actions)s
  FROM (
    SELECT at, ARRAY(
      SELECT earlier FROM unnest(mine.times) AS earlier
      WHERE earlier > at - %(seconds)s * interval '1 second' ORDER BY earlier
    ) AS recent
    FROM (SELECT clock_timestamp() AS at) AS clock
  ) AS now
)
RETURNING allowed, extract(epoch FROM
  times[cardinality(times) - %(actions)s + 1] + %(seconds)s * interval '1 second' - clock_timestamp())
"""


def take(user_id: int) -> int:
    """Count a major action, if it is allowed now; else return in how many seconds it will be (0: it was allowed)."""
    settings = config.load()
    limits = {"actions": settings.rate_limit_actions, "seconds": settings.rate_limit_seconds}
    with connections["core"].cursor() as cursor:
        cursor.execute(TAKE, {"user": user_id, **limits})
        allowed, seconds = cursor.fetchone()
    return 0 if allowed else max(1, math.ceil(seconds))


def limited(view: Callable[Concatenate[HttpRequest, P], HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """Count a POST to this view as a major action and refuse it past the limit; below `login_required` or `api`."""

    @wraps(view)
    def guarded(request: HttpRequest, *args: P.args, **kwargs: P.kwargs) -> HttpResponseBase:
        seconds = take(user_of(request).pk) if request.method == "POST" else 0
        return _refused(request, seconds) if seconds else view(request, *args, **kwargs)

    return guarded


def _refused(request: HttpRequest, seconds: int) -> HttpResponseBase:
    settings = config.load()
    message = (
        f"You have started {settings.rate_limit_actions} actions within {settings.rate_limit_seconds} seconds: more are"
        f" not allowed. This one was not started. Try again in {seconds} second{'s' if seconds != 1 else ''}."
    )
    if request.path.startswith("/api/"):
        response: HttpResponseBase = problem(429, "RATE_LIMITED", message)
    else:
        response = render(request, "accounts/rate_limited.html", {"message": message}, status=429)
    response["Retry-After"] = str(seconds)
    return response

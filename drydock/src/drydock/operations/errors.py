"""What people and programs read when a request ends in an error: what happened, what to do, and the id to quote.

These answers need no database: often it is what is missing.
"""

import logging
import sys
from http import HTTPStatus

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.template.loader import render_to_string

from drydock import postgresql
from drydock.jobs import context

logger = logging.getLogger(__name__)

FOR_PROGRAMS = ("/api/", "/internal/")
DATABASE_AWAY = "DATABASE_UNAVAILABLE"
# A planned switchover takes two seconds, a failover less than half a minute.
DATABASE_RETRY_AFTER_SECONDS = 5


def error(request: HttpRequest, status: int, title: str, message: str, code: str = "") -> HttpResponse:
    """Answer with an error page, or with JSON where programs ask."""
    request_id = context.fields().get("request", "")
    if request.path.startswith(FOR_PROGRAMS):
        code = code or HTTPStatus(status).name
        return JsonResponse({"code": code, "message": message, "request": request_id}, status=status)
    # Without the request: whose page it is would be looked up in the database.
    page = {"title": title, "message": message, "request_id": request_id, "status": status}
    return HttpResponse(render_to_string("operations/error.html", page), status=status)


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:  # noqa: ARG001
    """Answer a request that makes no sense."""
    return error(request, 400, "Not understood", "This request could not be understood. Go back and try again.")


def forbidden(request: HttpRequest, exception: Exception) -> HttpResponse:  # noqa: ARG001
    """Answer a request that is not allowed."""
    return error(request, 403, "Not allowed", "You may not do this. If you should be allowed to, ask the operator.")


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:  # noqa: ARG001
    """Answer a form that did not come from a page of ours, or from one that was too old."""
    message = (
        "This form could not be accepted, because the page that it was on was too old or cookies are switched off."
        " Nothing was changed. Go back, reload the page and send the form again."
    )
    return error(request, 403, "Please send it again", message)


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:  # noqa: ARG001
    """Answer a request for what is not there."""
    return error(request, 404, "Not found", "There is no such page, or it belongs to somebody else.")


def database_away(request: HttpRequest, problem: BaseException | None) -> HttpResponse | None:
    """Answer a request that needed a database which does not serve now, as in a failover; None: it was another problem.

    Whether something was changed is not known: the connection may have been lost with the answer to a commit.
    """
    if not postgresql.is_away(problem):
        return None
    logger.warning("a database does not serve: %s", " ".join(str(problem).split()))
    message = (
        f"The platform cannot reach its database at the moment. Try again in {DATABASE_RETRY_AFTER_SECONDS} seconds."
        " If you have just sent something, look first whether it has arrived."
    )
    response = error(request, 503, "Not available at the moment", message, DATABASE_AWAY)
    response["Retry-After"] = str(DATABASE_RETRY_AFTER_SECONDS)
    return response


def server_error(request: HttpRequest) -> HttpResponse:
    """Answer a request that failed through no fault of its sender; the log has the traceback under the same id."""
    # What a view raises was seen by the middleware; this is for the middlewares themselves.
    if response := database_away(request, sys.exception()):
        return response
    message = (
        "Something went wrong here; it is not your mistake, and it has been noted. Try again in a minute."
        " If it goes on, tell the operator the request id."
    )
    return error(request, 500, "Something went wrong", message)

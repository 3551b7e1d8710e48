"""What people and programs read when a request ends in an error: what happened, what to do, and the id to quote.

These answers need no database: often it is what is missing.
"""

from http import HTTPStatus

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.template.loader import render_to_string

from drydock.jobs import context

FOR_PROGRAMS = ("/api/", "/internal/")


def error(request: HttpRequest, status: int, title: str, message: str) -> HttpResponse:
    """Answer with an error page, or with JSON where programs ask."""
    request_id = context.fields().get("request", "")
    if request.path.startswith(FOR_PROGRAMS):
        code = HTTPStatus(status).name
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


def server_error(request: HttpRequest) -> HttpResponse:
    """Answer a request that failed through no fault of its sender; the log has the traceback under the same id."""
    message = (
        "Something went wrong here; it is not your mistake, and it has been noted. Try again in a minute."
        " If it goes on, tell the operator the request id."
    )
    return error(request, 500, "Something went wrong", message)

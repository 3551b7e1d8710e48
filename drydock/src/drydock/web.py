"""What the views of documents and exports share."""

import json
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, cast

from django.http import HttpRequest, JsonResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase

from drydock import storage
from drydock.accounts.models import User
from drydock.jobs.models import Job

P = ParamSpec("P")


def problem(status: int, code: str, message: str) -> JsonResponse:
    """Answer a request that cannot be served: a code for programs, a sentence for people."""
    return JsonResponse({"code": code, "message": message}, status=status)


def api(*methods: str) -> Callable[..., Callable[..., HttpResponseBase]]:
    """Make a JSON endpoint for people who are signed in (session; unsafe methods need the CSRF token)."""

    def decorate(view: Callable[Concatenate[HttpRequest, P], HttpResponseBase]) -> Callable[..., HttpResponseBase]:
        @wraps(view)
        def guarded(request: HttpRequest, *args: P.args, **kwargs: P.kwargs) -> HttpResponseBase:
            if request.method not in methods:
                response = problem(405, "METHOD_NOT_ALLOWED", f"Use {' or '.join(methods)}.")
                response["Allow"] = ", ".join(methods)
                return response
            if not request.user.is_authenticated:
                return problem(401, "UNAUTHENTICATED", "Sign in first: /login")
            return view(request, *args, **kwargs)

        return guarded

    return decorate


def user_of(request: HttpRequest) -> User:
    """Return who is signed in; only for views that require it."""
    return cast(User, request.user)


def json_body(request: HttpRequest) -> dict[str, Any]:
    """Read a JSON object; a ValueError says that it is none."""
    try:
        body = json.loads(request.body or b"{}")
    except ValueError as error:
        raise ValueError(f"The body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError("The body must be a JSON object.")
    return body


def request_key(request: HttpRequest) -> str | None:
    """Return the request's Idempotency-Key: who sends it again gets the same answer, and nothing is made twice.

    A ValueError says what is wrong with the key.
    """
    key = request.headers.get("Idempotency-Key")
    if key is not None and not (1 <= len(key) <= 100 and key.isascii() and key.isprintable()):
        raise ValueError("The Idempotency-Key must be 1 to 100 printable ASCII characters.")
    return key


def text_field(body: dict[str, Any], name: str) -> str:
    """Return a field that must be text."""
    value = body.get(name)
    if not isinstance(value, str):
        raise ValueError(f"The field {name!r} must be text.")
    return value


def describe_job(job: Job | None) -> dict[str, Any] | None:
    """Return what a program may want to know about a job."""
    if job is None:
        return None
    return {
        "id": str(job.uuid), "kind": job.kind, "state": job.state, "attempt": job.attempt, "reason": job.reason,
        "progress": job.progress,
        "created": job.created, "started": job.started, "finished": job.finished,
    }  # fmt: skip


def stream_object(key: str, *, content_type: str, size: int, sha256: str, file_name: str) -> StreamingHttpResponse:
    """Pass an object through from storage; its bytes are never all in memory."""
    response = StreamingHttpResponse(storage.get(key).iter_chunks(), content_type=content_type)
    response["Content-Length"] = str(size)
    response["ETag"] = f'"{sha256}"'
    response["Content-Disposition"] = f'inline; filename="{file_name}"'
    response["Cache-Control"] = "private, no-cache"
    return response

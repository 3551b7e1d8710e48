"""What every request gets: an id for the logs, a place in the metrics, and headers that Django does not set."""

import re
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from django.conf import settings
from django.contrib.auth import get_user
from django.contrib.auth.middleware import AuthenticationMiddleware
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.utils.functional import SimpleLazyObject

from drydock.jobs import context
from drydock.operations import errors, web_metrics

if TYPE_CHECKING:
    from drydock.accounts.models import User

POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")


class ContentSecurityPolicy:
    """Pages load only what comes from here, and no script at all."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        """Add the policy to every response."""
        response = self.get_response(request)
        response.headers.setdefault("Content-Security-Policy", POLICY)
        return response


class RequestIdentity:
    """Give every log line of a request its id (the proxy's, else a new one), and count and time the request.

    It must come first: whatever goes wrong further in has become a response here.
    """

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        """Bind the id for the time of the request, and answer with it."""
        given = request.headers.get("X-Request-ID", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        started = time.monotonic()
        with context.bound(request=request_id):
            response = self.get_response(request)
            # Django's own line about an error comes later.
            request.log_fields = context.fields()  # type: ignore[attr-defined]
        response["X-Request-ID"] = request_id
        web_metrics.observe(request.method or "", route_of(request), response.status_code, time.monotonic() - started)
        return response

    def process_view(self, request: HttpRequest, *_: Any) -> None:
        """Name the route as soon as it is known."""
        context.add(route=route_of(request))


class DatabaseAway:
    """Answer 503 where a database is needed and does not serve, as in a failover."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        """Pass everything through."""
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponseBase | None:
        """Say what happened, and when to try again."""
        return errors.database_away(request, error)


class Authentication(AuthenticationMiddleware):
    """Django's, and the log lines say who it is once that was asked: nobody is looked up only for the log."""

    def process_request(self, request: HttpRequest) -> None:
        """Find out who it is when somebody wants to know."""

        def identify() -> Any:
            user = get_user(request)
            context.add(user=str(user.pk or ""))
            return user

        super().process_request(request)
        request.user = cast("User", SimpleLazyObject(identify))


def route_of(request: HttpRequest) -> str:
    """Return the pattern of the address, never the address itself: there are few patterns."""
    if request.resolver_match:
        return f"/{request.resolver_match.route}"
    return settings.STATIC_URL if request.path.startswith(settings.STATIC_URL) else "unknown"

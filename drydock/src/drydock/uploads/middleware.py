"""The ends of requests that files are about."""

from collections.abc import Callable

from botocore.exceptions import BotoCoreError, ClientError
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.shortcuts import render

from drydock.uploads.service import UnavailableError
from drydock.web import problem

RETRY_AFTER_SECONDS = 30


class TemporaryFiles:
    """Remove a request's temporary files when it is over: Django forgets those of a request that broke off."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        """Let the request go its way, and clean up behind it."""
        try:
            return self.get_response(request)
        finally:
            for file in getattr(request, "temporary_uploads", ()):
                file.close()


class StorageAway:
    """Answer 503 where the object storage is needed and does not serve."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        """Pass everything through."""
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponseBase | None:
        """Say what happened, and when to try again."""
        if isinstance(error, UnavailableError):
            what = f"{error} Nothing was kept."
        elif _is_away(error):
            what = "The platform cannot reach its stored files at the moment. They are not lost."
        else:
            return None
        message = f"{what} Try again in {RETRY_AFTER_SECONDS} seconds."
        if request.path.startswith("/api/"):
            response: HttpResponseBase = problem(503, "STORAGE_UNAVAILABLE", message)
        else:
            response = render(request, "uploads/unavailable.html", {"message": message}, status=503)
        response["Retry-After"] = str(RETRY_AFTER_SECONDS)
        return response


def _is_away(error: Exception) -> bool:
    # A key that is not there is a fault of ours, and no reason to try again.
    if isinstance(error, ClientError):
        return error.response.get("Error", {}).get("Code") != "NoSuchKey"
    return isinstance(error, BotoCoreError)

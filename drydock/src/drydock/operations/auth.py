"""The internal endpoints are for machines that hold the token."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.utils.crypto import constant_time_compare
from django.views.decorators.csrf import csrf_exempt

from drydock import config

P = ParamSpec("P")


def internal(view: Callable[Concatenate[HttpRequest, P], HttpResponse]) -> Callable[..., HttpResponse]:
    """Let only requests through that carry the internal token; such requests need no CSRF token."""

    @csrf_exempt
    @wraps(view)
    def guarded(request: HttpRequest, *args: P.args, **kwargs: P.kwargs) -> HttpResponse:
        expected = f"Bearer {config.load().internal_token}"
        if not constant_time_compare(request.headers.get("Authorization", ""), expected):
            response = JsonResponse(
                {"code": "UNAUTHORIZED", "message": "The bearer token is missing or wrong."}, status=401
            )
            response["WWW-Authenticate"] = "Bearer"
            return response
        return view(request, *args, **kwargs)

    return guarded

"""Health, readiness and the enqueue ping."""

from django.conf import settings
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_POST, require_safe

import drydock
from drydock.operations import broker, metrics, readiness
from drydock.operations.auth import internal


@require_safe
@never_cache
def health(_: HttpRequest) -> HttpResponse:
    """Say that this process is alive; touches nothing else."""
    return JsonResponse({"status": "alive", "version": drydock.__version__})


@require_safe
@never_cache
def webgateway(_: HttpRequest) -> HttpResponse:
    """Say what is served here; the web tier's own health check."""
    return JsonResponse({"service": "drydock", "version": drydock.__version__, "api": "/api/", "login": "/login"})


@require_safe
@never_cache
def ready(_: HttpRequest) -> HttpResponse:
    """Say whether everything needed is there, and name what is not."""
    missing = readiness.check()
    return JsonResponse({"ready": not missing, "missing": missing}, status=503 if missing else 200)


@internal
@require_POST
def ping_all(request: HttpRequest) -> HttpResponse:
    """Ping a worker of every kind through the broker."""
    return _ping(request, settings.QUEUES)


@internal
@require_GET
@never_cache
def ping_one(request: HttpRequest, queue: str) -> HttpResponse:
    """Ping a worker of one kind through the broker."""
    if queue not in settings.QUEUES:
        known = ", ".join(settings.QUEUES)
        return JsonResponse({"code": "UNKNOWN_QUEUE", "message": f"There are the queues {known}."}, status=404)
    return _ping(request, (queue,))


@internal
@require_GET
@never_cache
def metrics_page(_: HttpRequest) -> HttpResponse:
    """Tell Prometheus everything that is measured."""
    return HttpResponse(metrics.scrape(), content_type=metrics.CONTENT_TYPE)


def _ping(request: HttpRequest, queues: tuple[str, ...]) -> HttpResponse:
    try:
        timeout_seconds = float(request.GET.get("timeout", "5"))
        if not 0 < timeout_seconds <= broker.MAX_TIMEOUT_SECONDS:
            raise ValueError
    except ValueError:
        message = f"timeout is a number of seconds, at most {broker.MAX_TIMEOUT_SECONDS:g}."
        return JsonResponse({"code": "INVALID_TIMEOUT", "message": message}, status=400)
    results = broker.ping_queues(queues, timeout_seconds)
    return JsonResponse(results, status=200 if all(result["ok"] for result in results.values()) else 503)

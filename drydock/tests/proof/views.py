"""The proof's JSON API: as a real one, and with the count of effects."""

from uuid import UUID

from django.http import HttpRequest, JsonResponse
from django.http.response import HttpResponseBase
from django.urls import reverse

from drydock.web import api, json_body, problem, user_of
from proof import service
from proof.models import Effect, Request


@api("GET", "POST")
def api_requests(request: HttpRequest) -> HttpResponseBase:
    """Count everything there is, or accept a request."""
    if request.method == "GET":
        known = Request.objects.values("pk")
        strays = Effect.objects.exclude(request_id__in=known).count()
        return JsonResponse({"requests": Request.objects.count(), "effects_without_request": strays})
    body = json_body(request)
    made = service.request(
        user_of(request).pk,
        request.headers.get("Idempotency-Key"),
        work_ms=body.get("work_ms"),
        fails=bool(body.get("fails")),
    )
    answer = {"id": str(made.pk), "job": str(made.job_id)}
    return JsonResponse(answer, status=202, headers={"Location": reverse("api-proof", args=[made.pk])})


@api("GET")
def api_request(request: HttpRequest, request_id: UUID) -> HttpResponseBase:
    """Describe a request and count its effects."""
    found = Request.objects.filter(pk=request_id, owner_id=user_of(request).pk).first()
    if found is None:
        return problem(404, "NOT_FOUND", "There is no such request, or it is not yours.")
    fields = ("state", "reason", "attempt", "created", "finished")
    effects = Effect.objects.filter(request_id=found.pk).count()
    return JsonResponse({"id": str(found.pk), "effects": effects} | {name: getattr(found, name) for name in fields})

"""Exports: their JSON API and their pages."""

from uuid import UUID

from django.contrib.auth.decorators import login_required
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.views.decorators.http import require_http_methods, require_safe

from drydock.accounts.models import User
from drydock.exports import service
from drydock.exports.models import CONTENT_TYPES, Export
from drydock.ratelimit import limited
from drydock.web import api, describe_job, json_body, problem, request_key, stream_object, text_field, user_of

LISTED = 100


def exports_of(user: User) -> QuerySet[Export]:
    """Return a user's own exports."""
    return Export.objects.filter(owner_id=user.pk).order_by("-created")


# --- JSON API ---------------------------------------------------------------------------------------------------------


@api("GET", "POST")
@limited
def api_exports(request: HttpRequest) -> HttpResponseBase:
    """List exports, or accept the wish for one."""
    user = user_of(request)
    if request.method == "GET":
        listed = [{"id": str(e.pk), "format": e.format, "state": e.state} for e in exports_of(user)[:LISTED]]
        return JsonResponse({"exports": listed})
    try:
        wish = {"format": "zip"} | json_body(request)
        export = service.request_export(user.pk, text_field(wish, "format"), request_key(request))
    except ValueError as error:
        return problem(400, "INVALID_INPUT", str(error))
    body = {"id": str(export.pk), "format": export.format, "job": str(export.job_id)}
    return JsonResponse(body, status=202, headers={"Location": reverse("api-export", args=[export.pk])})


@api("GET")
def api_export(request: HttpRequest, export_id: UUID) -> HttpResponseBase:
    """Describe an export and its job."""
    export = exports_of(user_of(request)).filter(pk=export_id).first()
    if export is None:
        return _not_found()
    return JsonResponse(
        {
            "id": str(export.pk),
            "format": export.format,
            "state": export.state,
            "reason": export.reason,
            "documents": export.documents,
            "size": export.size,
            "sha256": export.sha256,
            "job": describe_job(export.job),
            "download": reverse("api-export-download", args=[export.pk]) if export.key else None,
        }
    )


@api("GET")
def api_export_download(request: HttpRequest, export_id: UUID) -> HttpResponseBase:
    """Send an export's file."""
    export = exports_of(user_of(request)).filter(pk=export_id).first()
    if export is None:
        return _not_found()
    if not export.key:
        return problem(404, "NOT_READY", "This export has no file (yet).")
    return _file(export)


def _not_found() -> HttpResponse:
    return problem(404, "NOT_FOUND", "There is no such export, or it is not yours.")


def _file(export: Export) -> HttpResponseBase:
    response = stream_object(
        export.key,
        content_type=CONTENT_TYPES[export.format],
        size=export.size,
        sha256=export.sha256,
        file_name=export.file_name,
    )
    response["Content-Disposition"] = f'attachment; filename="{export.file_name}"'
    return response


# --- Pages ------------------------------------------------------------------------------------------------------------


@login_required
@require_http_methods(["GET", "HEAD", "POST"])
@limited
def exports(request: HttpRequest) -> HttpResponse:
    """List the user's exports and take the wish for a new one."""
    user = user_of(request)
    refusal = ""
    if request.method == "POST":
        try:
            return redirect("export", service.request_export(user.pk, request.POST.get("format", "")).pk)
        except ValueError as error:
            refusal = str(error)
    listed = list(exports_of(user)[:LISTED])
    waiting = any(export.state == Export.State.PENDING for export in listed) and not refusal
    context = {"exports": listed, "formats": Export.Format.choices, "waiting": waiting, "error": refusal}
    return render(request, "exports/list.html", context, status=400 if refusal else 200)


@login_required
@require_safe
def export(request: HttpRequest, export_id: UUID) -> HttpResponse:
    """Show an export."""
    shown = get_object_or_404(exports_of(user_of(request)), pk=export_id)
    return render(request, "exports/detail.html", {"export": shown})


@login_required
@require_safe
def export_download(request: HttpRequest, export_id: UUID) -> HttpResponseBase:
    """Send an export's file to a browser."""
    shown = get_object_or_404(exports_of(user_of(request)), pk=export_id)
    if not shown.key:
        raise Http404("This export has no file (yet).")
    return _file(shown)

"""Uploads: their JSON API and their pages."""

from typing import Any
from uuid import UUID

from django.contrib.auth.decorators import login_required
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils.http import content_disposition_header
from django.views.decorators.http import require_http_methods, require_safe

from drydock import config
from drydock.accounts.models import User
from drydock.ratelimit import limited
from drydock.uploads import service
from drydock.uploads.models import Upload
from drydock.web import api, problem, request_key, stream_object, user_of

LISTED = 100


def uploads_of(user: User) -> QuerySet[Upload]:
    """Return a person's own uploads, newest first."""
    return Upload.objects.filter(owner_id=user.pk).order_by("-created")


def visible_to(user: User) -> QuerySet[Upload]:
    """Return what a person may fetch: their own uploads, and everybody's for staff."""
    return Upload.objects.all() if user.is_staff else uploads_of(user)


def _store(request: HttpRequest) -> Upload:
    """Store the file that the form brought, of whichever kind it is."""
    try:
        key = request_key(request)
    except ValueError as error:
        raise service.InvalidUploadError(str(error)) from error
    sent = {*request.FILES, *getattr(request, "refused_uploads", ())}
    kind = next((kind for kind in Upload.Kind.values if kind in sent), None)
    if kind is None:
        fields = " or ".join(f"“{kind}”" for kind in Upload.Kind.values)
        raise service.InvalidUploadError(f"Choose a file: the form has a field {fields} for it.")
    return service.store(user_of(request).pk, kind, service.received(request, kind), key)


# --- JSON API ---------------------------------------------------------------------------------------------------------


@api("GET", "POST")
@limited
def api_uploads(request: HttpRequest) -> HttpResponseBase:
    """List uploads, or take a new one (multipart; the field's name is the kind)."""
    if request.method == "GET":
        return JsonResponse({"uploads": [_describe(upload) for upload in uploads_of(user_of(request))[:LISTED]]})
    try:
        upload = _store(request)
    except service.InvalidUploadError as error:
        return problem(error.status, error.code, str(error))
    return JsonResponse(_describe(upload), status=201, headers={"Location": reverse("api-upload", args=[upload.pk])})


@api("GET")
def api_upload(request: HttpRequest, upload_id: UUID) -> HttpResponseBase:
    """Describe an upload."""
    upload = visible_to(user_of(request)).filter(pk=upload_id).first()
    if upload is None:
        return problem(404, "NOT_FOUND", "There is no such upload, or it is not yours.")
    return JsonResponse(_describe(upload))


def _describe(upload: Upload) -> dict[str, Any]:
    return {
        "id": str(upload.pk), "kind": upload.kind, "name": upload.name, "content_type": upload.content_type,
        "size": upload.size, "sha256": upload.sha256, "created": upload.created,
        "file": reverse("upload-file", args=[upload.pk]),
    }  # fmt: skip


# --- Pages ------------------------------------------------------------------------------------------------------------


@login_required
@require_http_methods(["GET", "HEAD", "POST"])
@limited
def uploads(request: HttpRequest) -> HttpResponse:
    """List a person's uploads and take a new one."""
    error, status = "", 200
    if request.method == "POST":
        try:
            _store(request)
        except service.InvalidUploadError as invalid:
            error, status = str(invalid), invalid.status
        else:
            return redirect("uploads")
    context = {
        "uploads": list(uploads_of(user_of(request))[:LISTED]),
        "limits": config.load().upload_max_bytes,
        "error": error,
    }
    return render(request, "uploads/list.html", context, status=status)


@login_required
@require_safe
def upload_file(request: HttpRequest, upload_id: UUID) -> HttpResponseBase:
    """Send the file: a photo to look at, everything else to keep; never something that the browser runs."""
    upload = get_object_or_404(visible_to(user_of(request)), pk=upload_id)
    response = stream_object(
        upload.key, content_type=upload.content_type, size=upload.size, sha256=upload.sha256, file_name=""
    )
    as_attachment = upload.kind != Upload.Kind.PHOTO
    response["Content-Disposition"] = content_disposition_header(as_attachment, upload.name) or "attachment"
    response["Content-Security-Policy"] = "default-src 'none'; sandbox"
    response["X-Content-Type-Options"] = "nosniff"
    return response

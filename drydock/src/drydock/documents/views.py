"""Documents: their JSON API and their pages."""

from typing import Any
from uuid import UUID

from django.contrib.auth.decorators import login_required
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from drydock.accounts.models import User
from drydock.documents import service
from drydock.documents.models import Document, Revision
from drydock.operations.auth import internal
from drydock.ratelimit import limited
from drydock.web import api, describe_job, json_body, problem, request_key, stream_object, text_field, user_of

LOG_TAIL_CHARACTERS = 4000
LISTED = 100
EXAMPLE_SOURCE = r"""\documentclass{article}
\usepackage{fontspec}
\setmainfont{DejaVu Serif}
\usepackage[russian]{babel}
\begin{document}
Привет, мир!
\end{document}
"""


def documents_of(user: User) -> QuerySet[Document]:
    """Return what a user may see: their own documents, and everybody's for staff."""
    return Document.objects.all() if user.is_staff else Document.objects.filter(owner=user)


def _document(request: HttpRequest, document_id: UUID) -> Document:
    return get_object_or_404(documents_of(user_of(request)), pk=document_id)


def _newest(document: Document) -> Revision:
    revision = document.revisions.get(number=document.latest)
    # Read after it: a revision that is shown as compiled has its PDF applied.
    document.refresh_from_db(fields=["applied"])
    return revision


# --- JSON API ---------------------------------------------------------------------------------------------------------


@api("GET", "POST")
@limited
def api_documents(request: HttpRequest) -> HttpResponseBase:
    """List documents, or accept a new one."""
    if request.method == "GET":
        documents = documents_of(user_of(request)).order_by("-updated")[:LISTED]
        return JsonResponse(
            {"documents": [{"id": str(d.pk), "title": d.title, "revision": d.latest} for d in documents]}
        )
    try:
        body = json_body(request)
        title, source = text_field(body, "title"), text_field(body, "source")
        revision = service.create_document(user_of(request), title, source, request_key(request))
    except ValueError as error:
        return problem(400, "INVALID_INPUT", str(error))
    return _accepted(revision)


@api("POST")
@limited
def api_revisions(request: HttpRequest, document_id: UUID) -> HttpResponseBase:
    """Accept a new revision of a document."""
    document = documents_of(user_of(request)).filter(pk=document_id).first()
    if document is None:
        return _not_found()
    try:
        source = text_field(json_body(request), "source")
        revision = service.add_revision(document, source, user_of(request), request_key(request))
    except ValueError as error:
        return problem(400, "INVALID_INPUT", str(error))
    return _accepted(revision)


@api("GET")
def api_document(request: HttpRequest, document_id: UUID) -> HttpResponseBase:
    """Describe a document and the compile of its newest revision."""
    document = documents_of(user_of(request)).filter(pk=document_id).first()
    if document is None:
        return _not_found()
    revision = _newest(document)
    pdf = {"revision": document.applied, "url": reverse("api-document-pdf", args=[document.pk])}
    return JsonResponse(
        {
            "id": str(document.pk),
            "title": document.title,
            "revision": revision.number,
            "state": revision.state,
            "reason": revision.reason,
            "job": describe_job(revision.job),
            "log_tail": revision.log[-LOG_TAIL_CHARACTERS:],
            "pdf": pdf if document.applied else None,
        }
    )


@api("GET")
def api_document_pdf(request: HttpRequest, document_id: UUID) -> HttpResponseBase:
    """Send the PDF of the newest revision that compiled."""
    document = documents_of(user_of(request)).filter(pk=document_id).first()
    if document is None:
        return _not_found()
    if not document.applied:
        return problem(404, "NO_PDF", "No revision of this document has been compiled.")
    return _pdf(document)


def _accepted(revision: Revision) -> HttpResponse:
    body: dict[str, Any] = {
        "id": str(revision.document_id),
        "revision": revision.number,
        "job": str(revision.job_id),
    }
    return JsonResponse(body, status=201, headers={"Location": reverse("api-document", args=[revision.document_id])})


def _not_found() -> HttpResponse:
    return problem(404, "NOT_FOUND", "There is no such document, or it is not yours.")


def _pdf(document: Document) -> HttpResponseBase:
    revision = document.revisions.get(number=document.applied)
    return stream_object(
        revision.pdf_key,
        content_type="application/pdf",
        size=revision.pdf_size,
        sha256=revision.pdf_sha256,
        file_name=f"document-r{revision.number}.pdf",
    )


# --- For workers ------------------------------------------------------------------------------------------------------


@internal
@require_POST
def apply_latex_result(request: HttpRequest) -> HttpResponse:
    """Apply the result of a compile; a stale one is refused, so that it never overwrites a newer one."""
    try:
        revision = service.apply_result(service.Result.from_json(json_body(request)))
    except service.StaleResultError as error:
        return problem(409, "LATEX_JOB_RESULT_INVALID", str(error))
    except ValueError as error:
        return problem(400, "INVALID_INPUT", str(error))
    return JsonResponse({"document": str(revision.document_id), "revision": revision.number, "state": revision.state})


# --- Pages ------------------------------------------------------------------------------------------------------------


@login_required
@require_safe
def documents(request: HttpRequest) -> HttpResponse:
    """List the user's documents."""
    return render(request, "documents/list.html", {"rows": document_rows(user_of(request), LISTED)})


@login_required
@require_http_methods(["GET", "HEAD", "POST"])
@limited
def new_document(request: HttpRequest) -> HttpResponse:
    """Write a new document."""
    title, source, error = request.POST.get("title", ""), request.POST.get("source", EXAMPLE_SOURCE), ""
    if request.method == "POST":
        try:
            revision = service.create_document(user_of(request), title, source)
        except service.InvalidInputError as invalid:
            error = str(invalid)
        else:
            return redirect("document", revision.document_id)
    context = {"title": title, "source": source, "error": error}
    return render(request, "documents/new.html", context, status=400 if error else 200)


@login_required
@require_http_methods(["GET", "HEAD", "POST"])
@limited
def document(request: HttpRequest, document_id: UUID) -> HttpResponse:
    """Show a document with its compile, and take its next revision."""
    shown = _document(request, document_id)
    revision = _newest(shown)
    source, error = request.POST.get("source", revision.source), ""
    if request.method == "POST":
        try:
            service.add_revision(shown, source, user_of(request))
        except service.InvalidInputError as invalid:
            error = str(invalid)
        else:
            return redirect("document", shown.pk)
    context = {"document": shown, "revision": revision, "source": source, "error": error}
    context["log_tail"] = revision.log[-LOG_TAIL_CHARACTERS:]
    return render(request, "documents/detail.html", context, status=400 if error else 200)


@login_required
@require_safe
def document_pdf(request: HttpRequest, document_id: UUID) -> HttpResponseBase:
    """Send the PDF to a reader's browser."""
    shown = _document(request, document_id)
    if not shown.applied:
        raise Http404("No revision of this document has been compiled.")
    return _pdf(shown)


def document_rows(user: User, limit: int) -> list[tuple[Document, Revision]]:
    """Return the newest documents, each with its newest revision, in two queries."""
    listed = list(documents_of(user).select_related("owner").order_by("-updated")[:limit])
    revisions = Revision.objects.filter(document__in=listed).defer("source", "log").order_by("number")
    newest = {revision.document_id: revision for revision in revisions}
    return [(shown, newest[shown.pk]) for shown in listed]

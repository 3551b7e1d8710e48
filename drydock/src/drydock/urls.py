"""Every address of the platform."""

from django.contrib.auth import views as auth_views
from django.urls import path

from drydock.accounts import views as accounts
from drydock.documents import views as documents
from drydock.exports import views as exports
from drydock.learning import views as learning
from drydock.operations import jobs
from drydock.operations import views as operations
from drydock.uploads import views as uploads

login_view = auth_views.LoginView.as_view(template_name="accounts/login.html", redirect_authenticated_user=True)

urlpatterns = [
    # For machines
    path("health", operations.health),
    path("ready", operations.ready),
    path("webgateway/", operations.webgateway),
    path("metrics", operations.metrics_page),
    path("internal/ping", operations.ping_all),
    path("internal/ping/<str:queue>", operations.ping_one),
    path("internal/latex/apply", documents.apply_latex_result),
    # For programs of people who are signed in
    path("api/documents", documents.api_documents),
    path("api/documents/<uuid:document_id>", documents.api_document, name="api-document"),
    path("api/documents/<uuid:document_id>/revisions", documents.api_revisions),
    path("api/documents/<uuid:document_id>/pdf", documents.api_document_pdf, name="api-document-pdf"),
    path("api/exports", exports.api_exports),
    path("api/exports/<uuid:export_id>", exports.api_export, name="api-export"),
    path("api/exports/<uuid:export_id>/download", exports.api_export_download, name="api-export-download"),
    path("api/units", learning.api_units),
    path("api/units/<slug:slug>", learning.api_unit, name="api-unit"),
    path("api/units/<slug:slug>/attempts", learning.api_attempts),
    path("api/units/<slug:slug>/photos", learning.api_photos_of_unit),
    path("api/photos", learning.api_photos),
    path("api/photos/<uuid:photo_id>/review", learning.api_review),
    path("api/uploads", uploads.api_uploads),
    path("api/uploads/<uuid:upload_id>", uploads.api_upload, name="api-upload"),
    # For people
    path("", accounts.dashboard, name="dashboard"),
    path("login", login_view, name="login"),
    path("logout", auth_views.LogoutView.as_view(), name="logout"),
    path("documents/", documents.documents, name="documents"),
    path("documents/new", documents.new_document, name="new-document"),
    path("documents/<uuid:document_id>/", documents.document, name="document"),
    path("documents/<uuid:document_id>/pdf", documents.document_pdf, name="document-pdf"),
    path("uploads/", uploads.uploads, name="uploads"),
    path("uploads/<uuid:upload_id>/file", uploads.upload_file, name="upload-file"),
    path("exports/", exports.exports, name="exports"),
    path("exports/<uuid:export_id>/", exports.export, name="export"),
    path("exports/<uuid:export_id>/download", exports.export_download, name="export-download"),
    path("units/", learning.units, name="units"),
    path("units/<slug:slug>/", learning.unit, name="unit"),
    path("units/<slug:slug>/attempts", learning.attempt, name="unit-attempt"),
    path("units/<slug:slug>/photos", learning.photo, name="unit-photo"),
    path("review/", learning.review, name="review"),
    path("review/<uuid:photo_id>", learning.decide, name="review-photo"),
    path("operations/jobs/", jobs.jobs, name="jobs"),
    path("operations/jobs/<uuid:job_id>/", jobs.job, name="job"),
]

handler400 = "drydock.operations.errors.bad_request"
handler403 = "drydock.operations.errors.forbidden"
handler404 = "drydock.operations.errors.not_found"
handler500 = "drydock.operations.errors.server_error"

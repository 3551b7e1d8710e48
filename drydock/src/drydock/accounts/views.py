"""The first page after signing in."""

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_safe

from drydock.documents.views import document_rows
from drydock.exports.views import exports_of
from drydock.learning.service import standings
from drydock.web import user_of

SHOWN = 5


@login_required
@require_safe
def dashboard(request: HttpRequest) -> HttpResponse:
    """Show the units and the newest documents and exports."""
    user = user_of(request)
    return render(
        request,
        "accounts/dashboard.html",
        {
            "standings": standings(user),
            "rows": document_rows(user, SHOWN),
            "exports": list(exports_of(user)[:SHOWN]),
        },
    )

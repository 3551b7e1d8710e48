"""Units, attempts, photos and their review: their JSON API and their pages."""

from typing import Any
from uuid import UUID

from django.contrib.auth.decorators import login_required
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_POST, require_safe

from drydock.accounts.models import User
from drydock.learning import service
from drydock.learning.models import Attempt, Photo
from drydock.learning.service import DecidedError, LockedError, PhotoRefusedError, Standing
from drydock.ratelimit import limited
from drydock.uploads import service as uploads
from drydock.web import api, json_body, problem, request_key, text_field, user_of

LISTED = 100
SHOWN_ATTEMPTS = 20
NO_UNIT = "There is no such unit."


def attempts_of(user: User, found: Standing) -> QuerySet[Attempt]:
    """Return a person's own attempts at a unit, newest first."""
    return Attempt.objects.filter(user=user, unit=found.unit).order_by("-created", "-pk")


def photos_of(user: User, found: Standing) -> QuerySet[Photo]:
    """Return a person's own photos of a unit, newest first."""
    return Photo.objects.filter(user=user, unit=found.unit).select_related("reviewer").order_by("-created")


def photos_in(state: str) -> QuerySet[Photo]:
    """Return everybody's photos in a state, the oldest first: it has waited longest."""
    return Photo.objects.filter(state=state).select_related("unit", "user", "reviewer").order_by("created")


# --- JSON API ---------------------------------------------------------------------------------------------------------


@api("GET")
def api_units(request: HttpRequest) -> HttpResponseBase:
    """List the units and how far the person is with each."""
    return JsonResponse({"units": [_describe_unit(found) for found in service.standings(user_of(request))]})


@api("GET")
def api_unit(request: HttpRequest, slug: str) -> HttpResponseBase:
    """Give an open unit to read, with the person's own attempts and photos."""
    user = user_of(request)
    found = service.standing(user, slug)
    if found is None:
        return problem(404, "NOT_FOUND", NO_UNIT)
    if not found.open:
        return problem(403, "UNIT_LOCKED", found.locked_because)
    return JsonResponse(
        _describe_unit(found)
        | {
            "body": found.unit.body,
            "question": found.unit.question,
            "attempts": [_describe_attempt(made) for made in attempts_of(user, found)[:SHOWN_ATTEMPTS]],
            "photos": [_describe_photo(photo) for photo in photos_of(user, found)[:SHOWN_ATTEMPTS]],
        }
    )


@api("POST")
@limited
def api_attempts(request: HttpRequest, slug: str) -> HttpResponseBase:
    """Take an answer."""
    user = user_of(request)
    found = service.standing(user, slug)
    if found is None:
        return problem(404, "NOT_FOUND", NO_UNIT)
    try:
        made = service.attempt(user, found, text_field(json_body(request), "answer"), request_key(request))
    except LockedError as error:
        return problem(403, "UNIT_LOCKED", str(error))
    except ValueError as error:
        return problem(400, "INVALID_INPUT", str(error))
    return JsonResponse(_describe_attempt(made), status=201, headers={"Location": reverse("api-unit", args=[slug])})


@api("POST")
@limited
def api_photos_of_unit(request: HttpRequest, slug: str) -> HttpResponseBase:
    """Take a photo (multipart field `photo`)."""
    user = user_of(request)
    found = service.standing(user, slug)
    if found is None:
        return problem(404, "NOT_FOUND", NO_UNIT)
    try:
        photo = service.submit_photo(user, found, uploads.received(request, "photo"), request_key(request))
    except LockedError as error:
        return problem(403, "UNIT_LOCKED", str(error))
    except PhotoRefusedError as error:
        return problem(409, "PHOTO_REFUSED", str(error))
    except uploads.InvalidUploadError as error:
        return problem(error.status, error.code, str(error))
    except ValueError as error:
        return problem(400, "INVALID_INPUT", str(error))
    return JsonResponse(_describe_photo(photo), status=201, headers={"Location": reverse("api-unit", args=[slug])})


@api("GET")
def api_photos(request: HttpRequest) -> HttpResponseBase:
    """List the photos in a state, for reviewers."""
    if not user_of(request).is_staff:
        return _staff_only()
    state = request.GET.get("state", Photo.State.SUBMITTED)
    if state not in Photo.State.values:
        return problem(400, "INVALID_INPUT", f"The state must be one of: {', '.join(Photo.State.values)}.")
    return JsonResponse({"photos": [_describe_photo(photo) for photo in photos_in(state)[:LISTED]]})


@api("POST")
def api_review(request: HttpRequest, photo_id: UUID) -> HttpResponseBase:
    """Take a reviewer's decision."""
    user = user_of(request)
    if not user.is_staff:
        return _staff_only()
    try:
        body = {"note": ""} | json_body(request)
        photo = service.review(photo_id, user, text_field(body, "decision"), text_field(body, "note"))
    except Photo.DoesNotExist:
        return problem(404, "NOT_FOUND", "There is no such photo.")
    except DecidedError as error:
        return problem(409, "PHOTO_DECIDED", str(error))
    except ValueError as error:
        return problem(400, "INVALID_INPUT", str(error))
    return JsonResponse(_describe_photo(photo))


def _staff_only() -> HttpResponse:
    return problem(403, "STAFF_ONLY", "Only staff review photos.")


def _describe_unit(found: Standing) -> dict[str, Any]:
    return {
        "slug": found.unit.slug,
        "title": found.unit.title,
        "state": found.state,
        "open": found.open,
        "needs_photo": found.unit.needs_photo,
        "requires": [required.slug for required in found.unit.requires.all()],
        "missing": [required.slug for required in found.missing],
    }


def _describe_attempt(made: Attempt) -> dict[str, Any]:
    return {
        "id": made.pk,
        "unit": made.unit.slug,
        "answer": made.answer,
        "correct": made.correct,
        "created": made.created,
    }


def _describe_photo(photo: Photo) -> dict[str, Any]:
    return {
        "id": str(photo.pk),
        "unit": photo.unit.slug,
        "user": photo.user.username,
        "state": photo.state,
        "note": photo.note,
        "reviewer": photo.reviewer.username if photo.reviewer else None,
        "created": photo.created,
        "reviewed": photo.reviewed,
        "file": reverse("upload-file", args=[photo.upload_id]),
    }


# --- Pages ------------------------------------------------------------------------------------------------------------


@login_required
@require_safe
def units(request: HttpRequest) -> HttpResponse:
    """Show all units: open, locked with what they need, or passed."""
    found = service.standings(user_of(request))
    context = {"standings": found, "waiting": any(one.opening for one in found)}
    return render(request, "learning/units.html", context)


@login_required
@require_safe
def unit(request: HttpRequest, slug: str) -> HttpResponse:
    """Show a unit to work on."""
    return _unit_page(request, _standing(request, slug))


@login_required
@require_POST
@limited
def attempt(request: HttpRequest, slug: str) -> HttpResponse:
    """Take an answer; the unit's page shows whether it was right."""
    found = _standing(request, slug)
    try:
        service.attempt(user_of(request), found, request.POST.get("answer", ""))
    except LockedError:
        return _unit_page(request, found)
    except service.InvalidInputError as error:
        return _unit_page(request, found, answer_error=str(error))
    return redirect(reverse("unit", args=[slug]) + "#question")


@login_required
@require_POST
@limited
def photo(request: HttpRequest, slug: str) -> HttpResponse:
    """Take a photo; the unit's page shows its state."""
    found = _standing(request, slug)
    try:
        service.submit_photo(user_of(request), found, uploads.received(request, "photo"))
    except LockedError:
        return _unit_page(request, found)
    except PhotoRefusedError as error:
        return _unit_page(request, found, status=409, photo_error=str(error))
    except uploads.InvalidUploadError as error:
        return _unit_page(request, found, status=error.status, photo_error=str(error))
    return redirect(reverse("unit", args=[slug]) + "#photo")


@login_required
@require_safe
def review(request: HttpRequest) -> HttpResponse:
    """Show reviewers the photos that wait for them."""
    _require_staff(request)
    return _review_page(request)


@login_required
@require_POST
def decide(request: HttpRequest, photo_id: UUID) -> HttpResponse:
    """Take a reviewer's decision; who comes second is told so."""
    _require_staff(request)
    decision, note = request.POST.get("decision", ""), request.POST.get("note", "")
    try:
        service.review(photo_id, user_of(request), decision, note)
    except Photo.DoesNotExist:
        raise Http404("There is no such photo.") from None
    except DecidedError as error:
        context = {"message": str(error)}
        return render(request, "learning/decided.html", context, status=409)
    except service.InvalidInputError as error:
        return _review_page(request, photo_id, str(error))
    return redirect("review")


def _standing(request: HttpRequest, slug: str) -> Standing:
    found = service.standing(user_of(request), slug)
    if found is None:
        raise Http404(NO_UNIT)
    return found


def _unit_page(request: HttpRequest, found: Standing, status: int = 400, **errors: str) -> HttpResponse:
    context: dict[str, Any] = {"standing": found, "unit": found.unit}
    if not found.open:
        return render(request, "learning/locked.html", context, status=403)
    user = user_of(request)
    attempts = list(attempts_of(user, found)[:SHOWN_ATTEMPTS])
    photos = list(photos_of(user, found)[:SHOWN_ATTEMPTS])
    context |= {
        "attempts": attempts,
        "photos": photos,
        # One that waits or is approved leaves nothing to send.
        "takes_photo": all(shown.state == Photo.State.REJECTED for shown in photos),
        "max_answer": service.MAX_ANSWER,
    }
    return render(request, "learning/unit.html", context | errors, status=status if errors else 200)


def _review_page(request: HttpRequest, refused: UUID | None = None, error: str = "") -> HttpResponse:
    context = {
        "photos": list(photos_in(Photo.State.SUBMITTED)[:LISTED]),
        "refused": refused,
        "error": error,
        "max_note": service.MAX_NOTE,
    }
    return render(request, "learning/review.html", context, status=400 if error else 200)


def _require_staff(request: HttpRequest) -> None:
    if not user_of(request).is_staff:
        raise Http404("Only staff review photos.")

"""What can be done with units: read where one stands, answer a question, submit a photo, review one."""

import unicodedata
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar
from uuid import UUID

from django.core.files.uploadedfile import UploadedFile
from django.db import IntegrityError, transaction
from django.db.models.functions import Now

from drydock.accounts.models import User
from drydock.learning import availability, rules
from drydock.learning.models import Attempt, Availability, Photo, Unit
from drydock.uploads import service as uploads

MAX_ANSWER, MAX_NOTE = 500, 500
Made = TypeVar("Made", Attempt, Photo)


class InvalidInputError(ValueError):
    """What the user sent cannot be accepted; the message is for the user."""


class LockedError(Exception):
    """The unit is not open for this learner; the message names what to pass first."""


class PhotoRefusedError(Exception):
    """This unit takes no (further) photo of this learner; the message says why."""


class DecidedError(Exception):
    """Somebody else was faster; the message says who decided what."""


@dataclass(frozen=True)
class Standing:
    """How far a learner is with a unit."""

    unit: Unit
    open: bool
    answered: bool
    passed: bool
    missing: tuple[Unit, ...]

    @property
    def state(self) -> str:
        """Say it in one word."""
        return "passed" if self.passed else "open" if self.open else "locked"

    @property
    def opening(self) -> bool:
        """Whether all is passed that it requires, and only the recomputation has not come to it yet."""
        return not self.open and not self.missing

    @property
    def locked_because(self) -> str:
        """Say what to do about a locked unit."""
        if self.opening:
            return f"“{self.unit.title}” opens in a moment: you have passed what it needs. Come back in a few seconds."
        names = " and ".join(f"“{unit.title}”" for unit in self.missing)
        return f"“{self.unit.title}” is locked. Pass {names} first."


# --- Reading: writes nothing ------------------------------------------------------------------------------------------


def standings(user: User) -> list[Standing]:
    """Return all units in their order and how far this person is with each."""
    units = list(Unit.objects.prefetch_related("requires"))
    asked = {u.pk: rules.Rule(frozenset(required.pk for required in u.requires.all()), u.needs_photo) for u in units}
    answered = set(Attempt.objects.filter(user=user, correct=True).values_list("unit_id", flat=True).distinct())
    approved = set(Photo.objects.filter(user=user, state=Photo.State.APPROVED).values_list("unit_id", flat=True))
    recorded = dict(Availability.objects.filter(user=user).values_list("unit_id", "open"))
    done = rules.passed(asked, answered, approved)
    return [
        Standing(
            unit=unit,
            open=rules.shown_open(asked[unit.pk], recorded.get(unit.pk), staff=user.is_staff),
            answered=unit.pk in answered,
            passed=unit.pk in done,
            missing=tuple(required for required in unit.requires.all() if required.pk not in done),
        )
        for unit in units
    ]


def standing(user: User, slug: str) -> Standing | None:
    """Return how far this person is with one unit; None: there is no such unit."""
    return next((found for found in standings(user) if found.unit.slug == slug), None)


def is_correct(unit: Unit, answer: str) -> bool:
    """Compare an answer with the accepted ones; case, width and spaces make no difference."""
    return _plain(answer) in {_plain(accepted) for accepted in unit.answers}


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# --- What learners do -------------------------------------------------------------------------------------------------


def attempt(user: User, found: Standing, answer: str, request_key: str | None = None) -> Attempt:
    """Record an answer; a correct one asks for the recomputation of what it may open, both or neither."""
    if earlier := _earlier(Attempt, user, found.unit, request_key):
        return earlier
    if not found.open:
        raise LockedError(found.locked_because)
    answer = _text(answer, "The answer", MAX_ANSWER)
    if not answer:
        raise InvalidInputError("The answer is empty.")
    correct = is_correct(found.unit, answer)
    try:
        with transaction.atomic(using="core"):
            made = Attempt.objects.create(
                unit=found.unit, user=user, answer=answer, correct=correct, request_key=request_key
            )
            if correct:
                availability.ask_for([user.pk], f"attempt:{made.pk}")
    except IntegrityError:
        if earlier := _earlier(Attempt, user, found.unit, request_key):
            # The same request, at the same time.
            return earlier
        raise
    return made


def submit_photo(user: User, found: Standing, file: UploadedFile, request_key: str | None = None) -> Photo:
    """Store a photo and put it before the reviewers."""
    if earlier := _earlier(Photo, user, found.unit, request_key):
        return earlier
    if not found.open:
        raise LockedError(found.locked_because)
    try:
        _refuse_photo(user, found.unit)
        upload = uploads.store(user.pk, "photo", file, _upload_key(request_key))
        with transaction.atomic(using="core"):
            return Photo.objects.create(unit=found.unit, user=user, upload_id=upload.pk, request_key=request_key)
    except (PhotoRefusedError, IntegrityError):
        # The same request was faster, or another photo.
        if earlier := _earlier(Photo, user, found.unit, request_key):
            return earlier
        _refuse_photo(user, found.unit)
        raise


def _earlier(model: type[Made], user: User, unit: Unit, request_key: str | None) -> Made | None:
    """Return what this person's request with this key has made already."""
    if request_key is None:
        return None
    made = model._default_manager.filter(user=user, request_key=request_key).first()
    if made and made.unit_id != unit.pk:
        raise InvalidInputError("This Idempotency-Key belongs to an earlier request, about another unit.")
    return made


def _upload_key(request_key: str | None) -> str | None:
    """Return the key of the photo's upload: of the same request, but never that of another upload of this person."""
    return request_key and f"learning:{sha256(request_key.encode()).hexdigest()}"


def _refuse_photo(user: User, unit: Unit) -> None:
    if not unit.needs_photo:
        raise PhotoRefusedError(f"“{unit.title}” asks for no photo.")
    states = set(Photo.objects.filter(user=user, unit=unit).values_list("state", flat=True))
    if Photo.State.APPROVED in states:
        raise PhotoRefusedError(f"Your photo for “{unit.title}” is approved already: there is nothing left to send.")
    if Photo.State.SUBMITTED in states:
        raise PhotoRefusedError(f"Your photo for “{unit.title}” waits for its review: you can send another after it.")


# --- What reviewers do ------------------------------------------------------------------------------------------------


def review(photo_id: UUID, reviewer: User, decision: str, note: str) -> Photo:
    """Decide about a photo that waits, once; an approval asks for the recomputation of what it may open.

    The same decision by the same reviewer again is the one that was made.
    """
    if decision not in (Photo.State.APPROVED, Photo.State.REJECTED):
        raise InvalidInputError("The decision must be approved or rejected.")
    note = _text(note, "The note", MAX_NOTE)
    if decision == Photo.State.REJECTED and not note:
        raise InvalidInputError("Say in the note why the photo is rejected: the learner reads it.")
    with transaction.atomic(using="core"):
        decided = Photo.objects.filter(pk=photo_id, state=Photo.State.SUBMITTED).update(
            state=decision, note=note, reviewer=reviewer, reviewed=Now()
        )
        photo = Photo.objects.select_related("unit", "user", "reviewer").get(pk=photo_id)
        if decided and decision == Photo.State.APPROVED:
            availability.ask_for([photo.user_id], f"photo:{photo.pk}")
    if not decided and (photo.state, photo.reviewer, photo.note) != (decision, reviewer, note):
        raise DecidedError(
            f"{photo.reviewer} has {photo.get_state_display().lower()} this photo already. Your decision was not kept."
        )
    return photo


def _text(text: str, what: str, most: int) -> str:
    text = text.strip()
    if "\x00" in text or len(text) > most:
        raise InvalidInputError(f"{what} must be text of at most {most} characters.")
    return text

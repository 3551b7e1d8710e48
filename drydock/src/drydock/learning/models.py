"""Units, what learners did in them, and which units are open for them. On the core database."""

import uuid

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.db.models.functions import Now
from django.utils import timezone


class Unit(models.Model):
    """One step of the course: something to read, a question, and perhaps a photo to take."""

    slug = models.SlugField(max_length=60, unique=True)
    title = models.CharField(max_length=200)
    order = models.PositiveIntegerField(default=0)
    # Plain text with a little markup: see `markup.py`.
    body = models.TextField()
    question = models.CharField(max_length=500)
    answers = models.JSONField(default=list)
    needs_photo = models.BooleanField(default=False)
    requires = models.ManyToManyField("self", symmetrical=False, blank=True, related_name="required_by")

    class Meta:
        """In the order in which they are worked through."""

        ordering = ("order", "slug")

    def __str__(self) -> str:
        """Show the title."""
        return self.title


class Attempt(models.Model):
    """One answer of one learner."""

    unit = models.ForeignKey(Unit, on_delete=models.PROTECT, related_name="attempts")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="attempts")
    answer = models.CharField(max_length=500)
    correct = models.BooleanField()
    created = models.DateTimeField(default=timezone.now)
    # The person's Idempotency-Key: the same request sent again makes nothing new.
    request_key = models.CharField(max_length=100, null=True)  # noqa: DJ001 - absent is not empty: only keys are unique

    class Meta:
        """A request is taken once."""

        constraints = (models.UniqueConstraint(fields=["user", "request_key"], name="learning_attempt_once"),)
        indexes = (models.Index(fields=["user", "unit", "-created"], name="learning_attempts_of"),)

    def __str__(self) -> str:
        """Name the attempt for logs."""
        return f"attempt {self.pk} at {self.unit_id}"


class Photo(models.Model):
    """One photo that a learner submitted for a unit; its file is an upload, on the plugins database."""

    class State(models.TextChoices):
        """Where its review is."""

        SUBMITTED = "submitted", "Waiting for review"
        APPROVED = "approved"
        REJECTED = "rejected"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    unit = models.ForeignKey(Unit, on_delete=models.PROTECT, related_name="photos")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="photos")
    upload_id = models.UUIDField(unique=True)
    state = models.CharField(max_length=9, choices=State.choices, default=State.SUBMITTED)
    reviewer = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, related_name="reviews")
    note = models.CharField(max_length=500, blank=True)
    created = models.DateTimeField(default=timezone.now)
    reviewed = models.DateTimeField(null=True)
    request_key = models.CharField(max_length=100, null=True)  # noqa: DJ001 - as above

    class Meta:
        """A learner has one photo of a unit that waits for review or is approved, and any number of rejected ones."""

        constraints = (
            models.UniqueConstraint(fields=["user", "request_key"], name="learning_photo_once"),
            models.UniqueConstraint(
                fields=["user", "unit"], condition=~Q(state="rejected"), name="learning_photo_one_that_counts"
            ),
            models.CheckConstraint(
                condition=Q(state="submitted", reviewer__isnull=True, reviewed__isnull=True)
                | Q(state__in=["approved", "rejected"], reviewer__isnull=False, reviewed__isnull=False),
                name="learning_photo_decided_by_somebody",
            ),
        )
        indexes = (
            models.Index(fields=["created"], condition=Q(state="submitted"), name="learning_photos_waiting"),
            models.Index(fields=["user", "unit", "-created"], name="learning_photos_of"),
        )

    def __str__(self) -> str:
        """Name the photo for logs."""
        return f"photo {self.pk}"


class Availability(models.Model):
    """Whether a unit is open for a learner, as last computed. Without a row, only units that require nothing are."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="availability")
    unit = models.ForeignKey(Unit, on_delete=models.CASCADE, related_name="availability")
    open = models.BooleanField()
    since = models.DateTimeField(db_default=Now())

    class Meta:
        """One row for each pair."""

        constraints = (models.UniqueConstraint(fields=["user", "unit"], name="learning_availability_once"),)

    def __str__(self) -> str:
        """Say it for logs."""
        return f"unit {self.unit_id} is {'open' if self.open else 'locked'} for user {self.user_id}"

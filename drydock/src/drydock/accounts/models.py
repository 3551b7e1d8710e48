"""People who use the platform, and what they did just now."""

from django.conf import settings
from django.contrib.auth.models import AbstractUser
from django.contrib.postgres.fields import ArrayField
from django.db import models


class User(AbstractUser):
    """A person; a model of our own from the first day, so that it can grow."""


class RecentActions(models.Model):
    """When a person started their last major actions: what the rate limit knows (`ratelimit.py` alone writes it)."""

    user = models.OneToOneField(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, primary_key=True)
    # Ascending, by the database's clock, and no more than the limit allows.
    times = ArrayField(models.DateTimeField())
    # Whether the last request was allowed: what the statement answers with.
    allowed = models.BooleanField()

    class Meta:
        """Its rows are changed at every major action: `ratelimit.py` names the table."""

        db_table = "accounts_recent_actions"

    def __str__(self) -> str:
        """Name the row for logs."""
        return f"recent actions of {self.user_id}"

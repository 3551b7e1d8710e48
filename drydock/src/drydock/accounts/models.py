"""People who use the platform."""

from django.contrib.auth.models import AbstractUser


class User(AbstractUser):
    """A person; a model of our own from the first day, so that it can grow."""

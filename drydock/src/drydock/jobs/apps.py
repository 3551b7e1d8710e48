"""The job table."""

from django.apps import AppConfig


class JobsConfig(AppConfig):
    """Jobs live on both databases, beside what they are about."""

    name = "drydock.jobs"

"""The job table and its engine."""

from django.apps import AppConfig
from django.utils.module_loading import autodiscover_modules


class JobsConfig(AppConfig):
    """Jobs live on every database that has kinds of jobs, beside what they are about."""

    name = "drydock.jobs"

    def ready(self) -> None:
        """Find the kinds of jobs of every app: what its module `kinds` registers."""
        autodiscover_modules("kinds")

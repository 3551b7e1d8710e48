"""The script processor."""

from django.apps import AppConfig
from django.utils.module_loading import autodiscover_modules


class ProcessorConfig(AppConfig):
    """Registered scripts and living processors, on the plugins database."""

    name = "drydock.processor"

    def ready(self) -> None:
        """Find the scripts of every app: what its module `scripts` registers."""
        autodiscover_modules("scripts")

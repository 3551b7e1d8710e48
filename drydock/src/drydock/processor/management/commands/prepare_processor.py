"""`drydock prepare_processor`: the start-up step of the script processor."""

from typing import Any

from django.core.management.base import BaseCommand

from drydock import config
from drydock.processor import preparation


class Command(BaseCommand):
    """Check what a processor needs on this host and make its directories; a second run changes nothing."""

    help = "Check directories and certificate of the script processor. Prints `changed …` or `unchanged …`."
    requires_system_checks = ()

    def handle(self, *_: Any, **__: Any) -> None:
        """Check, and make what is missing."""
        made = preparation.prepare(config.load())
        self.stdout.write(f"changed {', '.join(made)}" if made else f"unchanged {preparation.work_directory()}")

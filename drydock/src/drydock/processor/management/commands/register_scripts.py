"""`drydock register_scripts`: register what this release's processors can run."""

from typing import Any

from django.core.management.base import BaseCommand

from drydock.processor import scripts


class Command(BaseCommand):
    """Register each script in its present version; a second run changes nothing."""

    help = "Register the scripts of this release. Prints `changed …` or `unchanged …`."

    def handle(self, *_: Any, **__: Any) -> None:
        """Register those that are new."""
        new = scripts.register()
        self.stdout.write(f"changed scripts: {', '.join(new)}" if new else f"unchanged {len(scripts.known())} scripts")

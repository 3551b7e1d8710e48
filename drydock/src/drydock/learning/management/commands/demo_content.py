"""`drydock demo_content`: make the demo's course what it should be."""

from typing import Any

from django.core.management.base import BaseCommand

from drydock.learning import content


class Command(BaseCommand):
    """Create or correct the demo's units; a second run changes nothing."""

    help = "Create or correct the demo's units. Prints `changed …` or `unchanged …`."

    def handle(self, *_: Any, **__: Any) -> None:
        """Change what differs."""
        changed = content.ensure(content.COURSE)
        self.stdout.write(f"changed {', '.join(changed)}" if changed else f"unchanged {len(content.COURSE)} units")

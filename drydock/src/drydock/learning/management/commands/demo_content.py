"""`drydock demo_content`: make the demo's course, and the people who try it, what they should be."""

import os
from typing import Any

from django.core.management.base import BaseCommand

from drydock.accounts import ensure
from drydock.learning import content

#: Accounts, the variable that holds the password of each, and whether it may see everybody's work.
PEOPLE = (("demo", "DRYDOCK_DEMO_PASSWORD", False), ("reviewer", "DRYDOCK_REVIEWER_PASSWORD", True))


class Command(BaseCommand):
    """Create or correct the demo's units and accounts; a second run changes nothing."""

    help = (
        "Create or correct the demo's units, and the accounts whose passwords are set: "
        f"{', '.join(f'{name} ({variable})' for name, variable, _ in PEOPLE)}. "
        "Prints `changed …` or `unchanged …` for each."
    )

    def handle(self, *_: Any, **__: Any) -> None:
        """Change what differs."""
        for username, variable, staff in PEOPLE:
            if os.environ.get(variable):
                self.stdout.write(ensure.user(username, variable, staff))
        changed = content.ensure(content.COURSE)
        self.stdout.write(f"changed {', '.join(changed)}" if changed else f"unchanged {len(content.COURSE)} units")

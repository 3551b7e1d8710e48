"""`drydock demo_content`: make the demo's course, and the people who try it, what they should be."""

from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from drydock.accounts import ensure
from drydock.learning import content


class Command(BaseCommand):
    """Create or correct the demo's units and accounts; a second run changes nothing."""

    help = "Create or correct the demo's units, and accounts for who tries them. Prints `changed …` or `unchanged …`."

    def add_arguments(self, parser: CommandParser) -> None:
        """Describe the arguments."""
        for option, who in (("--learner", "an account"), ("--reviewer", "an account that may see everybody's work")):
            variable = f"{who}, and the environment variable that holds its password"
            parser.add_argument(option, nargs=2, metavar=("NAME", "PASSWORD_ENV"), help=variable)

    def handle(self, *_: Any, **options: Any) -> None:
        """Change what differs."""
        for kind, staff in (("learner", False), ("reviewer", True)):
            if options[kind]:
                username, password_env = options[kind]
                self.stdout.write(ensure.user(username, password_env, staff))
        changed = content.ensure(content.COURSE)
        self.stdout.write(f"changed {', '.join(changed)}" if changed else f"unchanged {len(content.COURSE)} units")

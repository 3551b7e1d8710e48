"""`drydock ensure_user`: make an account what it should be."""

from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from drydock.accounts import ensure


class Command(BaseCommand):
    """Create the account or correct it; a second run changes nothing."""

    help = "Create an account or correct its password and staff status. Prints `changed …` or `unchanged …`."

    def add_arguments(self, parser: CommandParser) -> None:
        """Describe the arguments."""
        parser.add_argument("--username", required=True)
        parser.add_argument("--password-env", required=True, metavar="NAME", help="environment variable that holds it")
        parser.add_argument("--staff", action="store_true", help="the account may see everybody's work")

    def handle(self, *_: Any, **options: Any) -> None:
        """Change what differs."""
        self.stdout.write(ensure.user(options["username"], options["password_env"], options["staff"]))

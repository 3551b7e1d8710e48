"""`drydock ensure_user`: make an account what it should be."""

import os
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from drydock.accounts.models import User


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
        username, password = options["username"], os.environ.get(options["password_env"], "")
        if not password:
            raise CommandError(
                f"{options['password_env']} is not set: it holds the password of {username}. Set it in the environment."
            )
        with transaction.atomic(using="core"):
            user, created = User.objects.select_for_update().get_or_create(username=username)
            changes = ["created"] if created else []
            if not user.check_password(password):
                user.set_password(password)
                changes.append("password")
            if user.is_staff != options["staff"]:
                user.is_staff = options["staff"]
                changes.append("staff")
            if not user.is_active:
                user.is_active = True
                changes.append("active")
            if changes:
                user.save()
        self.stdout.write(f"changed {username}: {', '.join(changes)}" if changes else f"unchanged {username}")

"""`drydock ensure_job_service`: make the account in whose name scripts are run."""

from typing import Any

from django.core.management.base import BaseCommand

from drydock.accounts.models import User
from drydock.processor.server import ACCOUNT


class Command(BaseCommand):
    """Create the account if it is missing; one that somebody has switched off stays so."""

    help = "Create the job-service account. Prints `changed …` or `unchanged …`."

    def handle(self, *_: Any, **__: Any) -> None:
        """Create it, without a password: it opens no page."""
        account, created = User.objects.get_or_create(username=ACCOUNT)
        if usable := account.has_usable_password():
            account.set_unusable_password()
            account.save(update_fields=["password"])
        self.stdout.write(f"{'changed' if created or usable else 'unchanged'} {ACCOUNT}")

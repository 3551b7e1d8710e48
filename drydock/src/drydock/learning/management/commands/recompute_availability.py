"""`drydock recompute_availability`: find and repair units that are open or locked for a learner and should not be."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from drydock.accounts.models import User
from drydock.jobs.engine import OVER
from drydock.jobs.models import Job
from drydock.learning import availability

DRIFT_FOUND = 3


class Command(BaseCommand):
    """Repair the drift, or only show it; the last line says how much there was."""

    help = (
        "Recompute which units are open, for all learners. Prints each repair, then `changed …` or `unchanged`."
        f" With --dry-run it changes nothing, and ends with exit code {DRIFT_FOUND} when there is drift."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Describe the arguments."""
        parser.add_argument("--user", metavar="NAME", help="only this learner")
        parser.add_argument("--dry-run", action="store_true", help="show the drift, and change nothing")

    def handle(self, *_: Any, user: str | None, dry_run: bool, **__: Any) -> None:
        """Show what is not as it should be, and repair it."""
        users = None if user is None else [_id_of(user)]
        found = availability.look(users) if dry_run else availability.repair(users)
        for drift in found:
            self.stdout.write(str(drift))
        under_way = Job.objects.using("core").filter(kind=availability.KIND).exclude(state__in=OVER).count()
        if dry_run and found and under_way:
            self.stdout.write(f"{under_way} jobs that recompute availability are under way: look again after them")
        if not found:
            self.stdout.write("unchanged")
        elif dry_run:
            self.stdout.write(f"drift {len(found)}: nothing was changed; run it without --dry-run to repair it")
            raise SystemExit(DRIFT_FOUND)
        else:
            self.stdout.write(f"changed {len(found)}")


def _id_of(name: str) -> int:
    try:
        return User.objects.get(username=name).pk
    except User.DoesNotExist:
        raise CommandError(f"there is nobody named {name}: --user takes the name of an account") from None

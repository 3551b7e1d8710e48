"""`drydock prune_jobs`: remove finished jobs, as the relay does every minute."""

from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from django.template.defaultfilters import pluralize

from drydock.jobs import engine, kinds


class Command(BaseCommand):
    """Remove finished jobs but for the last of each queue."""

    help = "Remove finished jobs, but for the last of each queue. The last line is `changed …` or `unchanged …`."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """Describe the arguments."""
        parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")

    def handle(self, *_: Any, dry_run: bool, **__: Any) -> None:
        """Remove them, database by database."""
        total = 0
        removed = "would remove" if dry_run else "removed"
        for database in kinds.databases():
            number = engine.prune(database, dry_run=dry_run)
            while not dry_run and (more := engine.prune(database)):
                number += more
            self.stdout.write(f"{database}: {removed} {number} job{pluralize(number)}")
            total += number
        what = f"jobs: {removed} {total} finished job{pluralize(total)}"
        self.stdout.write(f"changed {what}" if total else "unchanged jobs: no more than are kept")

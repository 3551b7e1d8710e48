"""`drydock prune_uploads`: remove the temporary files of uploads that were broken off."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError
from django.template.defaultfilters import pluralize

from drydock import config
from drydock.jobs import engine
from drydock.uploads import temporary


class Command(BaseCommand):
    """Remove what is stale; what is being uploaded stays, however old it is."""

    help = "Remove stale temporary upload files of this host. The last line is `changed …` or `unchanged …`."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """Describe the arguments."""
        parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")

    def handle(self, *_: Any, dry_run: bool, **__: Any) -> None:
        """Remove what is stale, kind by kind."""
        files = size = 0
        removed = "would remove" if dry_run else "removed"
        for kind, seconds in config.load().upload_stale_seconds.items():
            try:
                pruned = temporary.prune(kind, seconds, dry_run=dry_run)
            except PermissionError as error:
                raise CommandError(f"{error}: run this as the user of the web tier.") from error
            self.stdout.write(
                f"{kind}: {removed} {pruned.files} file{pluralize(pruned.files)} of {pruned.size} bytes,"
                f" not written to for {seconds} s"
            )
            files, size = files + pruned.files, size + pruned.size
        if files and not dry_run:
            self._count(files)
        what = f"uploads: {removed} {files} temporary file{pluralize(files)} of {size} bytes"
        self.stdout.write(f"changed {what}" if files else "unchanged uploads: no stale temporary files")

    def _count(self, files: int) -> None:
        try:
            engine.tally("plugins", "uploads", "pruned", files)
        except DatabaseError as error:
            # The files are gone; only the figure is short.
            self.stderr.write(f"drydock: the database plugins did not take the count: {error}".strip())

"""`drydock prepare_latex`: build the LaTeX font cache, so that the first document need not wait for it."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from drydock import config
from drydock.documents import latex


class Command(BaseCommand):
    """Check that the engine runs safely here and build its font cache; a second run changes nothing."""

    help = "Build the font cache of the configured LaTeX engine. Prints `changed …` or `unchanged …`."
    requires_system_checks = ()

    def handle(self, *_: Any, **__: Any) -> None:
        """Build the cache if it is missing."""
        settings = config.load()
        before = (settings.data_dir / f"font-cache-{settings.latex_engine}").is_dir()
        try:
            cache = latex.prepare_font_cache()
        except (RuntimeError, OSError) as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"{'unchanged' if before else 'changed'} {cache}")

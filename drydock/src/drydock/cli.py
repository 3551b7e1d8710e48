"""The `drydock` command: Django's management commands under this platform's settings."""

import os
import sys

from django.core.management import execute_from_command_line


def main() -> None:
    """Run the management command that the arguments name."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "drydock.settings")
    execute_from_command_line(sys.argv)

"""The `drydock` command: Django's management commands under this platform's settings."""

import os
import sys


def main() -> None:
    """Run the management command that the arguments name."""
    if sys.argv[1:2] == ["check_processor"]:
        # Asked every few seconds: it must not cost a start of Django.
        from drydock.processor import client

        sys.exit(client.main(sys.argv[2:]))
    from django.core.management import execute_from_command_line

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "drydock.settings")
    execute_from_command_line(sys.argv)

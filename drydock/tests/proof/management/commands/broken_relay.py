"""`drydock broken_relay --without DUTY`: the relay with one of its duties left out, to see that the proof notices."""

from functools import partial
from typing import Any

from django.core.management.base import CommandParser

from drydock.jobs import relay
from drydock.jobs.management.commands import relay as command


class Command(command.Command):
    """The product's relay, but for one duty."""

    def add_arguments(self, parser: CommandParser) -> None:
        """Say which duty is left out."""
        super().add_arguments(parser)
        parser.add_argument("--without", choices=["reaper", "second-bell"], required=True)

    def handle(self, *args: Any, without: str, **options: Any) -> None:
        """Leave the duty out and work."""
        if without == "reaper":
            command.Relay = partial(relay.Relay, duties=(relay.ring,))  # type: ignore[assignment, misc]
        else:
            relay.DUE = relay.DUE.replace("state = 'queued'", "state = 'queued' AND bells = 0")
        super().handle(*args, **options)

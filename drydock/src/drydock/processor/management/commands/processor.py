"""`drydock processor`: run scripts for the workers."""

import logging
import signal
import threading
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from drydock import config
from drydock.jobs.listening import address_and_port
from drydock.processor import preparation, runs, server

logger = logging.getLogger(__name__)


class Command(BaseCommand):
    """Serve until SIGTERM; then end the runs, which the workers have run again, and exit 0."""

    help = "Run scripts (exports) for the workers, each in a process of its own."

    def add_arguments(self, parser: CommandParser) -> None:
        """Say where requests are answered."""
        parser.add_argument("--listen", type=address_and_port, default="127.0.0.1:8002", metavar="ADDRESS:PORT")

    def handle(self, *_: Any, listen: tuple[str, int], **__: Any) -> None:
        """Serve until a signal ends it."""
        stopping = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_signal: stopping.set())
        preparation.prepare(config.load())
        runs.remove_leftovers()
        try:
            serving = server.Server(*listen)
        except OSError as error:
            raise CommandError(f"cannot listen on {listen[0]}:{listen[1]}: {error.strerror}") from error
        keeper = threading.Thread(target=server.keep_alive, args=[serving, stopping], name="heartbeat")
        keeper.start()
        threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.1}, name="http").start()
        logger.info("%s runs up to %d scripts at once", serving.url, serving.runs.slots)
        stopping.wait()
        # Workers that wait for a run learn that it was stopped before the door closes.
        serving.runs.close()
        serving.shutdown()
        serving.server_close()
        keeper.join()

"""`drydock relay`: ring for jobs that are due, bring back those that were lost, remove finished ones."""

import http.server
import json
import signal
import threading
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from drydock.jobs.listening import address_and_port
from drydock.jobs.relay import STALLED_SECONDS, Relay


class Command(BaseCommand):
    """Run until SIGTERM; several may run at the same time."""

    help = "Ring for jobs that are due, bring back those whose worker was lost, and remove finished ones."

    def add_arguments(self, parser: CommandParser) -> None:
        """Say where the health check is answered."""
        parser.add_argument("--listen", type=address_and_port, metavar="ADDRESS:PORT", help="answer GET /health here")

    def handle(self, *_: Any, listen: tuple[str, int] | None, **__: Any) -> None:
        """Work until a signal ends it."""
        relay = Relay()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_signal: relay.stop())
        if listen:
            try:
                server = http.server.ThreadingHTTPServer(listen, _handler(relay))
            except OSError as error:
                raise CommandError(f"cannot listen on {listen[0]}:{listen[1]}: {error.strerror}") from error
            threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
        relay.run()


def _handler(relay: Relay) -> type[http.server.BaseHTTPRequestHandler]:
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stalled = relay.stalled()
            status = {"status": "stalled" if stalled else "alive", "databases": sorted(relay.passed)}
            if stalled:
                status["message"] = f"no pass over {', '.join(stalled)} has succeeded for {STALLED_SECONDS:g} s"
            self.send_response(503 if stalled else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(status).encode())

        def log_message(self, *_: object) -> None:
            """Stay silent: it is asked every few seconds."""

    return Health

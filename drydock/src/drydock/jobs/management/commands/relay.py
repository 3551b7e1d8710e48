"""`drydock relay`: ring for jobs that are due, bring back those that were lost, remove finished ones."""

import http.server
import json
import re
import signal
import threading
from typing import Any

from celery.utils.nodenames import gethostname, nodename
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections
from django.utils.crypto import constant_time_compare

from drydock.config import load
from drydock.jobs.listening import address_and_port
from drydock.jobs.relay import STALLED_SECONDS, Relay
from drydock.operations import broker
from drydock.processor import client

WORKER = re.compile(r"[A-Za-z0-9._-]{1,64}")
PING_SECONDS = 5.0


class Command(BaseCommand):
    """Run until SIGTERM; several may run at the same time."""

    help = "Ring for jobs that are due, bring back those whose worker was lost, and remove finished ones."

    def add_arguments(self, parser: CommandParser) -> None:
        """Say where the health check is answered."""
        parser.add_argument(
            "--listen", type=address_and_port, metavar="ADDRESS:PORT", help="answer GET /health and /ping/<worker> here"
        )
        parser.add_argument(
            "--processor", default="", metavar="URL", help="the script processor of this host, for GET /ping-processor"
        )

    def handle(self, *_: Any, listen: tuple[str, int] | None, processor: str, **__: Any) -> None:
        """Work until a signal ends it."""
        relay = Relay()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_signal: relay.stop())
        if listen:
            try:
                server = http.server.ThreadingHTTPServer(listen, _handler(relay, processor))
            except OSError as error:
                raise CommandError(f"cannot listen on {listen[0]}:{listen[1]}: {error.strerror}") from error
            threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
        relay.run()


def _handler(relay: Relay, processor: str) -> type[http.server.BaseHTTPRequestHandler]:
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, worker = self.path.removeprefix("/").partition("/")
            asks_processor = bool(processor) and self.path == "/ping-processor"
            if path == "health" and not worker:
                self._answer(*_health(relay))
            elif not asks_processor and (path != "ping" or not WORKER.fullmatch(worker)):
                known = "There are /health, /ping/<name of a worker> and, with --processor, /ping-processor."
                self._answer(404, {"code": "NOT_FOUND", "message": known})
            elif not constant_time_compare(self.headers.get("Authorization", ""), f"Bearer {load().internal_token}"):
                self._answer(401, {"code": "UNAUTHORIZED", "message": "The bearer token is missing or wrong."})
            elif asks_processor:
                self._answer(*_ping_processor(processor))
            else:
                self._answer(*_ping(worker))

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            """Stay silent: it is asked every few seconds."""

    return Health


def _health(relay: Relay) -> tuple[int, dict[str, Any]]:
    status: dict[str, Any] = {"status": "alive", "databases": sorted(relay.passed)}
    if stalled := relay.stalled():
        message = f"no pass over {', '.join(stalled)} has succeeded for {STALLED_SECONDS:g} s"
        status |= {"status": "stalled", "message": message}
    return 503 if stalled else 200, status


def _ping(worker: str) -> tuple[int, dict[str, Any]]:
    """Ask the worker of this name on this host, through the broker."""
    try:
        result = broker.ping_worker(nodename(worker, gethostname()), PING_SECONDS)
    finally:
        # This thread's own.
        connections.close_all()
    return 200 if result["ok"] else 503, result


def _ping_processor(url: str) -> tuple[int, dict[str, Any]]:
    """Log in at the script processor and list its scripts, with the workers' own client."""
    settings = load()
    try:
        return 200, {
            "ok": True,
            "message": client.check(url, settings.internal_token, settings.platform_ca_file, ["export"]),
        }
    except (client.ProcessorError, OSError, ValueError) as error:
        return 503, {"ok": False, "message": str(error)}

"""The HTTP side of a processor: logins, the list of scripts, runs.

The internal token opens nothing but a login, and a login gives a short session of the account `job-service`. So every
run is made in the name of an account that stands in the database, whose login an operator can see and switch off; and
since that account has no password, nobody can sign in as it on the pages.
"""

import http.server
import json
import logging
import re
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

from django.core import signing
from django.db import DatabaseError, connections
from django.db.models.functions import Now
from django.utils.crypto import constant_time_compare

from drydock import config
from drydock.accounts.models import User
from drydock.processor import scripts
from drydock.processor.client import ProcessorError
from drydock.processor.models import Processor
from drydock.processor.runs import Runs

logger = logging.getLogger(__name__)

ACCOUNT = "job-service"
SESSION_SECONDS = 600
SALT = "drydock.processor"
HEARTBEAT_SECONDS = 5.0
MAX_WAIT_SECONDS = 5.0
STATUS = {
    "INVALID_INPUT": 400,
    "UNAUTHORIZED": 401,
    "NO_ACCOUNT": 403,
    "NOT_FOUND": 404,
    "UNKNOWN_SCRIPT": 404,
    "UNKNOWN_RUN": 404,
    "DATABASE_AWAY": 503,
    "PROCESSOR_BUSY": 503,
    "PROCESSORS_DISABLED": 503,
}
RUN = re.compile(r"/runs/([0-9a-f-]{1,60})")

Answer = tuple[int, dict[str, Any]]


class Server(http.server.ThreadingHTTPServer):
    """A processor that answers."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, address: str, port: int) -> None:
        settings = config.load()
        self.runs = Runs(settings.script_processors, settings.export_time_limit_seconds)
        super().__init__((address, port), Handler)
        scheme = "http"
        if settings.processor_certificate:
            scheme = "https"
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(settings.processor_certificate, settings.processor_key)
            # Greeted by the connection's own thread: a client that says nothing holds up nobody.
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"{scheme}://{socket.gethostname()}:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log what a client did wrong as one line."""
        logger.info("a request of %s ended early", client_address, exc_info=True)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    server_version = "drydock-processor"
    # Of a client that says nothing: a shutdown waits for those, too.
    timeout = 5

    def _answer(self) -> None:
        try:
            status, body = self._route()()
        except ProcessorError as error:
            status, body = STATUS[error.code], {"code": error.code, "message": str(error)}
        except DatabaseError as error:
            logger.warning("a database does not answer: %s", error)
            status, body = 503, {"code": "DATABASE_AWAY", "message": "a database does not answer; see the log"}
        finally:
            connections.close_all()
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = _answer  # noqa: N815 - the base class' names

    def _route(self) -> Callable[[], Answer]:
        """Return what answers this request, once the caller may have it."""
        path = urlsplit(self.path).path
        asked = f"{self.command} {path}"
        if asked == "GET /health":
            return self._health
        if asked == "POST /login":
            return self._login
        self._require_session()
        if asked == "GET /scripts":
            return self._scripts
        if asked == "POST /runs":
            return self._start
        if match := RUN.fullmatch(path):
            run_id = match[1]
            if self.command == "GET":
                return lambda: self._describe(run_id)
            if self.command == "DELETE":
                return lambda: self._stop(run_id)
        raise ProcessorError("NOT_FOUND", f"nothing answers {asked}")

    def _health(self) -> Answer:
        return 200, {"status": "alive", "slots": self.server.runs.slots, "busy": self.server.runs.busy()}

    def _login(self) -> Answer:
        if not constant_time_compare(self._bearer(), config.load().internal_token):
            raise ProcessorError("UNAUTHORIZED", "the bearer token is missing or wrong (DRYDOCK_INTERNAL_TOKEN)")
        account = User.objects.filter(username=ACCOUNT).first()
        if account is None:
            raise ProcessorError("NO_ACCOUNT", f"there is no account {ACCOUNT} (yet): drydock ensure_job_service")
        if not account.is_active:
            raise ProcessorError("NO_ACCOUNT", f"the account {ACCOUNT} is switched off (is_active)")
        return 200, {"account": ACCOUNT, "session": signing.dumps(ACCOUNT, salt=SALT)}

    def _require_session(self) -> None:
        try:
            signing.loads(self._bearer(), salt=SALT, max_age=SESSION_SECONDS)
        except signing.BadSignature:
            raise ProcessorError("UNAUTHORIZED", "there is no session, or it is over: POST /login") from None

    def _bearer(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _scripts(self) -> Answer:
        return 200, {"scripts": scripts.registered()}

    def _start(self) -> Answer:
        body = self._body()
        script, parameters = body.get("script"), body.get("parameters")
        job, attempt = body.get("job"), body.get("attempt")
        if not (isinstance(script, str) and isinstance(parameters, dict)):
            raise ProcessorError("INVALID_INPUT", "script must be text and parameters an object")
        if not (isinstance(job, str) and isinstance(attempt, int)):
            raise ProcessorError("INVALID_INPUT", "job must be text and attempt a whole number")
        return 202, {"id": self.server.runs.start(script, parameters, job=job, attempt=attempt).id}

    def _describe(self, run_id: str) -> Answer:
        run = self.server.runs.get(run_id)
        try:
            wait = float(parse_qs(urlsplit(self.path).query).get("wait", ["0"])[0])
        except ValueError:
            raise ProcessorError("INVALID_INPUT", "wait must be a number of seconds") from None
        run.over.wait(max(0.0, min(wait, MAX_WAIT_SECONDS)))
        return 200, run.describe()

    def _stop(self, run_id: str) -> Answer:
        self.server.runs.stop(run_id)
        return 200, {}

    def _body(self) -> dict[str, Any]:
        try:
            # Whoever gets here has a session: what they send is small.
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise ProcessorError("INVALID_INPUT", "the body must be a JSON object")
        return body

    def log_message(self, *_: object) -> None:
        """Stay silent: it is asked every second."""


def keep_alive(server: Server, over: threading.Event) -> None:
    """Register the scripts and tell every few seconds that this processor lives; at the end take that back.

    In a thread of its own, so that no database holds the start up.
    """
    registered = False
    while True:
        try:
            if not registered:
                if names := scripts.register():
                    logger.info("registered %s", ", ".join(names))
                registered = True
            if over.is_set():
                Processor.objects.filter(url=server.url).delete()
                return
            Processor.objects.update_or_create(
                url=server.url,
                defaults={"slots": server.runs.slots, "busy": server.runs.busy(), "heartbeat": Now()},
            )
        except DatabaseError as error:
            logger.warning("the plugins database does not take the heartbeat: %s", error)
            if over.is_set():
                return
        finally:
            connections.close_all()
        over.wait(HEARTBEAT_SECONDS)

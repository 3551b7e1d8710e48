"""What workers and the health check say to a script processor. Standard library only: it starts in milliseconds.

`python -m drydock.processor.client` (also `drydock check_processor`) is the health check: a login and a listing.
"""

import argparse
import http.client
import json
import os
import ssl
import sys
from contextlib import closing
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 8.0
CONNECT_SECONDS = 3.0


class State(StrEnum):
    """Where a run can be.

    `lost`: killed by somebody else, such as the kernel, or never begun; `stopped`: on request, or at the shutdown.
    """

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    LOST = "lost"
    STOPPED = "stopped"


class ProcessorError(Exception):
    """A processor did not do what it was asked for: `code` is for programs, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Client:
    """One processor, seen by a machine that holds the internal token."""

    def __init__(self, url: str, token: str, ca_file: str = "") -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        self.host, self.path = parts.netloc, parts.path
        self.token = token
        self.tls = ssl.create_default_context(cafile=ca_file or None) if url.startswith("https://") else None
        self.session = ""

    def login(self) -> str:
        """Open a session; return the name of the account whose session it is."""
        answer = self._send("POST", "/login", self.token)
        self.session = answer["session"]
        return str(answer["account"])

    def scripts(self) -> list[str]:
        """Return the names of the scripts that the processor has registered."""
        return list(self._call("GET", "/scripts")["scripts"])

    def slots(self) -> tuple[int, int]:
        """Return how many slots there are and how many of them are busy."""
        answer = self._send("GET", "/health", "")
        return answer["slots"], answer["busy"]

    def start(self, script: str, parameters: dict[str, Any], *, job: str, attempt: int) -> str:
        """Start a run for this attempt of a job and return its id; asking again gives the same run."""
        order = {"script": script, "parameters": parameters, "job": job, "attempt": attempt}
        return str(self._call("POST", "/runs", order)["id"])

    def run(self, run_id: str, *, wait_seconds: float = 0) -> dict[str, Any]:
        """Describe a run: at once when it is over, else after this time."""
        return self._call("GET", f"/runs/{run_id}?wait={wait_seconds:g}")

    def stop(self, run_id: str) -> None:
        """End a run that may still be going on, and forget it."""
        self._call("DELETE", f"/runs/{run_id}")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request of the session; a session that is over is opened anew, once."""
        if not self.session:
            self.login()
        try:
            return self._send(method, path, self.session, body)
        except ProcessorError as error:
            if error.code != "UNAUTHORIZED":
                raise
        self.login()
        return self._send(method, path, self.session, body)

    def _send(self, method: str, path: str, bearer: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {bearer}"} if bearer else {})
        try:
            with closing(self._connect()) as connection:
                connection.request(
                    method, self.path + path, json.dumps(body).encode() if body is not None else None, headers
                )
                response = connection.getresponse()
                content = response.read()
            if response.status < 400:
                return dict(json.loads(content))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ProcessorError("UNREACHABLE", f"the script processor {self.url} does not answer: {error}") from error
        try:
            answer = json.loads(content)
            raise ProcessorError(str(answer["code"]), str(answer["message"]))
        except (ValueError, TypeError, LookupError) as error:
            raise ProcessorError("UNREACHABLE", f"the script processor {self.url} answers {response.status}") from error

    def _connect(self) -> http.client.HTTPConnection:
        """Connect, and fail soon where a host is gone: there may be another one to ask."""
        connection: http.client.HTTPConnection
        if self.tls:
            connection = http.client.HTTPSConnection(self.host, timeout=CONNECT_SECONDS, context=self.tls)
        else:
            connection = http.client.HTTPConnection(self.host, timeout=CONNECT_SECONDS)
        connection.connect()
        connection.sock.settimeout(TIMEOUT_SECONDS)
        return connection


def check(url: str, token: str, ca_file: str, needed: list[str]) -> str:
    """Log in, list the scripts and say in one line what there is; a ProcessorError says what is wrong."""
    client = Client(url, token, ca_file)
    account = client.login()
    scripts = client.scripts()
    if missing := sorted(set(needed) - set(scripts)):
        raise ProcessorError(
            "NOT_REGISTERED",
            f"the script processor {url} has not registered {', '.join(missing)} (yet): drydock register_scripts",
        )
    slots, busy = client.slots()
    listed = ", ".join(scripts) or "none"
    return f"{url}: logged in as {account}; scripts: {listed}; {busy} of {slots} slots busy"


def main(arguments: list[str] | None = None) -> int:
    """Check every configured processor, one line for each."""
    parser = argparse.ArgumentParser(prog="drydock check_processor", description=__doc__)
    configured = os.environ.get("PROCESSOR_URL", "").replace(",", " ").split() or ["http://127.0.0.1:8002"]
    parser.add_argument("--url", action="append", help="check this one; default: those of PROCESSOR_URL")
    parser.add_argument("--script", action="append", default=[], help="it must be registered; default: export")
    options = parser.parse_args(arguments)
    token = os.environ.get("DRYDOCK_INTERNAL_TOKEN", "")
    if not token:
        print(  # noqa: T201
            "DRYDOCK_INTERNAL_TOKEN is not set: it is the bearer token of the internal endpoints."
            " Set it in the environment, for example DRYDOCK_INTERNAL_TOKEN=<random text>",
            file=sys.stderr,
        )
        return 2
    status = 0
    for url in options.url or configured:
        try:
            line = check(url, token, os.environ.get("PLATFORM_CA_FILE", ""), options.script or ["export"])
            print(line)  # noqa: T201
        except (ProcessorError, OSError, ValueError) as error:
            print(f"not healthy: {error}", file=sys.stderr)  # noqa: T201
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())

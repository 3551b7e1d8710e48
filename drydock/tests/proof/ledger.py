"""The user's side of the proof: what was accepted, written down, and what the platform made of it.

    python -m proof.ledger accept --base https://app.example.org --username NAME --number 100 --kind export ledger.jsonl
    python -m proof.ledger check  --base https://app.example.org --username NAME --wait 300 ledger.jsonl

It speaks HTTP and needs Python alone, so that it runs beside any platform while its hosts fail. Each acceptance has
an idempotency key; without a 2xx it is asked for again with the same key, until there is one. From then on it is the
platform's promise, and stands in the file (one JSON object in each line, synchronised to the disk). The password is in
the environment variable LEDGER_PASSWORD. `check` exits with 1 when a promise is broken.
"""

import argparse
import hashlib
import http.client
import itertools
import json
import os
import ssl
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

DOCUMENT = r"\documentclass{article}\begin{document}Ledger %d\end{document}"
# What is asked for; the number tells them apart.
KINDS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "export": ("/api/exports", lambda _: {"format": "csv"}),
    "document": ("/api/documents", lambda number: {"title": f"Ledger {number}", "source": DOCUMENT % number}),
    # Of the harness: one in fifty is asked to fail.
    "proof": ("/api/proof", lambda number: {"fails": number % 50 == 49}),
}
DONE, FAILED = {"done", "ready", "compiled"}, {"failed"}
UNREACHABLE = (OSError, http.client.HTTPException)
ASKED_TWICE = 200
# The rate limit and a database that is away: both say when to come again.
LATER, SAME_AGAIN_TRIES = (429, 503), 20
# Before a request is sent again, when its answer does not say how long to wait.
PAUSE_SECONDS = 0.2


# --- One signed-in person ---------------------------------------------------------------------------------------------


@dataclass
class Person:
    """Somebody who signs in; each thread has a connection of its own, all share the session."""

    base: str
    ca: str
    username: str
    password: str
    cookies: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tls = ssl.create_default_context(cafile=self.ca or None)
        self._local = threading.local()
        self._signing_in = threading.Lock()

    def send(self, method: str, path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes, Any]:
        """Send one request over this thread's connection; what fails of it is raised."""
        headers |= {"Referer": self.base, "X-CSRFToken": self.cookies.get("csrftoken", "")}
        headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        connection = self._connection()
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            body = response.read()
        except BaseException:
            connection.close()
            raise
        for line in response.headers.get_all("Set-Cookie", []):
            self.cookies |= {name: morsel.value for name, morsel in SimpleCookie(line).items()}
        return response.status, body, response.headers

    def _connection(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            parts = urlsplit(self.base)
            if parts.scheme == "https":
                connection = http.client.HTTPSConnection(parts.netloc, timeout=30, context=self._tls)
            else:
                connection = http.client.HTTPConnection(parts.netloc, timeout=30)
            self._local.connection = connection
        return connection

    def sign_in(self) -> None:
        """Sign in through the form."""
        with self._signing_in:
            self.send("GET", "/login")
            token = self.cookies.get("csrftoken", "")
            form = {
                "username": self.username,
                "password": self.password,
                "csrfmiddlewaretoken": token,
            }
            kind = {"Content-Type": "application/x-www-form-urlencoded"}
            status, _, _ = self.send("POST", "/login", urlencode(form).encode(), **kind)
            if status != 302:
                raise PermissionError(f"{self.username} could not sign in (status {status}): is the password right?")


# --- The file ---------------------------------------------------------------------------------------------------------


class Ledger:
    """What was asked for and what was accepted, durably."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: dict[str, dict[str, Any]] = {}
        self.accepted: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        if path.exists():
            for line in path.read_text().splitlines():
                self._take(json.loads(line))
        self._file = path.open("a")

    def _take(self, entry: dict[str, Any]) -> None:
        (self.accepted if "location" in entry else self.asked)[entry["key"]] = entry

    def write(self, *entries: dict[str, Any]) -> None:
        """Note entries; they are on the disk when this returns."""
        with self._lock:
            for entry in entries:
                self._take(entry)
                self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def unanswered(self) -> list[dict[str, Any]]:
        """Return what was asked for and not accepted: nobody knows yet whether it was."""
        return [entry for key, entry in self.asked.items() if key not in self.accepted]


# --- Accepting --------------------------------------------------------------------------------------------------------


class Acceptance:
    """Asks for jobs from several threads, until each is accepted."""

    def __init__(self, person: Person, ledger: Ledger, *, patience_seconds: float = 120) -> None:
        self.person, self.ledger, self.patience_seconds = person, ledger, patience_seconds
        self.retries = itertools.count()

    def run(self, kind: str, number: int, threads: int = 4, per_second: float = 0) -> None:
        """Ask for so many jobs, and for those again that the file has as unanswered."""
        first = len(self.ledger.asked)
        make = KINDS[kind][1]
        self.ledger.write(*({"key": uuid.uuid4().hex, "kind": kind, "body": make(first + n)} for n in range(number)))
        start = time.monotonic()

        def ask(item: tuple[int, dict[str, Any]]) -> None:
            if per_second:
                time.sleep(max(0.0, start + item[0] / per_second - time.monotonic()))
            self.ask(item[1])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(ask, enumerate(self.ledger.unanswered())))

    def ask(self, entry: dict[str, Any]) -> None:
        """Ask for one job until it is accepted, and write that down."""
        deadline = time.monotonic() + self.patience_seconds
        why = ""
        while time.monotonic() < deadline:
            pause = PAUSE_SECONDS
            try:
                status, body, headers = post(self.person, entry)
                if 200 <= status < 300:
                    location = headers["Location"]
                    self.ledger.write({"key": entry["key"], "location": location, "at": time.time()})
                    return
                why = f"status {status}: {body[:200].decode(errors='replace')}"
                if status in (401, 403):
                    self.person.sign_in()
                elif status < 500 and status != 429:
                    break
                else:
                    pause = max(pause, float(headers.get("Retry-After") or 0))
            except UNREACHABLE as error:
                why = repr(error)
            next(self.retries)
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        raise RuntimeError(f"a {entry['kind']} was not accepted within {self.patience_seconds:g} s: {why}")


def post(person: Person, entry: dict[str, Any]) -> tuple[int, bytes, Any]:
    """Ask for one job, with its key."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": entry["key"]}
    return person.send("POST", KINDS[entry["kind"]][0], json.dumps(entry["body"]).encode(), **headers)


# --- Checking ---------------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """What became of everything that was accepted."""

    accepted: int = 0
    done: int = 0
    failed: int = 0
    # Accepted, and not over in time, or not known any more.
    lost: list[str] = field(default_factory=list)
    # Done, and its result is not there, or is there more than once.
    effects_missing: list[str] = field(default_factory=list)
    effects_doubled: list[str] = field(default_factory=list)
    # Failed, and nobody says why.
    unexplained: list[str] = field(default_factory=list)
    # The same key asked for again gave something else.
    accepted_twice: list[str] = field(default_factory=list)
    # From acceptance to end, as far as the platform tells.
    delays: list[float] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)

    def broken(self) -> list[str]:
        """Return the promises that were not kept."""
        promises = {
            "lost": self.lost,
            "without the effect": self.effects_missing,
            "with more than one effect": self.effects_doubled,
            "failed without a reason": self.unexplained,
            "accepted twice": self.accepted_twice,
        }
        return [f"{len(keys)} {what} (for example {keys[0]})" for what, keys in promises.items() if keys]

    def note(self, location: str, said: dict[str, Any], effects: int) -> None:
        """Take down how one job ended."""
        if said["state"] in FAILED:
            self.failed += 1
            reason = said.get("reason", "")
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            if not reason:
                self.unexplained.append(location)
        else:
            self.done += 1
        if effects < (said["state"] in DONE):
            self.effects_missing.append(location)
        if effects > (said["state"] in DONE):
            self.effects_doubled.append(location)
        times = said if "finished" in said else said.get("job") or {}
        if times.get("finished"):
            took = datetime.fromisoformat(times["finished"]) - datetime.fromisoformat(times["created"])
            self.delays.append(took.total_seconds())


def check(
    person: Person, ledger: Ledger, *, wait_seconds: float, threads: int = 4, asked_twice: int = ASKED_TWICE
) -> Findings:
    """Wait until everything that was accepted is over, and see what became of it.

    `asked_twice` keys are asked for again; where the platform has a rate limit, it must allow so many at once.
    """
    findings = Findings(accepted=len(ledger.accepted))
    deadline = time.monotonic() + wait_seconds
    waiting = [entry["location"] for entry in ledger.accepted.values()]
    with ThreadPoolExecutor(threads) as pool:
        while waiting:
            over = list(pool.map(lambda location: _ended(person, location), waiting))
            for location, end in zip(waiting, over, strict=True):
                if end:
                    findings.note(location, *end)
            waiting = [location for location, end in zip(waiting, over, strict=True) if not end]
            if time.monotonic() > deadline:
                break
            time.sleep(0.5 if waiting else 0)
        findings.lost = waiting
        keys = list(ledger.accepted)[:: max(1, -(-len(ledger.accepted) // asked_twice))]
        again = pool.map(lambda key: _same_again(person, ledger, key), keys)
        findings.accepted_twice = [
            ledger.accepted[key]["location"] for key, same in zip(keys, again, strict=True) if not same
        ]
    return findings


def _ended(person: Person, location: str) -> tuple[dict[str, Any], int] | None:
    """Return how a job ended and how many effects it has; None while it is not over or nobody answers."""
    try:
        status, body, _ = person.send("GET", location)
        if status in (401, 403):
            person.sign_in()
        if status != 200:
            return None
        said = json.loads(body)
        if said["state"] not in DONE | FAILED:
            return None
        return said, _effects(person, said)
    except UNREACHABLE:
        return None


def _effects(person: Person, said: dict[str, Any]) -> int:
    """Count the results: as the platform does, or fetch the file that there should be."""
    if "effects" in said:
        return int(said["effects"])
    path = said.get("download") or (said.get("pdf") or {}).get("url")
    if not path:
        return 0
    status, body, headers = person.send("GET", path)
    return int(status == 200 and f'"{hashlib.sha256(body).hexdigest()}"' == headers["ETag"])


def _same_again(person: Person, ledger: Ledger, key: str) -> bool:
    """Ask for the same once more, as often as it is told to come later: it must be the same."""
    for _ in range(SAME_AGAIN_TRIES):
        try:
            status, _, headers = post(person, ledger.asked[key])
        except UNREACHABLE:
            return False
        if status not in LATER:
            return 200 <= status < 300 and headers["Location"] == ledger.accepted[key]["location"]
        time.sleep(float(headers["Retry-After"] or 1))
    return False


# --- Figures and the command ------------------------------------------------------------------------------------------


def quantile(values: Iterable[float], share: float) -> float:
    """Return the value that this share of the values does not exceed; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m proof.ledger", description="Accept jobs; see what became of them.")
    parser.add_argument("command", choices=["accept", "check"])
    parser.add_argument("file", type=Path, help="what was asked for and accepted; made when it is not there")
    parser.add_argument("--base", required=True, help="address of the platform, https://…")
    parser.add_argument("--ca", default="", help="file with its certificate authority (default: the system's)")
    parser.add_argument("--username", required=True)
    parser.add_argument("--kind", choices=sorted(KINDS), default="export", help="accept: what is asked for")
    parser.add_argument("--number", type=int, default=100, help="accept: how many")
    parser.add_argument("--per-second", type=float, default=0, help="accept: how fast at most")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--patience", type=float, default=120, help="accept: seconds until one job is given up")
    parser.add_argument("--wait", type=float, default=120, help="check: seconds until what is not over is lost")
    chosen = parser.parse_args(arguments)
    password = os.environ.get("LEDGER_PASSWORD")
    if not password:
        parser.error("LEDGER_PASSWORD is not set: it is the password of --username. Set it in the environment.")
    person = Person(chosen.base.rstrip("/"), chosen.ca, chosen.username, password)
    ledger = Ledger(chosen.file)
    try:
        person.sign_in()
        if chosen.command == "accept":
            acceptance = Acceptance(person, ledger, patience_seconds=chosen.patience)
            acceptance.run(chosen.kind, chosen.number, chosen.threads, chosen.per_second)
            say({"accepted": len(ledger.accepted), "retries": next(acceptance.retries)})
            return 0
    except (*UNREACHABLE, RuntimeError) as error:
        sys.stderr.write(f"{error}\nWhat was accepted stands in {chosen.file}; run the same again to go on.\n")
        return 1
    findings = check(person, ledger, wait_seconds=chosen.wait, threads=chosen.threads)
    delays = {"p50": quantile(findings.delays, 0.5), "p95": quantile(findings.delays, 0.95)}
    delays["worst"] = max(findings.delays, default=0.0)
    say(asdict(findings) | {"delays": delays, "broken": findings.broken()})
    return 1 if findings.broken() else 0


def say(report: dict[str, Any]) -> None:
    """Print a report for people and programs."""
    sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())

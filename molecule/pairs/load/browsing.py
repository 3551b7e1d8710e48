"""People who look at pages through the platform's address: so many requests a second, whatever became of the ones before."""

from __future__ import annotations

import itertools
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import requests
from requests.adapters import HTTPAdapter

from .figures import Request
from .places import Platform

PATIENCE_SECONDS = 30
#: Pages, and whether one must be signed in to see them. Documents are in cluster core, exports in plugins.
PAGES = (("/login", False), ("/documents/", True), ("/login", False), ("/exports/", True))
#: As many may be waiting as come in while nobody answers.
MOST_WAITING = 400


class Browsing:
    """A stranger whose every request is a connection of its own, and somebody signed in whose connections are kept."""

    def __init__(self, platform: Platform, username: str, password: str, per_second: float) -> None:
        self.platform, self.username, self.password = platform, username, password
        self.period_seconds = 1 / per_second
        self.requests: list[Request] = []
        #: when a page was asked for once more
        self.asked_again: list[float] = []
        self._person, self._stranger = self._session(), self._session()
        self._stranger.headers["Connection"] = "close"
        self._signing_in = threading.Lock()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="browsing", daemon=True)

    def _session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False
        session.verify = str(self.platform.ca)
        session.mount("https://", HTTPAdapter(pool_maxsize=16))
        return session

    def sign_in(self) -> None:
        """Sign in through the form."""
        url = f"{self.platform.url}/login"
        with self._signing_in:
            page = self._person.get(url, timeout=PATIENCE_SECONDS)
            token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.text)
            form = {"username": self.username, "password": self.password, "csrfmiddlewaretoken": token.group(1) if token else ""}
            answer = self._person.post(url, data=form, headers={"Referer": url}, timeout=PATIENCE_SECONDS, allow_redirects=False)
        if answer.status_code != 302:
            raise PermissionError(f"{self.username} could not sign in: status {answer.status_code}")

    def start(self) -> None:
        self.sign_in()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        due = time.monotonic()
        for page, signed_in in itertools.cycle(PAGES):
            if self._stop.wait(max(0.0, due - time.monotonic())):
                return
            self._pool.submit(self._look, page, signed_in)
            due += self.period_seconds

    def _look(self, page: str, signed_in: bool) -> None:
        began = time.monotonic()
        try:
            answer = self._get(self.platform.url + page, self._person if signed_in else self._stranger)
            why = "" if answer.status_code == 200 else str(answer.status_code)
            if signed_in and answer.status_code == 302:
                why = "session lost"
        except requests.RequestException as error:
            why = reason(error)
        self.requests.append(Request(began, time.monotonic() - began, f"{page} {why}" if why else ""))
        if why == "session lost":
            self.sign_in()

    def _get(self, url: str, session: requests.Session) -> requests.Response:
        """As browsers do, once more when a kept connection was closed instead of an answer: a proxy that is reloaded closes those
        that are idle, and a request may be on its way (RFC 9112, 9.5)."""
        try:
            return session.get(url, timeout=PATIENCE_SECONDS, allow_redirects=False)
        except requests.ConnectionError as error:
            if session is self._stranger or reason(error) not in ("connection closed", "connection reset"):
                raise
        self.asked_again.append(time.monotonic())
        return session.get(url, timeout=PATIENCE_SECONDS, allow_redirects=False)


def reason(error: requests.RequestException) -> str:
    """What kept a client from an answer, in a word or two."""
    text = str(error)
    known = {
        "timed out": "no answer in time",
        "refused": "connection refused",
        "No route to host": "no route",
        "reset by peer": "connection reset",
        "without response": "connection closed",
        "SSL": "no TLS",
    }
    return next((words for part, words in known.items() if part in text), type(error).__name__)

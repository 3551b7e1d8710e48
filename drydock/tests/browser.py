"""A small HTTP client that behaves as a browser or a script of a signed-in person does."""

import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from email.message import Message
from http.cookiejar import CookieJar
from typing import Any


@dataclass
class Answer:
    """What the platform answered."""

    status: int
    body: bytes
    headers: Message
    url: str

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Browser:
    """Cookies, CSRF token, Referer."""

    def __init__(self, base: str, tls: ssl.SSLContext) -> None:
        self.base = base
        self.name = ""
        self.cookies = CookieJar()
        handlers = (urllib.request.HTTPSHandler(context=tls), urllib.request.HTTPCookieProcessor(self.cookies))
        self.opener = urllib.request.build_opener(*handlers)

    def request(
        self, method: str, path: str, data: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Send one request and follow redirects, as a browser does; an error status is an answer, too."""
        headers = {"Referer": self.base, **(headers or {})}
        request = urllib.request.Request(self.base + path, data, headers, method=method)  # noqa: S310
        try:
            with self.opener.open(request, timeout=40) as response:
                return Answer(response.status, response.read(), response.headers, response.url)
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read(), error.headers, error.url or "")

    def get(self, path: str, **headers: str) -> Answer:
        """Fetch a page."""
        return self.request("GET", path, headers=headers)

    def csrf(self) -> str:
        """Return the CSRF token that the cookie carries."""
        return next((cookie.value or "" for cookie in self.cookies if cookie.name == "csrftoken"), "")

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        """Send JSON, as a script does."""
        headers = {"Content-Type": "application/json", "X-CSRFToken": self.csrf(), **headers}
        return self.request("POST", path, json.dumps(body).encode(), headers)

    def submit(self, path: str, **fields: str) -> Answer:
        """Send a form, as a browser does."""
        fields["csrfmiddlewaretoken"] = self.csrf()
        return self.request("POST", path, urllib.parse.urlencode(fields).encode())

    def login(self, username: str, password: str) -> Answer:
        """Sign in through the form."""
        self.get("/login")
        return self.submit("/login", username=username, password=password)

"""The contract's checks against a real server, and the proxy's log read from its end."""

from __future__ import annotations

import http.server
import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from module_utils import evenkeel_http

ROOT = Path(__file__).resolve().parents[2]


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers by path; `/late` fails twice before it is well, `/me` needs a token."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def answer(self) -> None:
        Answers.asked.append((self.command, self.path))
        late = [path for _, path in Answers.asked].count("/late") < 3
        told = self.headers.get("Authorization") == "Bearer t0ken" and self.headers.get("Host") == "shop.example.org"
        status = {"/away": 302, "/broken": 500, "/late": 503 if late else 200, "/me": 200 if told else 403}.get(self.path, 200)
        body = b"hello shop"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 302:
            self.send_header("Location", "/broken")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Answers.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def ask(url: str, *checks: dict[str, Any], tries: int = 1) -> list[str]:
    return evenkeel_http.run(url, checks, {"Host": "shop.example.org"}, "", tries, 0.01, 5)


def test_good_answers_are_silent(url: str) -> None:
    front = {"name": "front", "path": "/", "contains": ["shop"]}
    assert ask(url, front, {"name": "me", "path": "/me", "token": "t0ken"}, {"name": "away", "path": "/away", "status": 302}) == []


def test_bad_answers_are_told_without_tokens(url: str) -> None:
    said = ask(
        url,
        {"name": "front", "path": "/", "contains": ["bakery"]},
        {"name": "broken", "path": "/broken", "method": "POST"},
        {"name": "me", "path": "/me", "token": "other"},
    )
    assert said == [
        "front: GET / answered 200 without 'bakery': hello shop",
        "broken: POST /broken answered 500, not 200: hello shop",
        "me: GET /me answered 403, not 200: hello shop",
    ]


def test_only_what_fails_is_asked_again(url: str) -> None:
    assert ask(url, {"name": "front", "path": "/"}, {"name": "late", "path": "/late"}, tries=5) == []
    assert [path for _, path in Answers.asked] == ["/", "/late", "/late", "/late"]


def test_nobody_there_is_told() -> None:
    (said,) = ask("http://127.0.0.1:9", {"name": "front", "path": "/"})
    assert said.startswith("front: GET / got no answer: ")


def load_module() -> Any:
    """The module `proxy_errors` as Python sees it."""
    spec = importlib.util.spec_from_file_location("proxy_errors", ROOT / "library/proxy_errors.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(second: int, status: int, upstream: str = "10.0.0.1:8000") -> str:
    when = f"2026-11-22T12:00:{second:02d}+00:00"
    return json.dumps({"time": when, "method": "GET", "path": "/login", "status": status, "upstream": upstream})


def test_the_log_is_read_from_its_end_to_the_moment(tmp_path: Path) -> None:
    proxy_errors = load_module()
    log = tmp_path / "access.log"
    rows = [entry(1, 500), entry(10, 200), entry(11, 502), entry(12, 503, ""), '{"torn', entry(13, 200)]
    log.write_text("\n".join(rows) + "\n")
    for proxy_errors.BLOCK in (1 << 16, 7):  # a line may lie across many blocks
        assert list(proxy_errors.lines_backwards(log)) == ["", *reversed(rows)]
        found = proxy_errors.since(proxy_errors.lines_backwards(log), 1795348810.5)
        assert [one["status"] for one in found] == [200, 502, 200]

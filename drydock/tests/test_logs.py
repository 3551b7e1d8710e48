"""What the logs keep, and how one finds in them what belongs together."""

import json
import logging
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from browser import Browser
from drydock.jobs import context
from drydock.logs import LineFormatter, QuietPings
from platform_servers import Servers, free_port, wait_for


def record(level: int, message: str, name: str = "celery.app.trace") -> logging.LogRecord:
    return logging.LogRecord(name, level, __file__, 1, message, None, None)


def lines(servers: Servers, name: str, **fields: str) -> list[dict[str, Any]]:
    """Return the lines of a server's log that carry these fields."""
    parsed = [json.loads(line) for line in servers.log(name).splitlines() if line.startswith("{")]
    return [line for line in parsed if fields.items() <= line.items()]


def test_only_pings_that_went_well_are_dropped() -> None:
    keep = QuietPings().filter
    assert not keep(record(logging.INFO, "Task drydock.operations.broker.ping[1] succeeded in 0.001s"))
    assert keep(record(logging.ERROR, "Task drydock.operations.broker.ping[1] raised unexpected: OSError()"))
    assert keep(record(logging.INFO, "Task drydock.exports.tasks.export[1] succeeded in 2s"))
    assert keep(record(logging.INFO, "drydock.operations.broker.ping[1]", "drydock.web"))


def test_a_line_carries_what_is_bound_and_no_more_after_the_block() -> None:
    line = record(logging.INFO, "hello")
    with context.bound(request="r1", user=""):
        context.add(route="/x")
        assert json.loads(LineFormatter().format(line)).items() >= {("request", "r1"), ("route", "/x")}
    assert json.loads(LineFormatter().format(line)).keys() == {"time", "level", "logger", "message"}


def test_every_line_of_a_request_carries_its_id_and_the_answer_does_too(
    servers: Servers, sign_in: Callable[..., Browser]
) -> None:
    person, request = sign_in(), uuid.uuid4().hex
    answer = person.get("/documents/00000000-0000-0000-0000-000000000000/", **{"X-Request-ID": request})
    assert (answer.status, answer.headers.get_all("X-Request-ID")) == (404, [request])
    found = wait_for("both lines", lambda: two(lines(servers, "web", request=request)))
    assert [line["logger"] for line in found] == ["django.request", "gunicorn.access"]
    assert found[0]["route"] == "/documents/<uuid:document_id>/"
    ((user,),) = servers.sql("core", "SELECT id FROM accounts_user WHERE username = %s", person.name)
    assert found[0]["user"] == str(user)


def two(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return found if len(found) > 1 else []


@pytest.mark.parametrize("claimed", ["", "short", "x" * 65, 'with "quotes" in it', "a-line\tbreak-or-so"])
def test_a_request_id_that_looks_wrong_is_replaced(servers: Servers, claimed: str) -> None:
    answer = Browser(servers.url, servers.tls).get("/health", **{"X-Request-ID": claimed})
    assert len(uuid.UUID(answer.headers["X-Request-ID"]).hex) == 32
    assert answer.headers["X-Request-ID"] != claimed


def test_the_lines_of_a_job_carry_the_request_that_caused_it(servers: Servers, sign_in: Callable[..., Browser]) -> None:
    person, request = sign_in(), uuid.uuid4().hex
    body = {"title": "broken", "source": r"\documentclass{article}\begin{document}\nonsense\end{document}"}
    answer = person.post("/api/documents", body, **{"X-Request-ID": request})
    assert answer.status in (201, 202)
    (line, *_) = wait_for("the worker's line", lambda: lines(servers, "latex.compile", request=request), 90)
    assert line["attempt"] == "1"
    assert uuid.UUID(line["job"])
    assert line["kind"]


@pytest.fixture
def without_database(servers: Servers) -> Iterator[Browser]:
    """A web tier whose core database is away."""
    yield from alone(servers, f"postgresql://x@localhost:{free_port()}/x")


@pytest.fixture
def without_tables(servers: Servers) -> Iterator[Browser]:
    """A web tier whose core database has none of its tables."""
    yield from alone(servers, servers.environment["DATABASE_CORE_URL"].replace("/drydock?", "/postgres?"))


def alone(servers: Servers, core: str) -> Iterator[Browser]:
    servers.start_web("web-alone", DATABASE_CORE_URL=core)
    browser = Browser(f"https://localhost:{servers.ports['web-alone']}", servers.tls)
    wait_for("the web tier", lambda: browser.get("/health"))
    yield browser
    servers.stop("web-alone")


def test_an_exception_is_logged_once_and_its_page_needs_no_database(servers: Servers, without_tables: Browser) -> None:
    request = uuid.uuid4().hex
    answer = without_tables.get("/documents/", **{"X-Request-ID": request, "Cookie": "sessionid=" + "a" * 32})
    assert answer.status == 500
    assert "text/html" in answer.headers["Content-Type"]
    assert "Something went wrong" in answer.text
    assert f"<code>{request}</code>" in answer.text
    assert "ProgrammingError" not in answer.text
    found = wait_for("both lines", lambda: two(lines(servers, "web-alone", request=request)))
    assert ["traceback" in line for line in found] == [True, False]
    program = without_tables.get("/api/documents", **{"X-Request-ID": request, "Cookie": "sessionid=" + "a" * 32})
    assert (program.status, program.json["code"]) == (500, "INTERNAL_SERVER_ERROR")
    assert program.json["request"] == request


def test_a_database_that_is_away_is_named_in_one_line_and_its_page_does_not_need_it(
    servers: Servers, without_database: Browser
) -> None:
    request = uuid.uuid4().hex
    answer = without_database.get("/documents/", **{"X-Request-ID": request, "Cookie": "sessionid=" + "a" * 32})
    assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
    assert "text/html" in answer.headers["Content-Type"]
    assert "cannot reach its database" in answer.text
    assert f"<code>{request}</code>" in answer.text
    found = wait_for("both lines", lambda: two(lines(servers, "web-alone", request=request)))
    assert not any("traceback" in line for line in found)
    assert any("a database does not serve" in line["message"] for line in found)
    program = without_database.get("/api/documents", **{"X-Request-ID": request, "Cookie": "sessionid=" + "a" * 32})
    assert (program.status, program.json["code"]) == (503, "DATABASE_UNAVAILABLE")
    assert program.json["request"] == request
    missing = without_database.get("/nowhere", Cookie="sessionid=" + "a" * 32)
    assert missing.status == 404
    assert "There is no such page" in missing.text

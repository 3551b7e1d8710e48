"""What every page has."""

from collections.abc import Callable

import pytest

from browser import Browser
from platform_servers import Servers


@pytest.mark.parametrize("path", ["/login", "/", "/documents/", "/documents/new", "/uploads/", "/exports/"])
def test_every_page_has_its_security_headers_and_its_style(sign_in: Callable[..., Browser], path: str) -> None:
    page = sign_in().get(path)
    assert page.status == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert page.headers["X-Frame-Options"] == "DENY"
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Referrer-Policy"] == "same-origin"
    assert "Strict-Transport-Security" not in page.headers
    assert '<meta name="viewport"' in page.text


def test_the_style_sheet_comes_from_the_package(servers: Servers) -> None:
    assert b"prefers-color-scheme: dark" in servers.get("/static/drydock/drydock.css")
    assert servers.get("/static/drydock/icon.svg").startswith(b"<svg")


@pytest.mark.parametrize("path", ["/operations/jobs/"])
def test_staff_pages_have_them_too(sign_in: Callable[..., Browser], path: str) -> None:
    page = sign_in(staff=True).get(path)
    assert page.status == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "no-store" in page.headers["Cache-Control"]


def test_a_form_without_its_token_is_refused_and_says_what_to_do(sign_in: Callable[..., Browser]) -> None:
    page = sign_in().request("POST", "/exports/", b"format=zip")
    assert page.status == 403
    assert "reload the page" in page.text
    assert page.headers["X-Request-ID"] in page.text


def test_programs_read_errors_as_json(sign_in: Callable[..., Browser]) -> None:
    answer = sign_in().get("/api/nowhere")
    assert (answer.status, answer.json["code"]) == (404, "NOT_FOUND")
    assert answer.json["request"] == answer.headers["X-Request-ID"]


def test_a_page_that_is_not_there_says_so(sign_in: Callable[..., Browser]) -> None:
    page = sign_in().get("/documents/00000000-0000-0000-0000-000000000000/")
    assert page.status == 404
    assert "There is no such page" in page.text

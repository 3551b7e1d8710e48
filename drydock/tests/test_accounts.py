"""Signing in, and who may see what."""

import uuid
from collections.abc import Callable

from browser import Browser
from platform_servers import PASSWORD, Servers


def test_signing_in_and_out(servers: Servers, sign_in: Callable[..., Browser]) -> None:
    person = sign_in()
    page = person.get("/")
    assert (page.status, page.url) == (200, servers.url + "/")
    assert f"Welcome, {person.name}" in page.text
    session = next(cookie for cookie in person.cookies if cookie.name == "sessionid")
    assert session.secure
    assert session.has_nonstandard_attr("HttpOnly")
    assert person.submit("/logout").url.endswith("/login")
    assert "/login?next=/documents/" in person.get("/documents/").url


def test_a_wrong_password_is_refused(servers: Servers, sign_in: Callable[..., Browser]) -> None:
    name = sign_in().name
    stranger = Browser(servers.url, servers.tls)
    answer = stranger.login(name, "wrong")
    assert answer.url.endswith("/login")
    assert "do not match" in answer.text
    assert stranger.get("/api/documents").status == 401


def test_a_form_from_elsewhere_is_refused(sign_in: Callable[..., Browser]) -> None:
    person = sign_in()
    body = {"title": "x", "source": "x"}
    assert person.post("/api/documents", body, **{"X-CSRFToken": "wrong"}).status == 403
    assert person.post("/api/documents", body, Referer="https://elsewhere.example/").status == 403


def test_ensure_user_changes_only_what_differs(servers: Servers) -> None:
    name = f"person-{uuid.uuid4().hex[:8]}"

    def ensure(password: str, *more: str) -> str:
        ended = servers.drydock("ensure_user", "--username", name, "--password-env", "SECRET", *more, SECRET=password)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    assert ensure(PASSWORD) == f"changed {name}: created, password"
    assert ensure(PASSWORD) == f"unchanged {name}"
    assert ensure("another-password") == f"changed {name}: password"
    assert ensure("another-password", "--staff") == f"changed {name}: staff"
    assert ensure("another-password", "--staff") == f"unchanged {name}"
    missing = servers.drydock("ensure_user", "--username", name, "--password-env", "NOWHERE")
    assert missing.returncode == 1
    assert "NOWHERE is not set" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1

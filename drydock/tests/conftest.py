"""The tests run against real servers, started once for the whole run."""

import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import django
import pytest

from browser import Browser
from platform_servers import PASSWORD, Servers, missing_packages

if missing := missing_packages():
    pytest.exit(f"These tests need Debian packages: apt-get install {' '.join(missing)}", returncode=2)

# The settings are read when a test module is imported, so what they say is decided before.
SERVERS = Servers()
os.environ.update(SERVERS.environment)
django.setup()


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """The whole platform, running."""
    try:
        SERVERS.start_all()
        yield SERVERS
    finally:
        from django.db import connections

        connections.close_all()
        SERVERS.stop_all()


@pytest.fixture
def sign_in(servers: Servers) -> Callable[..., Browser]:
    """Give a new person, signed in."""

    def make(*, staff: bool = False) -> Browser:
        name = f"person-{uuid.uuid4().hex[:8]}"
        arguments = ["ensure_user", "--username", name, "--password-env", "PERSON", *(["--staff"] if staff else [])]
        assert servers.drydock(*arguments, PERSON=PASSWORD).returncode == 0
        browser = Browser(servers.url, servers.tls)
        assert browser.login(name, PASSWORD).url.endswith("/")
        browser.name = name
        return browser

    return make


@pytest.fixture
def unheard(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what this test accepts in its own process from the workers: its bells are not due."""
    from drydock.jobs import engine
    from drydock.jobs.models import Job

    assert servers.processes
    accept = engine.accept

    def quietly(kind_name: str, payload: dict[str, object], **more: Any) -> Job:
        job = accept(kind_name, payload, **more)
        Job.objects.using(job._state.db).filter(uuid=job.uuid).update(bell_after="2100-01-01T00:00Z")
        return job

    monkeypatch.setattr(engine, "accept", quietly)


def pytest_unconfigure() -> None:
    """Remove the temporary directory also when no test needed the servers."""
    SERVERS.stop_all()

"""The rate limit (U3): six major actions in any 60 seconds, across web tiers, and an honest Retry-After."""

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice

import pytest

from browser import Answer, Browser
from drydock.documents.models import Document
from drydock.exports.models import Export
from platform_servers import Servers, wait_for

SOURCE = "\\documentclass{article}\\begin{document}x\\end{document}"
Maker = Callable[..., Browser]


def start_webs(servers: Servers, names: tuple[str, ...], **limits: str) -> list[str]:
    for name in names:
        servers.start_web(name, **limits)
    urls = [f"https://localhost:{servers.ports[name]}" for name in names]
    for url in urls:
        wait_for(f"{url} answering", lambda url=url: Browser(url, servers.tls).get("/health").status == 200)
    return urls


@pytest.fixture(scope="module")
def webs(servers: Servers) -> Iterator[list[str]]:
    """Two more web tiers, with the limits that a site has."""
    names = ("limited-1", "limited-2")
    yield start_webs(servers, names, DRYDOCK_RATE_LIMIT_ACTIONS="", DRYDOCK_RATE_LIMIT_SECONDS="")
    for name in names:
        servers.stop(name)


def at(person: Browser, url: str) -> Browser:
    """Return the same person's browser, looking at another web tier."""
    other = copy.copy(person)
    other.base = url
    return other


def act(person: Browser, url: str) -> Answer:
    return at(person, url).post("/api/exports", {"format": "csv"})


def id_of(servers: Servers, person: Browser) -> int:
    return int(servers.sql("core", "SELECT id FROM accounts_user WHERE username = %s", person.name)[0][0])


def shift(servers: Servers, person: Browser, seconds: int, *, first: int = 1, last: int = 6) -> None:
    """Make some of a person's actions as if they had been started earlier."""
    servers.sql(
        "core",
        "UPDATE accounts_recent_actions SET times[%s:%s] = ARRAY("
        "SELECT t - %s * interval '1 second' FROM unnest(times[%s:%s]) AS t) WHERE user_id = %s",
        *(first, last, seconds, first, last, id_of(servers, person)),
    )


def test_u3_the_seventh_action_in_60_seconds_is_refused_across_web_tiers(webs: list[str], sign_in: Maker) -> None:
    person, another = sign_in(), sign_in()
    assert [act(person, url).status for url in islice(cycle(webs), 6)] == [202] * 6
    for url in webs:
        refused = act(person, url)
        assert (refused.status, refused.json["code"]) == (429, "RATE_LIMITED")
        seconds = int(refused.headers["Retry-After"])
        assert 1 <= seconds <= 60
        assert refused.json["message"].endswith(f"Try again in {seconds} second{'s' if seconds != 1 else ''}.")
        assert "started 6 actions within 60 seconds" in refused.json["message"]
        # Somebody else is not affected; and who is refused may still read.
        assert act(another, url).status == 202
        assert at(person, url).get("/api/exports").status == 200
    assert len(person.get("/api/exports").json["exports"]) == 6


def test_u3_many_requests_at_once_at_two_web_tiers_cannot_exceed_it(webs: list[str], sign_in: Maker) -> None:
    person = sign_in()
    with ThreadPoolExecutor(32) as pool:
        statuses = list(pool.map(lambda url: act(person, url).status, islice(cycle(webs), 64)))
    assert (statuses.count(202), statuses.count(429)) == (6, 58)
    assert len(person.get("/api/exports").json["exports"]) == 6


def test_u3_the_window_slides_and_a_refused_action_does_not_count(
    servers: Servers, webs: list[str], sign_in: Maker
) -> None:
    person = sign_in()
    for _ in range(6):
        act(person, webs[0])
    # Two were started half a minute ago, and four just now.
    shift(servers, person, 30, last=2)
    for url in webs * 2:
        refused = act(person, url)
        assert refused.status == 429
        assert 1 <= int(refused.headers["Retry-After"]) <= 30
    # Another half minute later there is room for two, whatever was refused in between; the next waits for the four.
    shift(servers, person, 30)
    assert [act(person, url).status for url in webs] == [202, 202]
    refused = act(person, webs[0])
    assert (refused.status, int(refused.headers["Retry-After"]) <= 30) == (429, True)


def test_u3_after_retry_after_the_action_is_allowed(servers: Servers, sign_in: Maker) -> None:
    [url] = start_webs(servers, ("quick",), DRYDOCK_RATE_LIMIT_ACTIONS="3", DRYDOCK_RATE_LIMIT_SECONDS="4")
    person = sign_in()
    refused = wait_for("a refusal", lambda: (answer := act(person, url)).status == 429 and answer)
    seconds = int(refused.headers["Retry-After"])
    assert 1 <= seconds <= 4
    time.sleep(seconds)  # what Retry-After asks for
    assert act(person, url).status == 202
    servers.stop("quick")


def test_u3_every_way_to_a_major_action_is_limited(servers: Servers, webs: list[str], sign_in: Maker) -> None:
    person = sign_in()
    document = person.post("/api/documents", {"title": "one", "source": SOURCE}).json["id"]
    limited = at(person, webs[0])
    made = [act(person, webs[0]).status for _ in range(6)].count(202)
    refused = [
        limited.post("/api/documents", {"title": "two", "source": SOURCE}),
        limited.post(f"/api/documents/{document}/revisions", {"source": SOURCE}),
        limited.post("/api/exports", {}),
        limited.post("/api/uploads", {}),
        limited.post("/api/units/any/attempts", {}),
        limited.post("/api/units/any/photos", {}),
        limited.submit("/documents/new", title="two", source=SOURCE),
        limited.submit(f"/documents/{document}/", source=SOURCE),
        limited.submit("/exports/", format="csv"),
        limited.submit("/uploads/"),
        limited.submit("/units/any/attempts"),
        limited.submit("/units/any/photos"),
    ]
    assert [answer.status for answer in refused] == [429] * len(refused)
    assert Document.objects.get(owner__username=person.name).latest == 1
    assert Export.objects.filter(owner_id=id_of(servers, person)).count() == made


def test_u3_a_refused_form_says_how_long_to_wait_and_that_nothing_is_lost(webs: list[str], sign_in: Maker) -> None:
    person = at(sign_in(), webs[0])
    for _ in range(6):
        act(person, webs[0])
    page = person.submit("/documents/new", title="two", source=SOURCE)
    assert page.headers["Content-Type"].startswith("text/html")
    seconds = page.headers["Retry-After"]
    assert f"Try again in {seconds} second" in page.text
    assert "what you entered is still in the form" in page.text
    assert person.get("/documents/new").status == 200

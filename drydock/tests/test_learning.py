"""Units, attempts, photos and their review; and which units are open for whom (O3)."""

import copy
import html
import io
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.contrib.auth.hashers import make_password
from django.db import Error as DatabaseClientError
from django.db import connections, transaction
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from browser import Answer, Browser
from drydock.accounts.models import User
from drydock.jobs import engine, kinds, tasks
from drydock.jobs.models import Job, Tally
from drydock.learning import availability, content, markup, rules, service
from drydock.learning.models import Attempt, Availability, Photo, Unit
from drydock.uploads.models import Upload
from platform_servers import PASSWORD, Servers, wait_for

Maker = Callable[..., Browser]
ANSWERS = {one.slug: one.answers[0] for one in content.COURSE}


@pytest.fixture(scope="module", autouse=True)
def course(servers: Servers) -> None:
    """Give the demo's units."""
    ended = servers.drydock("demo_content")
    assert (ended.returncode, ended.stdout.split()[0]) == (0, "changed"), ended.stderr


@pytest.fixture(scope="module")
def password(servers: Servers) -> str:
    """Give the hash of the password that everybody here has: it is slow to make."""
    assert servers.processes
    return make_password(PASSWORD)


@pytest.fixture
def sign_in(servers: Servers, password: str) -> Maker:
    """Give a new person, signed in; made here, because there are many."""

    def make(*, staff: bool = False) -> Browser:
        browser = Browser(servers.url, servers.tls)
        browser.name = f"person-{uuid.uuid4().hex[:8]}"
        User.objects.create(username=browser.name, password=password, is_staff=staff)
        assert browser.login(browser.name, PASSWORD).url.endswith("/")
        return browser

    return make


def picture(colour: str = "teal") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (320, 240), colour).save(file, "PNG")
    return file.getvalue()


def send_photo(person: Browser, path: str, body: bytes, **headers: str) -> Answer:
    """Send a form with a file, as a browser does."""
    boundary = uuid.uuid4().hex
    parts = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="csrfmiddlewaretoken"\r\n\r\n{person.csrf()}\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="photo"; filename="page.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    )
    data = parts.encode() + body + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}", "X-CSRFToken": person.csrf()}
    return person.request("POST", path, data, kind | headers)


def answer(person: Browser, slug: str, text: str | None = None, **headers: str) -> Answer:
    return person.post(f"/api/units/{slug}/attempts", {"answer": text or ANSWERS[slug]}, **headers)


def states(person: Browser) -> dict[str, str]:
    return {unit["slug"]: unit["state"] for unit in person.get("/api/units").json["units"]}


def wait_until(person: Browser, slug: str, state: str) -> None:
    wait_for(f"{slug} being {state}", lambda: states(person)[slug] == state)


def user_of(person: Browser) -> User:
    return User.objects.get(username=person.name)


def new_user() -> User:
    return User.objects.create_user(f"person-{uuid.uuid4().hex[:8]}")


def unit(slug: str) -> Unit:
    return Unit.objects.get(slug=slug)


def pass_by_hand(user: User, slug: str) -> None:
    """Note what passes a unit, past the service: nobody asks for a recomputation."""
    Attempt.objects.create(unit=unit(slug), user=user, answer="x", correct=True)
    if unit(slug).needs_photo:
        Photo.objects.create(
            unit=unit(slug),
            user=user,
            upload_id=uuid.uuid4(),
            state="approved",
            reviewer=user,
            reviewed=user.date_joined,
        )


def work(job: Job) -> Job:
    """Do a job as a worker does, and return what became of it."""
    kind = kinds.get(job.kind)
    claimed = engine.claim(kind, job.uuid)
    assert claimed is not None
    tasks.perform(kind, claimed)
    return Job.objects.using("core").get(uuid=job.uuid)


def job_of(cause: str) -> Job:
    return Job.objects.using("core").get(kind=availability.KIND, idempotency_key=cause)


def counted(event: str) -> int:
    rows = Tally.objects.using("core").filter(subject=availability.KIND, event=event)
    return sum(rows.values_list("count", flat=True))


# --- The rule ---------------------------------------------------------------------------------------------------------


@st.composite
def courses(draw: st.DrawFn) -> dict[int, rules.Rule]:
    """Give units of which each requires some that come before it."""
    asked: dict[int, rules.Rule] = {}
    for number in range(draw(st.integers(0, 7))):
        requires = draw(st.frozensets(st.sampled_from(range(number)))) if number else frozenset()
        asked[number] = rules.Rule(requires, draw(st.booleans()))
    return asked


FACTS = st.frozensets(st.integers(0, 7))


@given(courses(), FACTS, FACTS)
def test_a_unit_is_open_when_all_that_it_requires_is_passed(
    asked: dict[int, rules.Rule], answered: frozenset[int], approved: frozenset[int]
) -> None:
    opened = rules.open_units(asked, answered, approved)
    for number, rule in asked.items():
        done = [n in answered and (n in approved or not asked[n].needs_photo) for n in rule.requires]
        assert (number in opened) == all(done)


@given(courses(), FACTS, FACTS, FACTS, FACTS)
def test_doing_more_never_closes_a_unit(
    asked: dict[int, rules.Rule],
    answered: frozenset[int],
    approved: frozenset[int],
    more_answered: frozenset[int],
    more_approved: frozenset[int],
) -> None:
    before = rules.open_units(asked, answered, approved)
    assert before <= rules.open_units(asked, answered | more_answered, approved | more_approved)


@given(courses(), FACTS, FACTS)
def test_only_what_a_unit_asks_for_counts(
    asked: dict[int, rules.Rule], answered: frozenset[int], approved: frozenset[int]
) -> None:
    idle_photos = frozenset(number for number, rule in asked.items() if not rule.needs_photo)
    assert rules.passed(asked, answered, approved) == rules.passed(asked, answered, approved - idle_photos)
    for number, rule in asked.items():
        alone = rules.open_units(asked, answered & rule.requires, approved & rule.requires)
        assert (number in alone) == (number in rules.open_units(asked, answered, approved))


@given(courses())
def test_everything_can_be_opened_and_a_new_person_can_begin(asked: dict[int, rules.Rule]) -> None:
    everything = frozenset(asked)
    assert rules.open_units(asked, everything, everything) == everything
    # What is shown before anything is recorded is what would be recorded.
    shown = {number for number, rule in asked.items() if rules.shown_open(rule, None)}
    assert shown == rules.open_units(asked, frozenset(), frozenset())


@pytest.mark.parametrize("recorded", [None, False, True])
def test_staff_see_all_units_and_others_what_is_recorded(recorded: bool | None) -> None:
    rule = rules.Rule(frozenset({1}))
    assert rules.shown_open(rule, recorded, staff=True)
    assert rules.shown_open(rule, recorded) == bool(recorded)


@pytest.mark.parametrize(
    ("text", "correct"),
    [("\\frac", True), ("  \\FRAC ", True), ("\\frac {a}{b}", False), ("ｆｒａｃ", True), ("\\sqrt", False)],
)
def test_case_width_and_spaces_make_no_difference_to_an_answer(text: str, correct: bool) -> None:
    assert service.is_correct(Unit(answers=["\\frac", "frac"]), text) == correct


# --- The body's markup ------------------------------------------------------------------------------------------------


def test_a_body_has_paragraphs_lists_and_code() -> None:
    text = "One `a<b`\nline\n\n- first\n- `second`\n\n    x & y\n      <z>"
    assert markup.render(text) == (
        "<p>One <code>a&lt;b</code>\nline</p>\n<ul><li>first</li><li><code>second</code></li></ul>\n"
        "<pre>x &amp; y\n  &lt;z&gt;</pre>"
    )


@given(st.text(alphabet=st.sampled_from("<>&\"'`- \n\r{}%ab\\"), max_size=80))
def test_a_body_never_makes_other_markup_than_ours(text: str) -> None:
    rendered = markup.render(text)
    plain = re.sub(r"</?(p|ul|li|code|pre)>", "", rendered)
    assert not set("<>\"'") & set(plain)
    kept = re.sub(r"[\s`-]", "", html.unescape(plain))
    assert kept == re.sub(r"[\s`-]", "", text)


# --- Working through units --------------------------------------------------------------------------------------------


def test_a_correct_attempt_opens_what_requires_it(sign_in: Maker) -> None:
    person = sign_in()
    assert states(person) == {
        "first-document": "open", "formulas": "locked", "lab-notebook": "open", "tables": "locked",
        "lab-report": "locked",
    }  # fmt: skip
    wrong = answer(person, "first-document", "\\begin")
    assert (wrong.status, wrong.json["correct"]) == (201, False)
    right = answer(person, "first-document")
    assert (right.status, right.json["correct"], right.headers["Location"]) == (201, True, "/api/units/first-document")
    assert states(person)["first-document"] == "passed"
    wait_until(person, "formulas", "open")
    shown = person.get("/api/units/formulas").json
    assert (shown["title"], shown["attempts"], shown["missing"]) == ("Formulas", [], [])
    attempts = person.get("/api/units/first-document").json["attempts"]
    assert [made["correct"] for made in attempts] == [True, False]


def test_a_locked_unit_says_what_to_pass_first(sign_in: Maker) -> None:
    person = sign_in()
    expected = "“Tables of measurements” is locked. Pass “A first LaTeX document” and “The lab notebook” first."
    for reply in (
        person.get("/api/units/tables"),
        answer(person, "tables"),
        send_photo(person, "/api/units/tables/photos", picture()),
    ):
        assert (reply.status, reply.json) == (403, {"code": "UNIT_LOCKED", "message": expected})
    for page in (
        person.get("/units/tables/"),
        person.submit("/units/tables/attempts", answer="&"),
        send_photo(person, "/units/tables/photos", picture()),
    ):
        assert (page.status, expected in html.unescape(page.text)) == (403, True)
    assert not Attempt.objects.filter(user=user_of(person)).exists()


def test_a_unit_that_is_about_to_open_says_so(sign_in: Maker) -> None:
    person = sign_in()
    pass_by_hand(user_of(person), "first-document")
    page = person.get("/units/formulas/")
    assert (page.status, "opens in a moment" in page.text) == (403, True)
    assert 'http-equiv="refresh"' in page.text
    assert "Opens in a moment" in person.get("/units/").text


def test_staff_see_all_units(sign_in: Maker) -> None:
    reviewer = sign_in(staff=True)
    assert set(states(reviewer).values()) == {"open"}
    assert reviewer.get("/units/lab-report/").status == 200


def test_the_pages_take_answers_and_show_the_history(sign_in: Maker) -> None:
    person = sign_in()
    assert "Pass first: A first LaTeX document." in person.get("/units/").text
    assert "/units/first-document/" in person.get("/").text
    wrong = person.submit("/units/first-document/attempts", answer="<b>\\begin</b>")
    assert (wrong.status, "is not right" in wrong.text) == (200, True)
    assert "&lt;b&gt;\\begin&lt;/b&gt;" in wrong.text
    empty = person.submit("/units/first-document/attempts", answer=" ")
    assert (empty.status, "The answer is empty." in empty.text) == (400, True)
    right = person.submit("/units/first-document/attempts", answer="documentclass")
    assert (right.status, "“documentclass” is right." in right.text) == (200, True)
    assert ("Your attempts" in right.text, 'name="answer"' in right.text) == (True, False)
    assert person.get("/units/nothing/").status == 404


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"answer": ""}, "The answer is empty."),
        ({"answer": "x" * 501}, "at most 500"),
        ({"answer": "\x00"}, "must be text"),
        ({"answer": 1}, "'answer' must be text"),
        ([], "must be a JSON object"),
    ],
)
def test_an_answer_that_is_none_is_refused(sign_in: Maker, body: Any, says: str) -> None:
    reply = sign_in().post("/api/units/first-document/attempts", body)
    assert (reply.status, reply.json["code"], says in reply.json["message"]) == (400, "INVALID_INPUT", True), reply.json


def test_the_api_is_for_people_who_are_signed_in(servers: Servers, sign_in: Maker) -> None:
    stranger = Browser(servers.url, servers.tls)
    assert [stranger.get(path).status for path in ("/api/units", "/api/units/formulas", "/api/photos")] == [401] * 3
    assert stranger.get("/units/").url.endswith("/login?next=/units/")
    person = sign_in()
    assert person.get("/api/units/nothing").json["code"] == "NOT_FOUND"
    assert answer(person, "nothing", "x").json["code"] == "NOT_FOUND"
    assert send_photo(person, "/api/units/nothing/photos", b"").json["code"] == "NOT_FOUND"


def test_an_attempt_sent_again_is_the_same_attempt(sign_in: Maker) -> None:
    person = sign_in()
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: answer(person, "first-document", **{"Idempotency-Key": "once"}), range(8)))
    assert {reply.status for reply in replies} == {201}
    assert len({reply.body for reply in replies}) == 1
    made = Attempt.objects.get(user=user_of(person))
    assert job_of(f"attempt:{made.pk}")
    other = answer(person, "lab-notebook", **{"Idempotency-Key": "once"})
    assert (other.status, "another unit" in other.json["message"]) == (400, True)
    assert answer(person, "first-document", **{"Idempotency-Key": "x" * 101}).status == 400
    assert answer(person, "first-document", **{"Idempotency-Key": "twice"}).json["id"] != made.pk


def test_an_attempt_and_its_recomputation_are_accepted_both_or_neither(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert servers.processes
    user = new_user()
    found = service.standing(user, "first-document")
    assert found is not None

    def broken(*_: object, **__: object) -> Job:
        raise RuntimeError("no")

    monkeypatch.setattr(engine, "accept", broken)
    with pytest.raises(RuntimeError):
        service.attempt(user, found, ANSWERS["first-document"])
    assert not Attempt.objects.filter(user=user).exists()
    assert not service.attempt(user, found, "wrong: nothing to recompute").correct


# --- Photos -----------------------------------------------------------------------------------------------------------


def test_a_photo_is_submitted_reviewed_and_opens_units(sign_in: Maker) -> None:
    person, reviewer = sign_in(), sign_in(staff=True)
    assert answer(person, "first-document").json["correct"]
    assert answer(person, "lab-notebook").json["correct"]
    assert states(person)["lab-notebook"] == "open"
    page = send_photo(person, "/units/lab-notebook/photos", picture())
    assert (page.status, "Waiting for review" in page.text) == (200, True), page.text
    first = person.get("/api/units/lab-notebook").json["photos"][0]
    assert (first["state"], person.get(first["file"]).body) == ("submitted", picture())
    second = send_photo(person, "/api/units/lab-notebook/photos", picture())
    assert (second.status, second.json["code"]) == (409, "PHOTO_REFUSED")
    assert "waits for its review" in send_photo(person, "/units/lab-notebook/photos", picture()).text

    waiting = reviewer.get("/review/")
    assert (waiting.status, f"/review/{first['id']}" in waiting.text, first["file"] in waiting.text) == (
        200,
        True,
        True,
    )
    assert reviewer.get(first["file"]).body == picture()
    silent = reviewer.submit(f"/review/{first['id']}", decision="rejected", note="")
    assert (silent.status, "Say in the note why" in silent.text) == (400, True)
    reviewed = reviewer.submit(f"/review/{first['id']}", decision="rejected", note="No date <on> the page.")
    assert (reviewed.status, first["id"] in reviewed.text) == (200, False)
    assert "No date &lt;on&gt; the page." in person.get("/units/lab-notebook/").text

    again = send_photo(person, "/api/units/lab-notebook/photos", picture("navy"))
    assert again.status == 201, again.json
    assert again.json["id"] in [photo["id"] for photo in reviewer.get("/api/photos?state=submitted").json["photos"]]
    approved = reviewer.post(f"/api/photos/{again.json['id']}/review", {"decision": "approved"})
    assert (approved.status, approved.json["state"], approved.json["reviewer"]) == (200, "approved", reviewer.name)
    wait_until(person, "tables", "open")
    assert states(person)["lab-notebook"] == "passed"
    done = send_photo(person, "/api/units/lab-notebook/photos", picture())
    assert (done.status, "approved already" in done.json["message"]) == (409, True)


def test_a_photo_that_is_none_or_not_wanted_is_refused(sign_in: Maker) -> None:
    person = sign_in()
    broken = send_photo(person, "/api/units/lab-notebook/photos", b"not a picture")
    assert (broken.status, broken.json["code"]) == (400, "INVALID_INPUT")
    page = send_photo(person, "/units/lab-notebook/photos", b"not a picture")
    assert (page.status, 'role="alert"' in page.text) == (400, True)
    missing = person.submit("/units/lab-notebook/photos")
    assert (missing.status, "Choose a file" in missing.text) == (400, True)
    unwanted = send_photo(person, "/api/units/first-document/photos", picture())
    assert (unwanted.status, "asks for no photo" in unwanted.json["message"]) == (409, True)
    assert not Photo.objects.filter(user=user_of(person)).exists()


def test_a_photo_sent_again_is_the_same_photo(sign_in: Maker) -> None:
    person = sign_in()

    def send(_: int) -> Answer:
        return send_photo(person, "/api/units/lab-notebook/photos", picture(), **{"Idempotency-Key": "once"})

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(send, range(4)))
    assert {reply.status for reply in replies} == {201}, [reply.body for reply in replies]
    assert len({reply.body for reply in replies}) == 1
    assert Photo.objects.filter(user=user_of(person)).count() == 1
    assert Upload.objects.filter(owner_id=user_of(person).pk).count() == 1


def test_only_one_of_two_photos_sent_at_once_waits(sign_in: Maker) -> None:
    person = sign_in()
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: send_photo(person, "/api/units/lab-notebook/photos", picture()), range(4)))
    assert sorted(reply.status for reply in replies) == [201, 409, 409, 409]


def submitted(person: Browser) -> str:
    reply = send_photo(person, "/api/units/lab-notebook/photos", picture())
    assert reply.status == 201, reply.body
    return str(reply.json["id"])


def test_the_second_of_two_reviewers_is_told_that_it_was_decided(sign_in: Maker) -> None:
    photo = submitted(sign_in())
    one, other = sign_in(staff=True), sign_in(staff=True)
    start = threading.Barrier(2)

    def decide(reviewer: Browser, decision: str) -> Answer:
        start.wait(10)
        return reviewer.submit(f"/review/{photo}", decision=decision, note=decision)

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(decide, one, "approved"), pool.submit(decide, other, "rejected")]
        replies = [future.result() for future in asked]
    assert sorted(reply.status for reply in replies) == [200, 409]
    winner = (one, other)[[reply.status for reply in replies].index(200)]
    told = next(reply for reply in replies if reply.status == 409)
    kept = Photo.objects.get(pk=photo)
    assert f"{winner.name} has {kept.state} this photo already." in told.text
    assert (kept.reviewer, kept.note) == (user_of(winner), kept.state)


def test_a_decision_sent_again_is_the_same_decision(sign_in: Maker) -> None:
    photo = submitted(sign_in())
    reviewer = sign_in(staff=True)
    body = {"decision": "approved", "note": "Well kept."}
    replies = [reviewer.post(f"/api/photos/{photo}/review", body) for _ in range(2)]
    assert [reply.status for reply in replies] == [200, 200]
    assert replies[0].body == replies[1].body
    changed = reviewer.post(f"/api/photos/{photo}/review", {"decision": "rejected", "note": "No."})
    assert (changed.status, changed.json["code"]) == (409, "PHOTO_DECIDED")
    assert job_of(f"photo:{photo}")


def test_only_staff_review(sign_in: Maker) -> None:
    person, reviewer = sign_in(), sign_in(staff=True)
    photo = submitted(person)
    assert person.get("/review/").status == 404
    assert person.submit(f"/review/{photo}", decision="approved").status == 404
    assert person.get("/api/photos").json["code"] == "STAFF_ONLY"
    assert person.post(f"/api/photos/{photo}/review", {"decision": "approved"}).json["code"] == "STAFF_ONLY"
    assert ("/review/" in person.get("/").text, "/review/" in reviewer.get("/").text) == (False, True)
    assert reviewer.post(f"/api/photos/{photo}/review", {"decision": "lost"}).json["code"] == "INVALID_INPUT"
    assert reviewer.post(f"/api/photos/{uuid.uuid4()}/review", {"decision": "approved"}).json["code"] == "NOT_FOUND"
    assert reviewer.submit(f"/review/{uuid.uuid4()}", decision="approved").status == 404
    assert reviewer.get("/api/photos?state=lost").json["code"] == "INVALID_INPUT"
    assert Photo.objects.get(pk=photo).state == "submitted"


# --- Availability -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read_only(servers: Servers) -> Iterator[str]:
    """A web tier whose databases refuse every write."""

    def refusing(name: str) -> str:
        url = servers.environment[name].replace("&target_session_attrs=read-write", "")
        return f"{url}&options=-c%20default_transaction_read_only%3Don"

    urls = {name: refusing(name) for name in ("DATABASE_CORE_URL", "DATABASE_PLUGINS_URL")}
    servers.start_web("read-only", **urls)
    address = f"https://localhost:{servers.ports['read-only']}"
    wait_for("it answering", lambda: Browser(address, servers.tls).get("/health").status == 200)
    yield address
    servers.stop("read-only")


def test_o3_reads_write_nothing(servers: Servers, read_only: str, sign_in: Maker) -> None:
    person, reviewer = sign_in(), sign_in(staff=True)
    photo = submitted(person)
    # There is something that a read could be tempted to mend.
    pass_by_hand(user_of(person), "first-document")
    file = Photo.objects.get(pk=photo).upload_id
    before = servers.sql("core", "SELECT count(*) FROM learning_availability")
    for who, paths in (
        (person, ("/api/units", "/api/units/first-document", "/api/units/lab-notebook")),
        (person, ("/", "/units/", "/units/first-document/", "/units/lab-notebook/", f"/uploads/{file}/file")),
        (reviewer, ("/review/", "/api/photos", "/api/units", "/units/lab-report/", "/")),
    ):
        reader = copy.copy(who)
        reader.base = read_only
        assert {path: reader.get(path).status for path in paths} == dict.fromkeys(paths, 200)
        locked = {reader.get(path).status for path in ("/units/formulas/", "/api/units/formulas")}
        assert locked == ({200} if who is reviewer else {403})
        # This tier does refuse writes.
        assert reader.submit("/units/first-document/attempts", answer="x").status == 503
    assert servers.sql("core", "SELECT count(*) FROM learning_availability") == before


def test_o3_drift_is_shown_then_repaired_then_gone(servers: Servers, sign_in: Maker) -> None:
    person = sign_in()
    user = user_of(person)
    ahead, behind = unit("lab-report"), unit("first-document")
    Availability.objects.create(user=user, unit=ahead, open=True)
    Availability.objects.create(user=user, unit=behind, open=False)
    pass_by_hand(user, "lab-notebook")
    assert (states(person)["lab-report"], states(person)["first-document"]) == ("open", "locked")
    expected = [f"{person.name}: first-document: locked → open", f"{person.name}: lab-report: open → locked"]

    shown = servers.drydock("recompute_availability", "--user", person.name, "--dry-run")
    assert (shown.returncode, shown.stdout.splitlines()[:2]) == (3, expected), shown.stderr
    assert shown.stdout.splitlines()[-1].startswith("drift 2: nothing was changed")
    assert states(person)["lab-report"] == "open"

    before = counted("drift repaired")
    repaired = servers.drydock("recompute_availability", "--user", person.name)
    assert (repaired.returncode, repaired.stdout.splitlines()) == (0, [*expected, "changed 2"]), repaired.stderr
    assert (states(person)["lab-report"], states(person)["first-document"]) == ("locked", "open")
    assert counted("drift repaired") - before == 2

    for arguments in (("--dry-run",), ()):
        clean = servers.drydock("recompute_availability", "--user", person.name, *arguments)
        assert (clean.returncode, clean.stdout) == (0, "unchanged\n")
    assert counted("drift repaired") - before == 2


def test_o3_everybodys_drift_is_found_in_batches(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "BATCH", 2)
    users = [new_user() for _ in range(5)]
    for user in users:
        pass_by_hand(user, "first-document")
    shown = servers.drydock("recompute_availability", "--dry-run")
    assert shown.returncode == 3
    assert {f"{user.username}: formulas: locked → open" for user in users} <= set(shown.stdout.splitlines())
    found = availability.repair()
    assert {user.pk for user in users} <= {drift.user_id for drift in found}
    assert availability.look() == []
    assert servers.drydock("recompute_availability").stdout == "unchanged\n"


def test_o3_a_dry_run_cannot_write(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    assert servers.processes
    monkeypatch.setattr(availability, "drifts", lambda _: [new_user()])
    with pytest.raises(DatabaseClientError, match="read-only"):
        availability.look()


def test_o3_the_command_names_who_is_not_there(servers: Servers) -> None:
    ended = servers.drydock("recompute_availability", "--user", "nobody")
    assert (ended.returncode, "there is nobody named nobody" in ended.stderr) == (1, True)


def test_o3_a_new_person_begins_without_any_recomputation(sign_in: Maker) -> None:
    person = sign_in()
    assert not Availability.objects.filter(user=user_of(person)).exists()
    assert person.get("/units/first-document/").status == 200
    assert availability.look([user_of(person).pk]) == []


def test_o3_the_job_is_idempotent_and_a_lost_attempt_has_no_effect(unheard: None) -> None:
    assert unheard is None
    user = new_user()
    pass_by_hand(user, "first-document")

    def ask() -> Job:
        cause = f"test:{uuid.uuid4()}"
        with transaction.atomic(using="core"):
            availability.ask_for([user.pk], cause)
        return job_of(cause)

    lost = engine.claim(kinds.get(availability.KIND), ask().uuid)
    assert lost is not None
    Job.objects.using("core").filter(uuid=lost.uuid).update(attempt=2)
    tasks.perform(kinds.get(availability.KIND), lost)
    assert not Availability.objects.filter(user=user).exists()

    assert work(ask()).state == "done"
    row = Availability.objects.get(user=user)
    assert (row.unit.slug, row.open) == ("formulas", True)
    assert work(ask()).state == "done"
    assert Availability.objects.get(user=user).since == row.since


def test_o3_a_recomputation_from_older_facts_never_overwrites_a_newer_one(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert servers.processes
    user = new_user()
    has_read, may_write = threading.Event(), threading.Event()
    write = availability._write

    def late(found: list[availability.Drift]) -> None:
        if threading.current_thread().name == "older":
            has_read.set()
            assert may_write.wait(20)
        write(found)

    monkeypatch.setattr(availability, "_write", late)

    def repair() -> None:
        try:
            availability.repair([user.pk])
        finally:
            connections.close_all()

    # The older one finds a unit to lock; then what it requires is passed.
    Availability.objects.create(user=user, unit=unit("formulas"), open=True)
    older = threading.Thread(target=repair, name="older")
    older.start()
    assert has_read.wait(20)
    pass_by_hand(user, "first-document")
    newer = threading.Thread(target=repair, name="newer")
    newer.start()
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    wait_for("the newer one waiting", lambda: servers.sql("core", waiting) != [(0,)] or not newer.is_alive())
    may_write.set()
    older.join(20)
    newer.join(20)
    assert Availability.objects.get(user=user, unit=unit("formulas")).open
    assert availability.look([user.pk]) == []


def test_o3_concurrent_recomputes_agree(servers: Servers) -> None:
    assert servers.processes
    users = [new_user() for _ in range(6)]

    def learn(user: User) -> None:
        try:
            for slug in ("first-document", "lab-notebook", "formulas", "tables"):
                pass_by_hand(user, slug)
                availability.repair([user.pk])
        finally:
            connections.close_all()

    def sweep(_: int) -> None:
        try:
            for _ in range(5):
                availability.repair()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(8) as pool:
        pending = [pool.submit(learn, user) for user in users] + [pool.submit(sweep, n) for n in range(2)]
        for future in pending:
            future.result()
    assert availability.look([user.pk for user in users]) == []
    opened = Availability.objects.filter(user__in=users, unit=unit("lab-report"), open=True)
    assert opened.count() == len(users)


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(list(ANSWERS)), st.sampled_from(["right", "wrong", "approved", "rejected", "tamper"])
        ),
        max_size=12,
    )
)
def test_o3_after_a_repair_everything_is_as_the_rule_says(steps: list[tuple[str, str]]) -> None:
    user = new_user()
    for slug, step in steps:
        one = unit(slug)
        if step in ("right", "wrong"):
            Attempt.objects.create(unit=one, user=user, answer="x", correct=step == "right")
        elif step == "tamper":
            Availability.objects.update_or_create(user=user, unit=one, defaults={"open": len(steps) % 2 == 0})
        elif not Photo.objects.filter(user=user, unit=one).exclude(state="rejected").exists():
            decided = {"state": step, "reviewer": user, "reviewed": user.date_joined}
            Photo.objects.create(unit=one, user=user, upload_id=uuid.uuid4(), **decided)
    availability.repair([user.pk])
    assert availability.look([user.pk]) == []
    for found in service.standings(user):
        assert found.open == (not found.missing)


# --- The demo's course ------------------------------------------------------------------------------------------------


def test_o3_a_changed_unit_asks_for_everybodys_recomputation(servers: Servers, sign_in: Maker) -> None:
    assert servers.drydock("demo_content").stdout == "unchanged 5 units\n"
    person = sign_in()
    Unit.objects.filter(slug="formulas").update(title="Sums", order=9)
    unit("formulas").requires.set([unit("lab-report")])
    pass_by_hand(user_of(person), "first-document")
    ended = servers.drydock("demo_content")
    assert (ended.returncode, ended.stdout) == (0, "changed formulas\n"), ended.stderr
    assert (unit("formulas").title, [one.slug for one in unit("formulas").requires.all()]) == (
        "Formulas",
        ["first-document"],
    )
    wait_until(person, "formulas", "open")


def test_the_course_has_no_circle() -> None:
    before: set[str] = set()
    for one in content.COURSE:
        assert set(one.requires) <= before
        before.add(one.slug)
    assert len(before) == len(content.COURSE)
    assert any(one.needs_photo for one in content.COURSE)


def test_the_demos_people_are_made_with_its_course_and_not_twice(servers: Servers) -> None:
    passwords = {"DRYDOCK_DEMO_PASSWORD": "a-long-password", "DRYDOCK_REVIEWER_PASSWORD": "another-long-password"}
    first = servers.drydock("demo_content", **passwords)
    made = "changed demo: created, password\nchanged reviewer: created, password, staff\nunchanged 5 units\n"
    assert first.stdout == made, first.stderr
    assert (
        servers.drydock("demo_content", **passwords).stdout == "unchanged demo\nunchanged reviewer\nunchanged 5 units\n"
    )
    assert servers.drydock("demo_content").stdout == "unchanged 5 units\n"

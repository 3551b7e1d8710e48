"""Documents: from a POST to a PDF, and what must not happen on the way."""

import dataclasses
import hashlib
import http.server
import json
import os
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError
from django.db import transaction

from browser import Answer, Browser
from drydock import config, storage
from drydock.accounts.models import User
from drydock.documents import latex, service, views, worker
from drydock.documents.models import Document, Revision
from drydock.jobs import engine, kinds, tasks
from drydock.jobs.models import Job
from platform_servers import TOKEN, Servers, wait_for

BEARER = {"Authorization": f"Bearer {TOKEN}"}
CYRILLIC = r"""\documentclass{article}
\usepackage{fontspec}
\setmainfont{DejaVu Serif}
\usepackage[russian]{babel}
\begin{document}
Съешь ещё этих мягких французских булок, да выпей чаю. %s
\end{document}
"""


def latin(body: str) -> str:
    return f"\\documentclass{{article}}\\begin{{document}}x\n{body}\n\\end{{document}}\n"


def text_of(pdf: bytes) -> str:
    text = subprocess.run(["pdftotext", "-", "-"], input=pdf, capture_output=True, check=True).stdout.decode()
    return " ".join(text.split())


def finished(person: Browser, document: str) -> Answer:
    def over() -> Answer | None:
        answer = person.get(f"/api/documents/{document}")
        return answer if answer.json["state"] != "pending" else None

    answer = wait_for("the compile ending", over, 60)
    assert isinstance(answer, Answer)
    return answer


def survivors() -> list[str]:
    """Return the processes that work in a compile's directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(config.load().data_dir / "compile") in os.readlink(process / "cwd"):
                found.append((process / "comm").read_text())
        except OSError:
            continue
    return found


def test_q1_a_cyrillic_document_becomes_a_pdf_whose_text_is_right(sign_in: Callable[..., Browser]) -> None:
    person = sign_in()
    accepted = person.post("/api/documents", {"title": "Булки", "source": CYRILLIC % "Один."})
    assert accepted.status == 201
    document = accepted.json["id"]
    assert (accepted.json["revision"], accepted.headers["Location"]) == (1, f"/api/documents/{document}")
    answer = finished(person, document).json
    assert (answer["state"], answer["job"]["state"], answer["job"]["attempt"]) == ("compiled", "done", 1), answer
    assert answer["job"]["id"] == accepted.json["job"]
    assert "LuaHBTeX" in Revision.objects.get(document=document).log
    pdf = person.get(answer["pdf"]["url"])
    assert pdf.headers["Content-Type"] == "application/pdf"
    assert "Съешь ещё этих мягких французских булок, да выпей чаю. Один." in text_of(pdf.body)
    assert pdf.headers["ETag"].strip('"') == hashlib.sha256(pdf.body).hexdigest()

    second = person.post(f"/api/documents/{document}/revisions", {"source": CYRILLIC % "Два."})
    assert (second.status, second.json["revision"]) == (201, 2)
    assert finished(person, document).json["state"] == "compiled"
    assert "Два." in text_of(person.get(f"/api/documents/{document}/pdf").body)

    page = person.get(f"/documents/{document}/").text
    assert "Булки" in page
    assert "Compiled" in page
    assert "Open the PDF" in page
    assert text_of(person.get(f"/documents/{document}/pdf").body)


def test_q5_a_compile_error_is_tried_once_and_told_and_the_last_good_pdf_stays(sign_in: Callable[..., Browser]) -> None:
    person = sign_in()
    document = person.post("/api/documents", {"title": "t", "source": latin("good")}).json["id"]
    assert finished(person, document).json["state"] == "compiled"
    person.post(f"/api/documents/{document}/revisions", {"source": latin(r"\nonsense")})
    answer = finished(person, document).json
    assert (answer["state"], answer["job"]["state"], answer["job"]["attempt"]) == ("failed", "failed", 1)
    assert "compile error: main.tex:2: Undefined control sequence" in answer["reason"].replace("./", "")
    assert answer["pdf"]["revision"] == 1
    assert "good" in text_of(person.get(f"/api/documents/{document}/pdf").body)
    page = person.get(f"/documents/{document}/").text
    assert "Undefined control sequence" in page
    assert "Open the PDF of revision 1" in page


@pytest.fixture
def short_lease(servers: Servers) -> Iterator[str]:
    """Have one LaTeX worker, whose jobs come back soon when it is lost; return its name."""
    servers.stop("latex.compile")
    servers.start_worker("latex.compile", DRYDOCK_LEASE_SECONDS="3")
    yield "latex.compile"
    if "latex.compile" in servers.processes:
        servers.stop("latex.compile")
    servers.start_worker("latex.compile")
    wait_for("the worker answering", servers.ping)


def test_q5_a_compile_whose_worker_is_killed_is_done_by_the_next_one(
    servers: Servers, sign_in: Callable[..., Browser], short_lease: str
) -> None:
    person = sign_in()
    slow = latin(r"\directlua{local t = os.clock() + 3 while os.clock() < t do end}")
    document = person.post("/api/documents", {"title": "t", "source": slow}).json["id"]
    wait_for("the engine running", lambda: "lualatex\n" in survivors(), 60)
    page = person.get(f"/documents/{document}/").text
    assert "Being compiled since" in page
    servers.kill(short_lease)
    # Nobody was left to end them, but for the kernel.
    wait_for("every process of the compile being gone", lambda: survivors() == [], 5)
    left = list((config.load().data_dir / "compile").iterdir())
    assert len(left) == 1

    servers.start_worker("latex.compile", DRYDOCK_LEASE_SECONDS="3")
    answer = finished(person, document).json
    assert (answer["state"], answer["job"]["state"], answer["job"]["attempt"]) == ("compiled", "done", 2), answer
    assert Revision.objects.get(document=document).pdf_key.endswith("/r1/a2.pdf")
    assert text_of(person.get(answer["pdf"]["url"]).body).startswith("x")
    assert not left[0].exists()


def test_q5_a_host_that_cannot_compile_is_no_compile_error(monkeypatch: pytest.MonkeyPatch, silent: Document) -> None:
    monkeypatch.setattr(latex, "PATH", "/nonexistent")
    revision = silent.revisions.get()
    tasks.perform(kinds.get(service.COMPILE), claimed(revision))
    revision.refresh_from_db()
    assert revision.state == "pending"
    job = Job.objects.using("core").get(uuid=revision.job_id)
    assert (job.state, job.deferred) == ("queued", 1)
    assert "LATEX_ENGINE is lualatex, but latexmk is not installed on this host" in job.reason


def test_a_request_that_is_sent_again_makes_nothing_twice(sign_in: Callable[..., Browser]) -> None:
    person, key = sign_in(), {"Idempotency-Key": "a key"}
    first, again = (person.post("/api/documents", {"title": "t", "source": latin("1")}, **key) for _ in range(2))
    assert (first.status, first.body, first.headers["Location"]) == (201, again.body, again.headers["Location"])
    assert again.status == 201
    document = first.json["id"]
    revisions = f"/api/documents/{document}/revisions"
    second, again = (person.post(revisions, {"source": latin("2")}, **key) for _ in range(2))
    assert (second.status, again.status, second.json["revision"], second.body) == (201, 201, 2, again.body)
    assert person.post(revisions, {"source": latin("3")}, **{"Idempotency-Key": "another"}).json["revision"] == 3
    # Keys are each person's own.
    staff = sign_in(staff=True)
    assert staff.post(revisions, {"source": latin("4")}, **key).json["revision"] == 4
    assert staff.post("/api/documents", {"title": "t", "source": latin("1")}, **key).json["id"] != document
    # Without a key every request counts.
    assert [person.post(revisions, {"source": latin("5")}).json["revision"] for _ in range(2)] == [5, 6]
    refused = person.post(revisions, {"source": latin("7")}, **{"Idempotency-Key": "k" * 101})
    assert (refused.status, refused.json["code"]) == (400, "INVALID_INPUT")


@pytest.mark.parametrize("of_a_document", [False, True])
def test_requests_of_one_key_that_come_at_once_make_one(sign_in: Callable[..., Browser], of_a_document: bool) -> None:
    person = sign_in()
    path, body = "/api/documents", {"title": "t", "source": latin("1")}
    if of_a_document:
        path = f"/api/documents/{person.post(path, body).json['id']}/revisions"
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: person.post(path, body, **{"Idempotency-Key": "at once"}), range(6)))
    assert {answer.status for answer in answers} == {201}
    assert len({answer.body for answer in answers}) == 1
    revisions = Revision.objects.filter(document__owner__username=person.name)
    assert revisions.count() == (2 if of_a_document else 1)


def test_documents_are_written_through_the_pages_too(sign_in: Callable[..., Browser]) -> None:
    person = sign_in()
    assert "Write the first one" in person.get("/documents/").text
    assert "Привет" in person.get("/documents/new").text
    assert "The source is empty" in person.submit("/documents/new", title="A page", source=" ").text
    page = person.submit("/documents/new", title="A page", source=latin("page"))
    assert (page.status, "A page" in page.text) == (200, True)
    assert "A page" in person.get("/").text
    assert "A page" in person.get("/documents/").text


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"title": "", "source": "x"}, "title must have"),
        ({"title": "t" * 201, "source": "x"}, "title must have"),
        ({"title": "t", "source": "  "}, "source is empty"),
        ({"title": "t", "source": "\x00"}, "must be text"),
        ({"title": "t", "source": "x" * (service.MAX_SOURCE_BYTES + 1)}, "at most 1 MiB"),
        ({"title": "t", "source": 7}, "'source' must be text"),
        ({"title": "t"}, "'source' must be text"),
        ([], "JSON object"),
    ],
)
def test_wrong_input_is_refused_with_a_sentence(reader: Browser, body: object, why: str) -> None:
    answer = reader.post("/api/documents", body)
    assert (answer.status, answer.json["code"]) == (400, "INVALID_INPUT")
    assert why in answer.json["message"]


@pytest.fixture(scope="module")
def reader(servers: Servers) -> Browser:
    servers.drydock("ensure_user", "--username", "reader", "--password-env", "P", P="a-long-password")
    browser = Browser(servers.url, servers.tls)
    browser.login("reader", "a-long-password")
    return browser


def test_a_document_is_its_owners_and_the_staffs(sign_in: Callable[..., Browser], reader: Browser) -> None:
    document = sign_in().post("/api/documents", {"title": "Mine", "source": latin("x")}).json["id"]
    for path in (f"/api/documents/{document}", f"/api/documents/{document}/pdf", f"/documents/{document}/"):
        assert reader.get(path).status == 404
    assert reader.post(f"/api/documents/{document}/revisions", {"source": "x"}).status == 404
    assert sign_in(staff=True).get(f"/api/documents/{document}").status == 200


# --- Applying a result ------------------------------------------------------------------------------------------------


@pytest.fixture
def silent(unheard: None) -> Document:
    """Give a document whose jobs no worker hears of."""
    assert unheard is None
    owner = User.objects.get_or_create(username="silent")[0]
    return service.create_document(owner, "Silent", "x").document


def claimed(revision: Revision) -> Job:
    job = engine.claim(kinds.get(service.COMPILE), revision.job_id)  # type: ignore[arg-type]
    assert job is not None
    return job


def report(job: Job, **more: object) -> dict[str, object]:
    return {"job": str(job.uuid), "attempt": job.attempt, "succeeded": True, "sha256": "ab" * 32, "size": 7, **more}


def send(servers: Servers, body: object) -> Answer:
    return Browser(servers.url, servers.tls).post("/internal/latex/apply", body, **BEARER)


def test_q1_an_older_compile_never_overwrites_a_newer_one(servers: Servers, silent: Document) -> None:
    older, newer = silent.revisions.get(number=1), service.add_revision(silent, "y")
    older_job, newer_job = claimed(older), claimed(newer)
    assert send(servers, report(newer_job)).status == 200
    stale = send(servers, report(older_job))
    assert (stale.status, stale.json["code"]) == (409, "LATEX_JOB_RESULT_INVALID")
    assert "superseded" in stale.json["message"]
    silent.refresh_from_db()
    assert silent.applied == 2
    assert Revision.objects.get(pk=older.pk).state == "pending"


def test_a_compiled_revision_is_never_shown_without_its_pdf(servers: Servers, silent: Document) -> None:
    read_before = Document.objects.get(pk=silent.pk)
    assert send(servers, report(claimed(silent.revisions.get()))).status == 200
    assert (views._newest(read_before).state, read_before.applied) == ("compiled", 1)


def test_q1_a_late_attempt_is_refused(servers: Servers, silent: Document) -> None:
    revision = silent.revisions.get()
    first = claimed(revision)
    Job.objects.using("core").filter(uuid=first.uuid).update(lease_until="2020-01-01T00:00Z")
    engine.reap("core")
    second = claimed(revision)
    assert (first.attempt, second.attempt) == (1, 2)
    stale = send(servers, report(first))
    assert (stale.status, stale.json["code"]) == (409, "LATEX_JOB_RESULT_INVALID")
    assert send(servers, report(second)).status == 200
    revision.refresh_from_db()
    assert revision.pdf_key.endswith("/r1/a2.pdf")


def test_q1_a_result_that_is_sent_twice_is_applied_once(servers: Servers, silent: Document) -> None:
    job = claimed(silent.revisions.get())
    assert [send(servers, report(job)).status for _ in range(2)] == [200, 200]
    assert send(servers, report(job, sha256="cd" * 32)).status == 409


def test_a_result_for_nothing_or_of_no_sense_is_refused(servers: Servers, silent: Document) -> None:
    assert send(servers, {"job": str(uuid.uuid4()), "attempt": 1, "succeeded": False, "reason": "x"}).status == 409
    job = claimed(silent.revisions.get())
    for nonsense in ({}, [], report(job, sha256="x"), report(job, succeeded=False), report(job, attempt="x")):
        assert send(servers, nonsense).status == 400


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[tuple[int, str]], list[str]]]:
    """Stand in for the web tier: give the answers of the first list, note the requests in the second."""
    scripted: list[tuple[int, str]] = []
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(self.headers["Authorization"])
            status, code = scripted[min(len(seen), len(scripted)) - 1]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"code": code, "message": "because"}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    changed = dataclasses.replace(config.load(), internal_api_url=f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(config, "load", lambda: changed)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    yield scripted, seen
    server.shutdown()
    server.server_close()


STALE = (409, "LATEX_JOB_RESULT_INVALID")


@pytest.mark.parametrize(
    ("script", "requests", "why"),
    [
        ([(200, "")], 1, ""),
        ([STALE, STALE, (200, "")], 3, ""),
        ([STALE] * 8 + [(200, "")], 9, ""),
        ([STALE], 9, "LATEX_JOB_RESULT_INVALID: because"),
        ([(409, "SOMETHING_ELSE")], 1, "409 SOMETHING_ELSE because"),
        ([(500, "")], 1, "answered 500"),
        ([(401, "UNAUTHORIZED")], 1, "answered 401 UNAUTHORIZED because"),
    ],
)
def test_q3_only_a_stale_result_is_sent_again_and_at_most_eight_times(
    answers: tuple[list[tuple[int, str]], list[str]], script: list[tuple[int, str]], requests: int, why: str
) -> None:
    answers[0].extend(script)
    if why:
        with pytest.raises(worker.ApplyError, match=why):
            worker.apply({})
    else:
        worker.apply({})
    assert answers[1] == [f"Bearer {TOKEN}"] * requests


def test_q3_a_refused_result_fails_the_job_at_once_and_keeps_the_reason(
    answers: tuple[list[tuple[int, str]], list[str]], silent: Document
) -> None:
    answers[0].append((503, "MAINTENANCE"))
    revision = silent.revisions.get()
    tasks.perform(kinds.get(service.COMPILE), claimed(revision))
    revision.refresh_from_db()
    assert revision.state == "failed"
    assert "503 MAINTENANCE" in revision.reason
    job = Job.objects.using("core").get(uuid=revision.job_id)
    assert (job.state, job.reason) == ("failed", revision.reason)


def test_q8_a_result_that_meets_a_failover_is_compiled_again(
    answers: tuple[list[tuple[int, str]], list[str]], silent: Document
) -> None:
    answers[0].append((503, "DATABASE_UNAVAILABLE"))
    revision = silent.revisions.get()
    tasks.perform(kinds.get(service.COMPILE), claimed(revision))
    job = Job.objects.using("core").get(uuid=revision.job_id)
    assert (job.state, job.deferred, len(answers[1])) == ("queued", 1, 1)


def test_q5_a_compile_whose_storage_is_away_is_tried_again(monkeypatch: pytest.MonkeyPatch, silent: Document) -> None:
    def away(*_: object, **__: object) -> None:
        raise EndpointConnectionError(endpoint_url="s3")

    monkeypatch.setattr(storage, "put", away)
    monkeypatch.setattr(latex, "compile_source", lambda _: latex.Outcome(b"%PDF", "", ""))
    revision = silent.revisions.get()
    tasks.perform(kinds.get(service.COMPILE), claimed(revision))
    job = Job.objects.using("core").get(uuid=revision.job_id)
    assert (job.state, job.deferred) == ("queued", 1)
    assert "the object storage did not take the PDF" in job.reason


def test_a_revision_and_its_job_are_accepted_together_or_not_at_all(silent: Document) -> None:
    before = Job.objects.using("core").count()
    with pytest.raises(ZeroDivisionError), transaction.atomic(using="core"):
        service.add_revision(silent, "y")
        raise ZeroDivisionError
    assert silent.revisions.count() == 1
    assert Job.objects.using("core").count() == before


def test_the_page_says_what_a_compile_waits_for(sign_in: Callable[..., Browser], silent: Document) -> None:
    staff, revision, refresh = sign_in(staff=True), silent.revisions.get(), 'http-equiv="refresh"'

    def page() -> str:
        return staff.get(f"/documents/{silent.pk}/").text

    assert "Waiting for a worker." in page()
    job = claimed(revision)
    assert "Being compiled since" in page()
    engine.defer(kinds.get(service.COMPILE), job, "the object storage did not take the PDF: it is away")
    assert "Waiting to be tried again." in page()
    assert "An earlier try came to nothing: the object storage did not take the PDF: it is away." in page()
    assert refresh in page()
    Job.objects.using("core").filter(uuid=job.uuid).update(run_after="2020-01-01T00:00Z")
    assert "<textarea" not in page()
    engine.fail(kinds.get(service.COMPILE), claimed(revision), "gave up: it lost its worker 5 times")
    assert "gave up: it lost its worker 5 times" in page()
    assert "<textarea" in page()
    assert refresh not in page()


# --- The engine -------------------------------------------------------------------------------------------------------


def test_the_log_that_is_kept_is_bounded() -> None:
    outcome = latex.compile_source(
        latin(r"\newcount\n \loop\message{" + "x" * 70 + r"}\advance\n1 \ifnum\n<900 \repeat \oops")
    )
    assert len(outcome.log) <= service.MAX_LOG_CHARACTERS
    assert "Undefined control sequence" in outcome.reason


def test_prepare_latex_changes_nothing_twice(servers: Servers, tmp_path: Path) -> None:
    cache = f"{tmp_path}/font-cache-pdflatex"
    changes = {"DRYDOCK_DATA_DIR": str(tmp_path), "LATEX_ENGINE": "pdflatex"}
    first = servers.drydock("prepare_latex", **changes)
    assert first.stdout == f"changed {cache}\n", first.stderr
    assert servers.drydock("prepare_latex", **changes).stdout == f"unchanged {cache}\n"


@pytest.mark.parametrize(
    ("engine_name", "lacking"),
    [("lualatex", "latexmk"), ("pdflatex", "latexmk"), ("tectonic", "tectonic")],
)
def test_an_engine_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine_name: str, lacking: str
) -> None:
    changed = dataclasses.replace(config.load(), latex_engine=engine_name, data_dir=tmp_path)
    monkeypatch.setattr(config, "load", lambda: changed)
    monkeypatch.setattr(latex, "PATH", "/nonexistent")
    why = f"LATEX_ENGINE is {engine_name}, but {lacking} is not installed on this host. Install the"
    with pytest.raises(latex.UnavailableError, match=why):
        latex.compile_source("x")


def test_every_engine_that_can_be_configured_is_known() -> None:
    assert set(latex.ENGINES) == set(config.LATEX_ENGINES)

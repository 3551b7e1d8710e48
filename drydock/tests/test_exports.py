"""Exports: a real file, with its hash, or a reason. What is slow or lost here is really slow or lost."""

import csv
import hashlib
import io
import os
import signal
import socket
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from django.db import connections, transaction

from browser import Answer, Browser
from drydock import config, storage
from drydock.exports import service, worker
from drydock.exports.models import Export
from drydock.jobs import engine, kinds, tasks
from drydock.jobs.models import Job
from platform_servers import Servers, wait_for
from test_processor import client_of, documents_locked, gone, pid_of, start

SOURCE = "\\documentclass{article}\\begin{document}exported\\end{document}"


def over(person: Browser, path: str) -> Answer:
    def is_over() -> Answer | None:
        answer = person.get(path)
        return answer if answer.json["state"] != "pending" else None

    answer = wait_for(f"{path} being over", is_over, 60)
    assert isinstance(answer, Answer)
    return answer


@pytest.fixture(scope="module")
def author(servers: Servers) -> Browser:
    servers.drydock("ensure_user", "--username", "author", "--password-env", "P", P="a-long-password")
    browser = Browser(servers.url, servers.tls)
    browser.login("author", "a-long-password")
    for title in ("Первый: отчёт/1", "=cmd()"):
        document = browser.post("/api/documents", {"title": title, "source": SOURCE}).json["id"]
        assert over(browser, f"/api/documents/{document}").json["state"] == "compiled"
    return browser


def test_a_zip_holds_the_sources_the_pdfs_and_a_list(author: Browser) -> None:
    accepted = author.post("/api/exports", {"format": "zip"})
    assert accepted.status == 202
    answer = over(author, accepted.headers["Location"]).json
    assert (answer["state"], answer["documents"], answer["job"]["state"]) == ("ready", 2, "done"), answer
    file = author.get(answer["download"])
    assert hashlib.sha256(file.body).hexdigest() == answer["sha256"]
    assert len(file.body) == answer["size"]
    assert "attachment" in file.headers["Content-Disposition"]
    archive = zipfile.ZipFile(io.BytesIO(file.body))
    assert archive.namelist() == [
        "0001-Первый-отчёт-1.tex", "0001-Первый-отчёт-1.pdf", "0002-cmd.tex", "0002-cmd.pdf", "documents.csv",
    ]  # fmt: skip
    assert archive.read("0002-cmd.tex").decode() == SOURCE
    assert archive.read("0002-cmd.pdf").startswith(b"%PDF")
    assert storage.get(Export.objects.get(pk=answer["id"]).key).read() == file.body


def test_a_csv_is_safe_in_a_spreadsheet(author: Browser) -> None:
    answer = over(author, author.post("/api/exports", {"format": "csv"}).headers["Location"]).json
    rows = list(csv.DictReader(io.StringIO(author.get(answer["download"]).text)))
    assert [row["title"] for row in rows] == ["Первый: отчёт/1", "'=cmd()"]
    assert {row["state"] for row in rows} == {"compiled"}


def test_the_pages_show_exports(author: Browser) -> None:
    page = author.submit("/exports/", format="csv")
    assert (page.status, "CSV" in page.text) == (200, True)
    export = page.url.rstrip("/").rsplit("/", 1)[1]
    over(author, f"/api/exports/{export}")
    assert "Download" in author.get(f"/exports/{export}/").text
    assert author.get(f"/exports/{export}/download").status == 200
    assert "Ready" in author.get("/exports/").text


def test_an_export_is_its_owners(author: Browser, sign_in: Callable[..., Browser]) -> None:
    export = author.post("/api/exports", {}).json["id"]
    stranger = sign_in()
    for path in (f"/api/exports/{export}", f"/api/exports/{export}/download", f"/exports/{export}/"):
        assert stranger.get(path).status == 404
    assert author.post("/api/exports", {"format": "exe"}).json["code"] == "INVALID_INPUT"


# --- What is asked for twice ------------------------------------------------------------------------------------------


def test_an_export_that_is_asked_for_twice_is_made_once(author: Browser) -> None:
    key = {"Idempotency-Key": f"wish {uuid.uuid4()}"}
    answers: list[Answer] = []

    def ask() -> None:
        answers.append(author.post("/api/exports", {"format": "csv"}, **key))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.append(author.post("/api/exports", {"format": "csv"}, **key))
    assert {(answer.status, answer.body, answer.headers["Location"]) for answer in answers} == {
        (202, answers[0].body, answers[0].headers["Location"])
    }
    made = Export.objects.filter(request_key=key["Idempotency-Key"])
    assert [str(export.pk) for export in made] == [answers[0].json["id"]]
    over(author, answers[0].headers["Location"])


def test_two_wishes_at_the_same_moment_are_one_export(servers: Servers, unheard: None) -> None:
    assert unheard is None
    key = str(uuid.uuid4())
    others: list[Export] = []

    def ask() -> None:
        others.append(service.request_export(1, "csv", key))
        connections.close_all()

    other = threading.Thread(target=ask)
    with transaction.atomic(using="plugins"):
        mine = service.request_export(1, "csv", key)
        other.start()
        # The other has found nothing, and is held up by what is not committed yet.
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ '^INSERT'"
        wait_for("the other's wish", lambda: servers.sql("plugins", waiting))
    other.join()
    assert [export.pk for export in others] == [mine.pk]


def test_a_key_is_its_owners_and_must_be_one(author: Browser, sign_in: Callable[..., Browser]) -> None:
    key = {"Idempotency-Key": "the same"}
    mine, theirs = (person.post("/api/exports", {"format": "csv"}, **key).json["id"] for person in (author, sign_in()))
    assert mine != theirs
    for wrong in ("x" * 101, "", "sch\xf6n"):
        answer = author.post("/api/exports", {"format": "csv"}, **{"Idempotency-Key": wrong})
        assert (answer.status, "Idempotency-Key" in answer.json["message"]) == (400, True)


# --- In the worker's place --------------------------------------------------------------------------------------------


@pytest.fixture
def export(unheard: None) -> Export:
    """Give an export that no worker hears of."""
    assert unheard is None
    return service.request_export(1, "csv")


def run(export: Export) -> Job:
    """Do what a worker does when it hears of an export."""
    kind = kinds.get(service.EXPORT)
    Job.objects.using("plugins").filter(uuid=export.job_id).update(run_after="2000-01-01T00:00Z")
    job = engine.claim(kind, export.job_id)  # type: ignore[arg-type]
    assert job is not None
    tasks.perform(kind, job)
    export.refresh_from_db()
    return Job.objects.using("plugins").get(uuid=job.uuid)


def test_a_file_that_does_not_read_back_is_not_published(monkeypatch: pytest.MonkeyPatch, export: Export) -> None:
    follow = worker.follow

    def damaged(*arguments: Any) -> dict[str, Any]:
        """Follow the run, and then have the object storage give other bytes."""
        described = follow(*arguments)
        storage.put(described["result"]["key"], b"other bytes", content_type="text/csv", sha256="")
        return described

    with monkeypatch.context() as patched:
        patched.setattr(worker, "follow", damaged)
        for lost in range(1, worker.MAX_RUNS_LOST):
            job = run(export)
            assert (job.state, export.state, export.runs_lost) == ("queued", "pending", lost)
            assert "the stored file is not the one that was made" in job.reason
        job = run(export)
        assert (job.state, export.state, export.key) == ("failed", "failed", "")
        assert "gave up after 5 runs that came to nothing; the last: the stored file is not" in export.reason


def test_a_file_that_is_whole_the_second_time_is_published(monkeypatch: pytest.MonkeyPatch, export: Export) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(worker, "verify", lambda _, export: (_ for _ in ()).throw(worker.lost(export, "damaged")))
        assert run(export).state == "queued"
    assert (run(export).state, export.state) == ("done", "ready")
    assert export.key.endswith("/a2-1.csv")
    assert hashlib.sha256(storage.get(export.key).read()).hexdigest() == export.sha256


def test_a_worker_that_lost_its_job_ends_the_run_and_publishes_nothing(servers: Servers, export: Export) -> None:
    with documents_locked(servers):
        thread = threading.Thread(target=run, args=[export])
        thread.start()
        pid = pid_of(client_of(servers), f"{export.job_id}-1")
        Job.objects.using("plugins").filter(uuid=export.job_id).update(attempt=2)
        wait_for("the end of the run", lambda: gone(pid))
        thread.join()
    export.refresh_from_db()
    assert (export.state, export.key) == ("pending", "")
    wait_for("free slots", lambda: client_of(servers).slots() == (2, 0))


def test_q7_a_worker_that_knows_exports_to_be_disabled_asks_nobody(
    monkeypatch: pytest.MonkeyPatch, export: Export
) -> None:
    disabled = replace(config.load(), script_processors=0)
    monkeypatch.setattr(config, "load", lambda: disabled)
    assert (run(export).state, export.reason) == ("failed", worker.DISABLED)


def test_q7_a_processor_whose_host_is_gone_costs_seconds(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, export: Export
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        urls = [f"https://localhost:{gone.getsockname()[1]}", f"https://localhost:{servers.ports['processor']}"]
        two = replace(config.load(), processor_urls=urls)
        monkeypatch.setattr(config, "load", lambda: two)
        # The one that does not answer is asked first.
        monkeypatch.setattr(worker.random, "sample", lambda choices, _: list(choices))
        started = time.monotonic()
        assert run(export).state == "done"
    assert time.monotonic() - started < 15


# --- The whole platform -----------------------------------------------------------------------------------------------


@contextmanager
def changed(servers: Servers, *names: str, **changes: str) -> Iterator[None]:
    """Restart some services with another environment, and afterwards as they were."""
    starts: dict[str, Callable[..., None]] = {
        "relay": servers.start_relay,
        "export": lambda **environment: servers.start_worker("export", **environment),
        "processor": servers.start_processor,
    }
    for environment in (changes, {}):
        for name in names:
            if name in servers.processes:
                servers.stop(name)
            starts[name](**environment)
        if "processor" in names:
            wait_for("the processor's answer", lambda: client_of(servers).slots())
        if environment:
            yield


@contextmanager
def frozen(servers: Servers, name: str) -> Iterator[None]:
    """Stop a server from answering, without its connections noticing."""
    servers.signal_all(name, signal.SIGSTOP)
    try:
        yield
    finally:
        servers.signal_all(name, signal.SIGCONT)


def wish(person: Browser) -> str:
    """Ask for an export; return its address."""
    accepted = person.post("/api/exports", {"format": "csv"})
    assert accepted.status == 202
    return str(accepted.headers["Location"])


def job_of(person: Browser, path: str) -> dict[str, Any]:
    return dict(person.get(path).json["job"])


def running(servers: Servers, person: Browser, path: str) -> int:
    """Wait until the export is running; return the process of its run."""

    def run() -> int:
        job = job_of(person, path)
        assert job["state"] == "running", job
        return pid_of(client_of(servers), f"{job['id']}-{job['attempt']}")

    return int(wait_for("the run", run, 90))


def test_q6_an_export_past_its_time_limit_fails_with_that_reason(servers: Servers, author: Browser) -> None:
    with changed(servers, "relay", "export", OMERO_IMS_CELERY_TIME_LIMIT="3"), documents_locked(servers):
        path = wish(author)
        answer = over(author, path).json
        assert (answer["state"], answer["job"]["state"], answer["job"]["attempt"]) == ("failed", "failed", 1)
        assert answer["reason"] == ("the export took longer than its time limit of 3 s (OMERO_IMS_CELERY_TIME_LIMIT)")
        wait_for("the end of the run", lambda: client_of(servers).slots() == (2, 0))
    page = author.get(path.replace("/api", "") + "/").text
    assert "time limit of 3 s" in page
    assert "Export again" in page


def test_q6_the_processors_own_time_limit_gives_the_same_reason(servers: Servers, author: Browser) -> None:
    with changed(servers, "processor", OMERO_IMS_CELERY_TIME_LIMIT="2"), documents_locked(servers):
        answer = over(author, wish(author)).json
        assert (answer["state"], answer["job"]["attempt"]) == ("failed", 1)
        assert "(OMERO_IMS_CELERY_TIME_LIMIT)" in answer["reason"]


def test_q7_an_export_waits_for_a_free_processor(servers: Servers, author: Browser) -> None:
    client = client_of(servers)
    with documents_locked(servers):
        taken = [start(client) for _ in range(2)]
        path = wish(author)
        job = wait_for("a second try", lambda: (job := job_of(author, path))["attempt"] >= 2 and job)
        assert job["reason"].startswith("no script processor is free: all 2 slots")
        assert author.get(path).json["state"] == "pending"
        wait_for(
            "a page that says so",
            lambda: "tried again by itself" in author.get(path.replace("/api", "") + "/").text,
        )
        for run_id in taken:
            client.stop(run_id)
    answer = over(author, path).json
    assert (answer["state"], answer["job"]["state"]) == ("ready", "done")


def test_q7_an_export_outlasts_a_processor_that_is_away(servers: Servers, author: Browser) -> None:
    servers.stop("processor")
    try:
        path = wish(author)
        job = wait_for("a deferral", lambda: (job := job_of(author, path))["reason"] and job)
        assert job["reason"].startswith("no script processor is free: the script processor")
        assert "does not answer" in job["reason"]
    finally:
        servers.start_processor()
    assert over(author, path).json["state"] == "ready"


def test_q7_with_processors_disabled_an_export_fails_at_once_and_says_so(servers: Servers, author: Browser) -> None:
    with changed(servers, "processor", OMERO_SCRIPTS_PROCESSORS="0"):
        answer = over(author, wish(author)).json
    assert (answer["state"], answer["job"]["state"], answer["job"]["attempt"]) == ("failed", "failed", 1)
    assert "disabled (omero.scripts.processors=0)" in answer["reason"]


def test_progress_is_shown_while_an_export_is_made(servers: Servers, author: Browser) -> None:
    with frozen(servers, "s3"):
        path = wish(author)
        # All documents are gathered; the file is on its way to the object storage.
        wait_for("progress", lambda: job_of(author, path)["progress"] == 90)
        page = author.get(path.replace("/api", "") + "/").text
        assert '<progress max="100" value="90"' in page
        assert "Being made: 90 %." in page
        assert 'value="90"' in author.get("/exports/").text
    assert over(author, path).json["state"] == "ready"


def test_q8_a_processor_that_is_killed_costs_an_attempt_and_no_export(servers: Servers, author: Browser) -> None:
    with documents_locked(servers):
        path = wish(author)
        pid = running(servers, author, path)
        servers.kill("processor")
        wait_for("the end of the run", lambda: gone(pid))
        servers.start_processor()
        job = wait_for("a reason", lambda: (job := job_of(author, path))["reason"] and job)
        assert "the script processor was lost" in job["reason"]
    answer = over(author, path).json
    assert answer["job"]["attempt"] >= 2
    assert_one_file(author, answer)


def test_q8_a_processor_that_is_stopped_has_its_runs_made_again(servers: Servers, author: Browser) -> None:
    with documents_locked(servers):
        path = wish(author)
        running(servers, author, path)
        servers.stop("processor")
        servers.start_processor()
    assert_one_file(author, over(author, path).json)


def test_q8_a_run_that_is_killed_is_made_again(servers: Servers, author: Browser) -> None:
    with documents_locked(servers):
        path = wish(author)
        os.kill(running(servers, author, path), signal.SIGKILL)
        job = wait_for("a reason", lambda: (job := job_of(author, path))["reason"] and job)
        assert job["reason"] == "the run was lost: its process was ended by SIGKILL"
    answer = over(author, path).json
    assert answer["job"]["attempt"] >= 2
    assert_one_file(author, answer)


def test_q8_a_worker_that_is_killed_has_its_export_made_again(servers: Servers, author: Browser) -> None:
    with documents_locked(servers):
        path = wish(author)
        pid = running(servers, author, path)
        job = job_of(author, path)["id"]
        servers.kill("export")
        # As if its half a minute had gone by.
        servers.sql("plugins", "UPDATE jobs_job SET lease_until = now() WHERE uuid = %s", job)
        servers.start_worker("export")
        # The newer attempt takes the slot of the one that nobody waits for any more.
        wait_for("the end of the first run", lambda: gone(pid))
        wait_for("the second run", lambda: client_of(servers).slots() == (2, 1))
    answer = over(author, path).json
    assert answer["job"]["attempt"] >= 2
    assert_one_file(author, answer)


def assert_one_file(person: Browser, answer: dict[str, Any]) -> None:
    """What its owner sees is one file, and it is the one that was made."""
    assert answer["state"] == "ready"
    file = person.get(answer["download"])
    assert (file.status, hashlib.sha256(file.body).hexdigest()) == (200, answer["sha256"])
    keys = storage.client().list_objects_v2(Bucket="drydock", Prefix=f"exports/{answer['id']}/")["Contents"]
    assert [entry["Key"] for entry in keys] == [Export.objects.get(pk=answer["id"]).key]

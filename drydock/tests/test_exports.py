"""Exports: a real file, with its hash, or a reason."""

import csv
import hashlib
import io
import zipfile
from collections.abc import Callable

import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from browser import Answer, Browser
from drydock import storage
from drydock.exports import service, worker
from drydock.exports.models import Export
from drydock.jobs import engine, kinds, tasks
from drydock.jobs.models import Job
from platform_servers import Servers, wait_for

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


@pytest.fixture
def export(unheard: None) -> Export:
    """Give an export that no worker hears of."""
    assert unheard is None
    return service.request_export(1, "csv")


def run(export: Export) -> Job:
    kind = kinds.get(service.EXPORT)
    job = engine.claim(kind, export.job_id)  # type: ignore[arg-type]
    assert job is not None
    tasks.perform(kind, job)
    export.refresh_from_db()
    return Job.objects.using("plugins").get(uuid=job.uuid)


def test_q6_an_export_past_its_time_limit_says_so(monkeypatch: pytest.MonkeyPatch, export: Export) -> None:
    def slow(*_: object) -> int:
        raise SoftTimeLimitExceeded

    monkeypatch.setattr(worker, "write_export", slow)
    job = run(export)
    assert (job.state, export.state) == ("failed", "failed")
    assert "time limit of 600 s (OMERO_IMS_CELERY_TIME_LIMIT)" in export.reason


def test_a_worker_that_lost_its_job_publishes_nothing(monkeypatch: pytest.MonkeyPatch, export: Export) -> None:
    def overtaken(*_: object) -> int:
        Job.objects.using("plugins").filter(uuid=export.job_id).update(attempt=2)
        return 0

    monkeypatch.setattr(worker, "write_export", overtaken)
    run(export)
    assert (export.state, export.key) == ("pending", "")

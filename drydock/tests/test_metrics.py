"""What Prometheus scrapes: complete, correct, and there when the databases are not."""

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import BotoCoreError, ClientError
from django.db import connections, transaction
from prometheus_client.parser import text_string_to_metric_families

from browser import Browser
from drydock import storage, storage_errors
from drydock.jobs import engine, kinds
from drydock.jobs.kinds import Kind
from drydock.jobs.models import Job, Latency, Tally
from drydock.operations import metrics, web_metrics
from platform_servers import TOKEN, Servers, free_port, wait_for

BEARER = {"Authorization": f"Bearer {TOKEN}"}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Samples:
    """Read a scrape strictly: every family once, with a help text, every series once."""
    samples: Samples = {}
    seen: set[str] = set()
    for family in text_string_to_metric_families(text):
        assert family.name not in seen
        assert len(family.documentation) > 20
        seen.add(family.name)
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def own() -> Samples:
    """Scrape this process, which talks to the same databases."""
    return parse(metrics.scrape().decode())


@pytest.fixture
def kind(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kind]:
    """Give a kind of job of its own, on a queue that nobody serves."""
    assert servers.processes
    name = f"test-{uuid.uuid4().hex[:8]}"
    made = Kind(name, "plugins", f"{name}-queue", lambda _: None, lambda *_: None, 60, late_after_seconds=100)
    monkeypatch.setitem(kinds._registered, name, made)
    yield made
    Job.objects.using("plugins").filter(kind=name).delete()


def accept(kind: Kind, **changes: object) -> Job:
    with transaction.atomic(using=kind.database):
        job = engine.accept(kind.name, {}, idempotency_key=uuid.uuid4().hex)
    Job.objects.using(kind.database).filter(uuid=job.uuid).update(**changes)
    return job


@pytest.fixture
def anybody(servers: Servers) -> Browser:
    return Browser(servers.url, servers.tls)


# --- The page ---------------------------------------------------------------------------------------------------------


def test_the_metrics_want_the_token(anybody: Browser) -> None:
    assert anybody.get("/metrics").status == 401
    answer = anybody.get("/metrics", **BEARER)
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=")


def test_o4_everything_is_there_before_anything_has_happened(anybody: Browser, kind: Kind) -> None:
    samples = parse(anybody.get("/metrics", **BEARER).text) | own()
    for registered in kinds.every():
        labels = {"kind": registered.name, "queue": registered.queue}
        for state in Job.State.values:
            assert value(samples, "drydock_jobs", state=state, **labels) >= 0
        for state in engine.OVER:
            assert value(samples, "drydock_jobs_finished_total", kind=registered.name, state=state) >= 0
            bucket = {"kind": registered.name, "state": state, "le": "60.0"}
            assert value(samples, "drydock_job_completion_seconds_bucket", **bucket) >= 0
        for name in ("oldest_due_age_seconds", "late", "most_attempts"):
            assert value(samples, f"drydock_jobs_{name}", **labels) >= 0
        assert value(samples, "drydock_jobs_leases_expired_total", kind=registered.name) >= 0
        assert value(samples, "drydock_jobs_deferred_total", kind=registered.name) >= 0
    assert value(samples, "drydock_jobs_finished_total", kind=kind.name, state="done") == 0
    for database in ("core", "plugins"):
        assert value(samples, "drydock_database_up", database=database) == 1
        assert value(samples, "drydock_broker_errors_total", database=database) >= 0
        assert value(samples, "drydock_relay_last_pass_age_seconds", database=database) < 30
    assert value(samples, "drydock_s3_errors_total", operation="PutObject") >= 0


# --- Jobs -------------------------------------------------------------------------------------------------------------


def test_o1_the_figures_of_jobs_are_right_and_outlive_them(kind: Kind) -> None:
    ago = engine._from_now
    accept(kind, created=ago(-50), run_after=ago(600), bell_after=ago(600))
    assert value(own(), "drydock_jobs_oldest_due_age_seconds", kind=kind.name, queue=kind.queue) == 0
    accept(kind, created=ago(-500), run_after=ago(-400), bell_after=ago(3600))
    done, failed, running = (accept(kind, bell_after=ago(3600)) for _ in range(3))
    for job in (done, failed, running):
        assert engine.claim(kind, job.uuid)
    times = {"created": ago(-45), "started": ago(-43)}
    Job.objects.using("plugins").filter(uuid__in=[done.uuid, failed.uuid]).update(**times)
    with engine.finishing(kind, done.uuid, 1):
        pass
    with engine.finishing(kind, failed.uuid, 1, Job.State.FAILED, "no"):
        pass
    samples, labels = own(), {"kind": kind.name, "queue": kind.queue}
    states = {state: value(samples, "drydock_jobs", state=state, **labels) for state in Job.State.values}
    assert states == {"queued": 2, "running": 1, "done": 1, "failed": 1, "dead": 0}
    assert 400 <= value(samples, "drydock_jobs_oldest_due_age_seconds", **labels) < 460
    assert value(samples, "drydock_jobs_late", **labels) == 1
    assert value(samples, "drydock_jobs_most_attempts", **labels) == 1
    Job.objects.using("plugins").filter(kind=kind.name).delete()
    samples = own()
    assert value(samples, "drydock_jobs_finished_total", kind=kind.name, state="done") == 1
    end = {"kind": kind.name, "state": "done"}
    buckets = [value(samples, "drydock_job_completion_seconds_bucket", le=le, **end) for le in ("30.0", "60.0", "+Inf")]
    assert buckets == [0, 1, 1]
    assert value(samples, "drydock_job_completion_seconds_count", **end) == 1
    assert 45 <= value(samples, "drydock_job_completion_seconds_sum", **end) < 60
    assert value(samples, "drydock_job_start_seconds_bucket", kind=kind.name, le="2.5") == 2
    Latency.objects.using("plugins").filter(kind=kind.name).delete()


def test_what_other_apps_count_is_there(servers: Servers) -> None:
    assert servers.processes
    subject = f"test-{uuid.uuid4().hex[:8]}"
    for database in ("core", "plugins"):
        engine.tally(database, subject, "seen", 2)
    assert value(own(), "drydock_events_total", subject=subject, event="seen") == 4
    for database in ("core", "plugins"):
        Tally.objects.using(database).filter(subject=subject).delete()


# --- Databases that are away ------------------------------------------------------------------------------------------


@pytest.fixture
def black_hole(servers: Servers) -> Iterator[Browser]:
    """A web tier whose plugins database takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"postgresql://x@127.0.0.1:{nobody.getsockname()[1]}/x"
        servers.start_web("web-alone", DATABASE_PLUGINS_URL=url)
        browser = Browser(f"https://localhost:{servers.ports['web-alone']}", servers.tls)
        wait_for("the web tier", lambda: browser.get("/health"))
        yield browser
        servers.stop("web-alone")


def test_o4_a_scrape_succeeds_without_a_database(black_hole: Browser) -> None:
    started = time.monotonic()
    samples = parse(black_hole.get("/metrics", **BEARER).text)
    # Prometheus gives up after 10 s.
    assert time.monotonic() - started < 9
    assert value(samples, "drydock_database_up", database="plugins") == 0
    assert value(samples, "drydock_database_up", database="core") == 1
    assert ("drydock_jobs_finished_total", frozenset({("kind", "export"), ("state", "done")})) not in samples
    assert value(samples, "drydock_http_requests_total", method="GET", route="/health", status="200") >= 1


# --- Requests ---------------------------------------------------------------------------------------------------------


def requests_of(samples: Samples, **labels: str) -> float:
    """Return how many requests were counted, by the labels given."""
    found = [
        number
        for (name, all_labels), number in samples.items()
        if name == "drydock_http_requests_total" and labels.items() <= dict(all_labels).items()
    ]
    return sum(found)


def test_o1_requests_are_counted_by_their_pattern(servers: Servers, sign_in: Callable[..., Browser]) -> None:
    person, secret = sign_in(), uuid.uuid4()

    def scraped() -> tuple[str, Samples]:
        text = person.get("/metrics", **BEARER).text
        return text, parse(text)

    before = scraped()[1]
    person.get(f"/documents/{secret}/")
    person.get(f"/no/such/{secret}")
    person.get("/static/drydock/icon.svg")
    person.request("BREW", "/health")
    text, after = scraped()
    assert str(secret) not in text
    assert "BREW" not in text
    route = {"method": "GET", "route": "/documents/<uuid:document_id>/"}
    for labels in (
        {"status": "404", **route},
        {"status": "404", "method": "GET", "route": "unknown"},
        {"status": "200", "method": "GET", "route": "/static/"},
        {"status": "403", "method": "other", "route": "/health"},
    ):
        assert requests_of(after, **labels) - requests_of(before, **labels) == 1, labels
    assert value(after, "drydock_http_request_duration_seconds_count", **route) >= 1
    assert servers.processes


def files(servers: Servers) -> dict[Path, list[str]]:
    """Return the files of the counts, by the web tier's run."""
    base = Path(servers.environment["DRYDOCK_DATA_DIR"]) / "metrics"
    return {run: sorted(file.name for file in run.iterdir()) for run in base.iterdir()}


def workers(servers: Servers, name: str) -> list[int]:
    """Return the processes of a web tier that answer requests."""
    parent = servers.processes[name].pid
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children]


def test_the_counts_survive_a_worker_and_their_files_do_not_pile_up(servers: Servers) -> None:
    servers.start_web("web-alone")
    browser = Browser(f"https://localhost:{servers.ports['web-alone']}", servers.tls)
    wait_for("the web tier", lambda: browser.get("/health"))
    before = set(files(servers))

    def scraped() -> float:
        samples = parse(browser.get("/metrics", **BEARER).text)
        return requests_of(samples, method="GET", route="/webgateway/")

    def ask(number: int) -> None:
        with ThreadPoolExecutor(4) as pool:
            assert {answer.status for answer in pool.map(lambda _: browser.get("/webgateway/"), range(number))} == {200}

    ask(20)
    for _ in range(3):
        for worker in (old := workers(servers, "web-alone")):
            os.kill(worker, signal.SIGTERM)
        wait_for("new workers", lambda old=old: ready(servers, old))
        wait_for("an answer", lambda: browser.get("/health"))
        ask(10)
    assert scraped() == 50
    assert set(files(servers)) == before
    for names in files(servers).values():
        assert {name.rpartition("_")[2] for name in names} <= {"0.db", "1.db"}
    servers.stop("web-alone")
    # The next one that starts removes what the last has left, and not what the others use.
    servers.start_web("web-alone")
    wait_for("the web tier", lambda: browser.get("/health"))
    assert scraped() == 0
    assert len(files(servers)) == len(before)
    servers.stop("web-alone")


def ready(servers: Servers, old: list[int]) -> bool:
    new = workers(servers, "web-alone")
    return len(new) == 2 and not set(new) & set(old)


def test_without_gunicorn_a_process_counts_for_itself() -> None:
    web_metrics.observe("GET", "/here", 200, 0.02)
    samples: dict[str, float] = {}
    for family in web_metrics.collect():
        samples |= {
            f"{s.name}{s.labels.get('le', '')}": s.value for s in family.samples if "/here" in s.labels.values()
        }
    assert samples["drydock_http_requests_total"] == 1
    assert samples["drydock_http_request_duration_seconds_bucket0.025"] == 1


# --- The object storage's errors --------------------------------------------------------------------------------------


def s3_errors(operation: str) -> int:
    rows = Tally.objects.using("core").filter(subject=storage_errors.SUBJECT, event=operation)
    return sum(row.count for row in rows)


def counted(operation: str, before: int, by: int = 1) -> None:
    wait_for("the error being counted", lambda: s3_errors(operation) == before + by, 10)


@pytest.mark.usefixtures("servers")
def test_o4_errors_of_the_object_storage_are_counted_and_not_masked() -> None:
    before = {operation: s3_errors(operation) for operation in storage_errors.OPERATIONS}
    with pytest.raises(ClientError, match="NoSuchKey"), transaction.atomic(using="core"):
        # The transaction is rolled back, the count is not.
        storage.get("no/such/object")
    counted("GetObject", before["GetObject"])
    storage.put("test/metrics", b"x" * 100, content_type="text/plain", sha256="")
    body = storage.get("test/metrics")
    assert b"".join(body.iter_chunks(10)) == b"x" * 100
    storage.delete("test/metrics")
    assert storage.bucket_exists()
    assert value(own(), "drydock_s3_errors_total", operation="GetObject") == before["GetObject"] + 1
    for operation in ("DeleteObject", "HeadBucket", "PutObject", storage_errors.READ):
        assert s3_errors(operation) == before[operation]


@pytest.fixture
def breaking_storage(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An object storage that sends half an object and hangs up, and then is gone."""
    from drydock import config

    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
            connection.close()
            server.close()

        threading.Thread(target=serve, daemon=True).start()
        changed = {**servers.environment, "S3_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"}
        monkeypatch.setattr(config, "load", lambda: config.Config.from_environment(changed))
        storage.client.cache_clear()
        yield
        storage.client.cache_clear()


@pytest.mark.usefixtures("breaking_storage")
def test_a_storage_that_hangs_up_is_counted() -> None:
    read, put = s3_errors(storage_errors.READ), s3_errors("PutObject")
    body = storage.get("any")
    with pytest.raises((BotoCoreError, OSError)):
        b"".join(body.iter_chunks())
    counted(storage_errors.READ, read)
    with pytest.raises(BotoCoreError, match="Could not connect"):
        storage.put("any", b"", content_type="text/plain", sha256="")
    counted("PutObject", put)


@pytest.mark.usefixtures("servers")
def test_errors_wait_for_a_database_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    before = s3_errors("GetObject")
    with monkeypatch.context() as away:
        away.setitem(connections["core"].settings_dict, "PORT", str(free_port()))
        away.setitem(connections["core"].settings_dict, "HOST", "localhost")
        with pytest.raises(ClientError, match="NoSuchKey"):
            storage.get("no/such/object")
        wait_for("the writer giving up", lambda: storage_errors._writer is None, 10)
    with pytest.raises(ClientError, match="NoSuchKey"):
        storage.get("no/such/object")
    counted("GetObject", before, 2)

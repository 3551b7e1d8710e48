"""Health, readiness and the enqueue ping."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator

import pytest

from browser import Browser
from platform_servers import TOKEN, Servers, free_port, wait_for

BEARER = {"Authorization": f"Bearer {TOKEN}"}
ASK_READY = """
import json, time, django; django.setup()
from django.test import Client
started = time.monotonic()
answer = Client().get("/ready")
print(json.dumps([answer.status_code, answer.json()["missing"], time.monotonic() - started]))
"""


@pytest.fixture
def anybody(servers: Servers) -> Browser:
    return Browser(servers.url, servers.tls)


def ready(servers: Servers, **changes: str) -> tuple[int, dict[str, str], float]:
    """Ask a platform whose environment differs."""
    command = [sys.executable, "-c", ASK_READY]
    environment = servers.child_environment(**changes)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 0, ended.stderr
    status, missing, seconds = json.loads(ended.stdout)
    return status, missing, seconds


def test_health_and_webgateway(anybody: Browser) -> None:
    assert anybody.get("/health").json["status"] == "alive"
    assert anybody.get("/webgateway/").status == 200
    assert list(anybody.cookies) == []


def test_health_touches_nothing(servers: Servers) -> None:
    nowhere = f"localhost:{free_port()}"
    changes = {
        "DATABASE_CORE_URL": f"postgresql://x@{nowhere}/x", "DATABASE_PLUGINS_URL": f"postgresql://x@{nowhere}/x",
        "REDIS_URL": f"redis://{nowhere}", "S3_ENDPOINT": f"http://{nowhere}",
    }  # fmt: skip
    code = "import django; django.setup(); from django.test import Client; print(Client().get('/health').status_code)"
    environment = servers.child_environment(**changes)
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "200\n"


def test_ready_when_everything_is_there(anybody: Browser) -> None:
    answer = anybody.get("/ready")
    assert (answer.status, answer.json) == (200, {"ready": True, "missing": {}})


@pytest.mark.parametrize(
    ("part", "changes", "why"),
    [
        ("database core", {"DATABASE_CORE_URL": "postgresql://x@localhost:{port}/x"}, "does not answer"),
        ("database plugins", {"DATABASE_PLUGINS_PASSWORD": "wrong"}, "does not answer"),
        ("redis", {"REDIS_URL": "rediss://drydock@localhost:{port}"}, "does not answer (ConnectionError)"),
        ("redis", {"REDIS_PASSWORD": "wrong"}, "AuthenticationError"),
        ("s3", {"S3_ENDPOINT": "https://localhost:{port}"}, "does not answer (EndpointConnectionError)"),
        ("s3", {"S3_SECRET_ACCESS_KEY": "wrong"}, "does not answer (ClientError)"),
        ("s3", {"S3_BUCKET": "no-such-bucket"}, "bucket no-such-bucket does not exist"),
    ],
)
def test_ready_names_what_is_missing(servers: Servers, part: str, changes: dict[str, str], why: str) -> None:
    port = free_port()
    status, missing, _ = ready(servers, **{name: value.format(port=port) for name, value in changes.items()})
    assert status == 503
    assert list(missing) == [part]
    assert why in missing[part]


def test_ready_names_pending_migrations(servers: Servers) -> None:
    servers.sql("plugins", "CREATE DATABASE fresh", database="postgres")
    url = servers.environment["DATABASE_PLUGINS_URL"].replace("/drydock?", "/fresh?")
    status, missing, _ = ready(servers, DATABASE_PLUGINS_URL=url)
    assert status == 503
    assert list(missing) == ["database plugins"]
    assert "migrations are pending" in missing["database plugins"]
    assert "exports.0001_initial" in missing["database plugins"]


def test_o4_ready_names_a_missing_relay(servers: Servers, anybody: Browser) -> None:
    servers.stop("relay")
    try:
        # As if it had been gone for a while.
        servers.sql("plugins", "UPDATE jobs_heartbeat SET at = now() - interval '31 seconds'")
        answer = anybody.get("/ready")
        assert (answer.status, list(answer.json["missing"])) == (503, ["relay plugins"])
        assert "no relay has for 31 s made a pass over plugins" in answer.json["missing"]["relay plugins"]
        servers.sql("plugins", "DELETE FROM jobs_heartbeat")
        assert "no relay ever has made a pass" in anybody.get("/ready").json["missing"]["relay plugins"]
    finally:
        servers.start_relay()
    wait_for("the relay being there again", lambda: anybody.get("/ready").status == 200)


def test_ready_answers_in_time_when_nothing_else_does(servers: Servers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as black_hole:
        port = black_hole.getsockname()[1]
        status, missing, seconds = ready(
            servers,
            DATABASE_CORE_URL=f"postgresql://x@127.0.0.1:{port}/x",
            DATABASE_PLUGINS_URL=f"postgresql://x@127.0.0.1:{port}/x",
            REDIS_URL=f"rediss://x@127.0.0.1:{port}",
            S3_ENDPOINT=f"https://127.0.0.1:{port}",
        )
    assert status == 503
    assert sorted(missing) == ["database core", "database plugins", "redis", "s3"]
    assert seconds < 6


@pytest.mark.parametrize("path", ["/internal/ping", "/internal/latex/apply"])
@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}])
def test_internal_endpoints_want_the_token(anybody: Browser, path: str, header: dict[str, str]) -> None:
    answer = anybody.post(path, {}, **header)
    assert (answer.status, answer.json["code"]) == (401, "UNAUTHORIZED")


@pytest.fixture
def frozen_export_worker(servers: Servers) -> Iterator[None]:
    group = servers.processes["export"].pid
    os.killpg(group, signal.SIGSTOP)
    yield
    os.killpg(group, signal.SIGCONT)


def test_the_ping_travels_to_each_worker_kind_and_back(anybody: Browser) -> None:
    answer = wait_for("every worker answering", lambda: ok(anybody.post("/internal/ping?timeout=20", {}, **BEARER)))
    assert sorted(answer.json) == ["export", "latex.compile"]
    for queue, result in answer.json.items():
        assert result["ok"]
        assert result["worker"].startswith(f"{queue}@")
    warm = anybody.post("/internal/ping", {}, **BEARER).json
    assert max(result["seconds"] for result in warm.values()) < 2


def ok(answer: object) -> object:
    return answer if getattr(answer, "status", 0) == 200 else None


@pytest.mark.usefixtures("frozen_export_worker")
def test_a_silent_worker_is_named(anybody: Browser) -> None:
    answer = anybody.post("/internal/ping?timeout=1.5", {}, **BEARER)
    assert answer.status == 503
    assert answer.json["latex.compile"]["ok"]
    assert answer.json["export"] == {"ok": False, "error": "no worker answered on this queue within 1.5 s"}


def test_the_ping_of_one_queue_is_a_cheap_health_check(anybody: Browser) -> None:
    wait_for("the worker answering", lambda: ok(anybody.get("/internal/ping/export", **BEARER)))
    started = time.monotonic()
    answer = anybody.get("/internal/ping/latex.compile", **BEARER)
    assert (answer.status, list(answer.json)) == (200, ["latex.compile"])
    assert time.monotonic() - started < 2
    assert anybody.get("/internal/ping/nonsense", **BEARER).status == 404
    assert anybody.get("/internal/ping/export?timeout=1000", **BEARER).status == 400


def test_ensure_bucket_changes_nothing_twice(servers: Servers) -> None:
    assert servers.drydock("ensure_bucket", S3_BUCKET="another").stdout == "changed another\n"
    assert servers.drydock("ensure_bucket", S3_BUCKET="another").stdout == "unchanged another\n"
    away = servers.drydock("ensure_bucket", S3_ENDPOINT=f"https://localhost:{free_port()}")
    assert away.returncode == 1
    assert "Check S3_ENDPOINT" in away.stderr
    assert len(away.stderr.splitlines()) == 1


def test_logs_are_one_json_object_a_line(servers: Servers, anybody: Browser) -> None:
    anybody.get("/webgateway/?token=not-for-the-log")
    wait_for("the access log", lambda: "GET /webgateway/ status=200" in servers.log("web"))
    assert "not-for-the-log" not in servers.log("web")
    assert all(json.loads(line)["message"] for line in servers.log("web").splitlines())


# --- The operators' view of jobs --------------------------------------------------------------------------------------


@pytest.fixture
def waiting(servers: Servers) -> Iterator[dict[str, str]]:
    """Two jobs of a request, one on each database, that wait for an hour: what their kinds would do is of no matter."""
    request, ids = f"request-{uuid.uuid4().hex[:12]}", {}
    for database, state, reason in (("core", "failed", "<b>broken</b>"), ("plugins", "queued", "nobody is free")):
        ids[database] = str(uuid.uuid4())
        servers.sql(
            database,
            "INSERT INTO jobs_job (uuid, kind, queue, payload, state, attempt, deferred, max_attempts, run_after,"
            " bell_after, idempotency_key, request_id, reason) VALUES (%s, %s, %s, '{\"what\": 1}', %s, 3, 2, 5,"
            " now() + interval '1 hour', now() + interval '1 hour', %s, %s, %s)",
            ids[database], f"test-{database}", f"test-{database}", state, ids[database], request, reason,
        )  # fmt: skip
    yield {**ids, "request": request}
    for database in ("core", "plugins"):
        servers.sql(database, "DELETE FROM jobs_job WHERE uuid = %s", ids[database])


def test_only_staff_see_jobs(
    anybody: Browser, sign_in: Callable[..., Browser], waiting: dict[str, str], servers: Servers
) -> None:
    paths = ("/operations/jobs/", f"/operations/jobs/{waiting['plugins']}/")
    learner, operator = sign_in(), sign_in(staff=True)
    for path in paths:
        assert "/login?next=" in anybody.get(path).url
        assert learner.get(path).status == 404
        assert operator.get(path).status == 200
    assert learner.submit(paths[1]).status == 404
    assert servers.sql("plugins", "SELECT run_after > now() FROM jobs_job WHERE uuid = %s", waiting["plugins"]) == [
        (True,)
    ]
    assert "/operations/jobs/" not in learner.get("/").text
    assert "/operations/jobs/" in operator.get("/").text


def test_jobs_of_both_databases_are_listed_and_filtered(
    sign_in: Callable[..., Browser], waiting: dict[str, str]
) -> None:
    operator = sign_in(staff=True)

    def shown(query: str) -> list[str]:
        page = operator.get(f"/operations/jobs/?request={waiting['request']}{query}").text
        places = {name: page.find(f"/operations/jobs/{waiting[name]}/") for name in ("core", "plugins")}
        return sorted((name for name, place in places.items() if place >= 0), key=lambda name: places[name])

    assert shown("") == ["plugins", "core"]
    assert shown("&order=oldest") == ["core", "plugins"]
    assert shown("&state=failed") == ["core"]
    assert shown("&queue=test-plugins") == ["plugins"]
    assert shown("&kind=test-core") == ["core"]
    assert shown("&state=done") == []
    page = operator.get(f"/operations/jobs/?request={waiting['request']}").text
    assert "&lt;b&gt;broken&lt;/b&gt;" in page
    for fact in ("nobody is free", "runs in 59 min", "1 of 5, deferred 2×", waiting["request"]):
        assert fact in page


def test_a_waiting_job_can_be_run_now_and_another_one_cannot(
    sign_in: Callable[..., Browser], servers: Servers, waiting: dict[str, str]
) -> None:
    operator = sign_in(staff=True)
    page = operator.get(f"/operations/jobs/{waiting['plugins']}/")
    for fact in (waiting["plugins"], waiting["request"], "nobody is free", "&quot;what&quot;: 1", "Run again now"):
        assert fact in page.text
    answer = operator.submit(f"/operations/jobs/{waiting['plugins']}/")
    assert answer.status == 200
    assert "due for" in answer.text
    due = "SELECT run_after <= now() AND bell_after <= now() AND bells = 0 FROM jobs_job WHERE uuid = %s"
    assert servers.sql("plugins", due, waiting["plugins"]) == [(True,)]
    over = operator.get(f"/operations/jobs/{waiting['core']}/")
    assert "Run again now" not in over.text
    refused = operator.submit(f"/operations/jobs/{waiting['core']}/")
    assert refused.status == 409
    assert "does not wait any more" in refused.text
    assert operator.get(f"/operations/jobs/{uuid.uuid4()}/").status == 404


def test_the_list_names_a_database_that_is_away(servers: Servers, sign_in: Callable[..., Browser]) -> None:
    operator = sign_in(staff=True)
    servers.start_web("web-alone", DATABASE_PLUGINS_URL=f"postgresql://x@localhost:{free_port()}/x")
    operator.base = f"https://localhost:{servers.ports['web-alone']}"
    wait_for("the web tier", lambda: operator.get("/health"))
    page = operator.get("/operations/jobs/")
    servers.stop("web-alone")
    assert page.status == 200
    assert "The database “plugins” does not answer" in page.text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3725, "1 h 2 min"), (90061, "1 d 1 h")],
)
def test_times_are_short(seconds: float, text: str) -> None:
    from drydock.operations.jobs import span

    assert span(seconds) == text

"""The script processor: runs that end when they should, slots, logins, and a start that nothing slow holds up."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from drydock import storage
from drydock.processor.client import Client, ProcessorError, State
from platform_servers import PASSWORD, SOURCES, TOKEN, Servers, free_port, wait_for

EXPORT = {"owner": 0, "format": "csv"}


@contextmanager
def documents_locked(servers: Servers) -> Iterator[None]:
    """Make every export slow, for real: it waits until the documents may be read again."""
    parts = {"host": "localhost", "port": servers.ports["core"], "user": "drydock", "password": PASSWORD}
    with psycopg.connect(**parts, dbname="drydock") as connection:  # type: ignore[arg-type]
        connection.execute("LOCK TABLE documents_document IN ACCESS EXCLUSIVE MODE")
        yield
        connection.rollback()


def client_of(servers: Servers, name: str = "processor") -> Client:
    return Client(f"https://localhost:{servers.ports[name]}", TOKEN, str(servers.ca))


def start(client: Client, job: str = "", attempt: int = 1) -> str:
    job = job or str(uuid.uuid4())
    return client.start("export", EXPORT | {"key": f"exports/{job}/a{attempt}.csv"}, job=job, attempt=attempt)


def over(client: Client, run_id: str) -> dict[str, Any]:
    def run() -> dict[str, Any] | None:
        described = client.run(run_id, wait_seconds=1)
        return described if described["state"] != State.RUNNING else None

    ended = wait_for(f"the end of {run_id}", run, 60)
    assert isinstance(ended, dict)
    return ended


def pid_of(client: Client, run_id: str) -> int:
    return int(wait_for("a process", lambda: client.run(run_id)["pid"]))


def gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture(autouse=True)
def idle(servers: Servers) -> None:
    """Let what other tests asked for come to its end: these tests count slots."""
    wait_for("free slots", lambda: client_of(servers).slots() == (2, 0), 60)


@pytest.fixture
def second(servers: Servers) -> Iterator[str]:
    """Give the name of a second processor, for a test that ends it; it is started by the test."""
    yield "second"
    if "second" in servers.processes:
        servers.stop("second")


def start_second(servers: Servers, **changes: str) -> Client:
    # With a run directory of its own: it is another host.
    servers.start_processor("second", DRYDOCK_RUN_DIR=str(servers.root / "run-second"), **changes)
    servers.processor_answers("second")
    return client_of(servers, "second")


# --- Health and logins ------------------------------------------------------------------------------------------------


def test_h3_the_health_check_is_a_real_login_and_a_listing(servers: Servers) -> None:
    ended = servers.drydock("check_processor")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        f"{servers.environment['PROCESSOR_URL']}: logged in as job-service; scripts: export; 0 of 2 slots busy"
    ]


def test_h3_the_health_check_fails_without_login_script_or_processor(servers: Servers) -> None:
    ended = servers.drydock("check_processor", DRYDOCK_INTERNAL_TOKEN="wrong")
    assert (ended.returncode, "DRYDOCK_INTERNAL_TOKEN" in ended.stderr) == (1, True)
    ended = servers.drydock("check_processor", DRYDOCK_INTERNAL_TOKEN="")
    assert (ended.returncode, "DRYDOCK_INTERNAL_TOKEN is not set" in ended.stderr) == (2, True)
    ended = servers.drydock("check_processor", "--script", "other")
    assert (ended.returncode, "drydock register_scripts" in ended.stderr) == (1, True)
    ended = servers.drydock("check_processor", "--url", f"https://localhost:{free_port()}")
    assert (ended.returncode, "does not answer" in ended.stderr) == (1, True)
    servers.sql("core", "UPDATE accounts_user SET is_active = false WHERE username = 'job-service'")
    try:
        ended = servers.drydock("check_processor")
        assert (ended.returncode, "switched off" in ended.stderr) == (1, True)
        # Preparing the platform again does not undo what an operator decided.
        assert servers.drydock("ensure_job_service").stdout == "unchanged job-service\n"
        assert servers.drydock("check_processor").returncode == 1
    finally:
        servers.sql("core", "UPDATE accounts_user SET is_active = true WHERE username = 'job-service'")


def test_h3_the_relay_logs_in_and_lists_as_cheaply_as_it_pings_workers(servers: Servers) -> None:
    url = servers.environment["PROCESSOR_URL"]

    def ask(token: str = TOKEN) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", servers.ports["asking"], timeout=20)
        with closing(connection):
            connection.request("GET", "/ping-processor", headers={"Authorization": f"Bearer {token}"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())["message"]

    servers.start_relay("relay", "--processor", url, name="asking")
    try:
        wait_for("the relay's answer", lambda: ask()[0] == 200)
        assert ask() == (200, f"{url}: logged in as job-service; scripts: export; 0 of 2 slots busy")
        assert ask("wrong")[0] == 401
        servers.sql("core", "UPDATE accounts_user SET is_active = false WHERE username = 'job-service'")
        try:
            status, message = ask()
            assert (status, "switched off" in message) == (503, True)
        finally:
            servers.sql("core", "UPDATE accounts_user SET is_active = true WHERE username = 'job-service'")
    finally:
        servers.stop("asking")


def test_the_health_check_starts_without_django() -> None:
    program = "import sys, drydock.processor.client; print(sorted({'django', 'psycopg', 'boto3'} & set(sys.modules)))"
    command, sources = [sys.executable, "-c", program], {"PYTHONPATH": str(SOURCES)}
    assert subprocess.run(command, env=sources, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_token_opens_nothing_but_a_login(servers: Servers) -> None:
    client = client_of(servers)
    client.session = TOKEN
    with pytest.raises(ProcessorError) as refused:
        client._send("GET", "/scripts", TOKEN)
    assert refused.value.code == "UNAUTHORIZED"
    with pytest.raises(ProcessorError, match="token"):
        Client(client.url, "wrong", str(servers.ca)).scripts()
    # A session that is over is opened anew.
    assert client.scripts() == ["export"]


def test_what_cannot_be_run_is_refused_with_a_reason(servers: Servers) -> None:
    client = client_of(servers)
    job = str(uuid.uuid4())
    for arguments, code in (
        (("rm", {}, job, 1), "UNKNOWN_SCRIPT"),
        (("export", {}, "../../etc", 1), "INVALID_INPUT"),
        (("export", [], job, 1), "INVALID_INPUT"),
        (("export", {}, job, "1"), "INVALID_INPUT"),
    ):
        script, parameters, job_id, attempt = arguments
        with pytest.raises(ProcessorError) as refused:
            client.start(script, parameters, job=job_id, attempt=attempt)  # type: ignore[arg-type]
        assert refused.value.code == code
    for request in (("GET", "/runs/0-1"), ("DELETE", "/runs/0-1"), ("PUT", "/runs"), ("GET", "/etc/passwd")):
        with pytest.raises(ProcessorError):
            client._call(*request)


# --- Start up ---------------------------------------------------------------------------------------------------------


def test_s3_account_and_scripts_are_made_once(servers: Servers) -> None:
    servers.sql("core", "DELETE FROM accounts_user WHERE username = 'job-service'")
    servers.sql("plugins", "DELETE FROM processor_script")
    said = [
        servers.drydock(command).stdout.split()[0]
        for command in ("ensure_job_service", "ensure_job_service", "register_scripts", "register_scripts")
    ]
    assert said == ["changed", "unchanged", "changed", "unchanged"]
    (password,) = servers.sql("core", "SELECT password FROM accounts_user WHERE username = 'job-service'")[0]
    assert password.startswith("!")
    assert servers.sql("plugins", "SELECT count(*) FROM processor_script") == [(1,)]


def test_s3_slow_work_never_holds_the_start_up(servers: Servers, second: str) -> None:
    nowhere = f"postgresql://drydock@localhost:{free_port()}/drydock"
    servers.start_processor(second, DATABASE_PLUGINS_URL=nowhere, DATABASE_CORE_URL=nowhere)
    client = client_of(servers, second)
    assert wait_for("an answer", client.slots) == (2, 0)
    with pytest.raises(ProcessorError, match="database does not answer"):
        client.login()
    wait_for("a line in the log", lambda: "does not take the heartbeat" in servers.log(second))
    servers.stop(second)


def test_s5_the_preparation_is_idempotent(servers: Servers, tmp_path: Path) -> None:
    changes = {"DRYDOCK_DATA_DIR": str(tmp_path / "data"), "DRYDOCK_RUN_DIR": str(tmp_path / "run")}

    def state() -> list[tuple[str, os.stat_result]]:
        return [(str(path), path.stat()) for path in sorted(tmp_path.rglob("*"))]

    first = servers.drydock("prepare_processor", **changes)
    before = state()
    again = servers.drydock("prepare_processor", **changes)
    assert (first.returncode, first.stdout.split()[0]) == (0, "changed"), first.stderr
    assert (again.returncode, again.stdout.split()[0]) == (0, "unchanged")
    assert before
    assert state() == before


def test_s2_the_preparation_names_the_variable_that_is_wrong(servers: Servers, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended_certificate = tmp_path / "ended.crt"
    making = ["openssl", "req", "-x509", "-key", f"{servers.root}/host.key", "-subj", "/CN=ended", "-days", "1", "-out"]
    subprocess.run([*making, str(ended_certificate)], check=True, capture_output=True)
    for variable, value, why in (
        ("DRYDOCK_DATA_DIR", f"{tmp_path}/file/data", "Not a directory"),
        ("DRYDOCK_RUN_DIR", f"{tmp_path}/file/run", "Not a directory"),
        ("PROCESSOR_CERTIFICATE", "/nowhere", "not a readable file"),
        ("PROCESSOR_CERTIFICATE", str(ended_certificate), "has ended"),
        ("PROCESSOR_KEY", str(servers.root / "ca.key"), "does not fit"),
        ("PROCESSOR_KEY", "", "not a readable file"),
    ):
        ended = servers.drydock("prepare_processor", **{variable: value})
        assert ended.returncode == 1
        (line,) = ended.stderr.splitlines()
        assert line.startswith(f"drydock: {variable} is wrong"), line
        assert why in line
        assert "Set it in the environment, for example" in line


def test_a_processor_tells_that_it_lives_until_it_ends(servers: Servers, second: str) -> None:
    port = start_second(servers).url.rsplit(":", 1)[1]
    row = "SELECT slots FROM processor_processor WHERE url LIKE %s AND heartbeat > now() - interval '20 seconds'"
    assert wait_for("a heartbeat", lambda: servers.sql("plugins", row, f"%:{port}")) == [(2,)]
    servers.stop(second)
    assert servers.sql("plugins", row, f"%:{port}") == []


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_a_run_gives_a_result_and_asking_twice_runs_it_once(servers: Servers) -> None:
    client, job = client_of(servers), str(uuid.uuid4())
    run_id = start(client, job)
    assert start(client, job) == run_id
    run = over(client, run_id)
    assert (run["state"], run["progress"], run["result"]["documents"]) == ("done", 0, 0), run
    assert storage.get(run["result"]["key"]).read().startswith(b"id,title")
    client.stop(run_id)
    with pytest.raises(ProcessorError, match="knows no run"):
        client.run(run_id)
    assert not list((servers.root / "run" / "jobs").glob(f"run-{run_id}*"))


def test_slots_are_a_bound(servers: Servers) -> None:
    client = client_of(servers)
    with documents_locked(servers):
        taken = [start(client) for _ in range(2)]
        with pytest.raises(ProcessorError, match="all 2 slots") as refused:
            start(client)
        assert refused.value.code == "PROCESSOR_BUSY"
        client.stop(taken[0])
        third = start(client)
    assert over(client, third)["state"] == "done"
    assert over(client, taken[1])["state"] == "done"
    client.stop(taken[1])
    client.stop(third)


def test_a_stopped_run_leaves_no_process(servers: Servers) -> None:
    client = client_of(servers)
    with documents_locked(servers):
        run_id = start(client)
        pid = pid_of(client, run_id)
        client.stop(run_id)
        assert gone(pid)
    assert client.slots() == (2, 0)


def test_a_newer_attempt_takes_the_place_of_an_older_one(servers: Servers) -> None:
    client, job = client_of(servers), str(uuid.uuid4())
    with documents_locked(servers):
        pid = pid_of(client, start(client, job, attempt=1))
        newer = start(client, job, attempt=2)
        assert gone(pid)
        assert client.slots() == (2, 1)
    assert over(client, newer)["state"] == "done"
    client.stop(newer)


def test_q6_a_run_past_its_time_limit_is_killed(servers: Servers, second: str) -> None:
    client = start_second(servers, OMERO_IMS_CELERY_TIME_LIMIT="1")
    with documents_locked(servers):
        run_id = start(client)
        pid = pid_of(client, run_id)
        run = over(client, run_id)
        assert (run["state"], run["reason"]) == ("timed out", "it took longer than 1 s")
        assert gone(pid)
    servers.stop(second)


def test_a_run_that_somebody_kills_is_told_from_one_that_failed(servers: Servers) -> None:
    client = client_of(servers)
    with documents_locked(servers):
        run_id = start(client)
        os.kill(pid_of(client, run_id), signal.SIGKILL)
        run = over(client, run_id)
    assert (run["state"], run["reason"]) == ("lost", "its process was ended by SIGKILL")
    client.stop(run_id)
    failed = client.start("export", {}, job=str(uuid.uuid4()), attempt=1)
    run = over(client, failed)
    assert (run["state"], run["reason"], run["again"]) == ("failed", "KeyError: 'owner'", False)
    client.stop(failed)


def test_a_processor_ends_its_runs_and_then_itself(servers: Servers, second: str) -> None:
    client = start_second(servers)
    with documents_locked(servers):
        pid = pid_of(client, start(client))
        process = servers.processes[second]
        servers.stop(second)
        assert process.returncode == 0
        assert gone(pid)


def test_no_run_outlives_a_processor_that_is_killed(servers: Servers, second: str) -> None:
    client = start_second(servers)
    with documents_locked(servers):
        run_id = start(client)
        pid = pid_of(client, run_id)
        # Only the processor: its runs are in sessions of their own.
        process = servers.processes.pop(second)
        process.kill()
        process.wait()
        wait_for("the end of the run", lambda: gone(pid))
        leftover = servers.root / "run-second" / "jobs" / f"run-{run_id}.json"
        assert leftover.exists()
    start_second(servers)
    assert not leftover.exists()
    servers.stop(second)


def test_a_run_without_its_processor_ends_at_once(servers: Servers) -> None:
    ended = servers.drydock("run_script", "export", "--processor", "1")
    assert (ended.returncode, "nobody waits for this run" in ended.stderr) == (1, True)


def test_a_silent_client_holds_up_nobody(servers: Servers) -> None:
    with socket.create_connection(("localhost", servers.ports["processor"])):
        assert client_of(servers).slots() == (2, 0)

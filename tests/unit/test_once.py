"""A timer that elapses on several hosts and runs once: who runs it, when, and what happens when runs fail or connections break."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from programs import ROOT, load

once = load(ROOT / "roles/process/files/once.py", "evk_once")
POSTGRESQL = Path("/usr/lib/postgresql/15/bin")
HOUR = 3600.0


class Fake:
    """A database that several hosts share: the locks and rows are in `shared`."""

    def __init__(self, shared: dict[str, Any], failing: int = 0, once_exists: Path = Path("/")) -> None:
        self.shared, self.failing, self.once_exists = shared, failing, once_exists
        self.connections = 0

    def connect(self) -> None:
        self.connections += 1

    def close(self) -> None:
        if self.shared.get("lock") is self:
            self.shared["lock"] = None

    def ask(self, statement: str, *values: Any) -> Any:
        shared = self.shared
        if statement == "SELECT 1" and self.failing and self.once_exists.exists():
            self.failing -= 1
            raise once.Lost("server closed the connection unexpectedly")
        if statement == once.LOCK:
            if shared.get("lock") in (None, self):
                shared["lock"] = self
            return (shared["lock"] is self,)
        if statement == once.UNLOCK:
            shared["lock"] = None
        if statement == once.LAST:
            return (shared["now"], shared.get("success"), shared.get("host"), shared.get("started"), shared.get("running", False))
        if statement == once.BEGIN:
            shared |= {"host": values[1], "started": shared["now"], "running": True}
            return (shared["now"],)
        if statement == once.END:
            shared |= {"running": False, "status": values[0]}
            if values[1] == 0:
                shared["success"] = shared["started"]
        return None


@pytest.fixture(autouse=True)
def hourly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timers elapse at full hours, and nobody waits for long."""
    monkeypatch.setattr(once, "next_elapse", lambda _calendar, after: (after // HOUR + 1) * HOUR)
    monkeypatch.setattr(once, "POLL_SECONDS", 0.02)


def runner(database: Any, *command: str, limit: float = 60) -> Any:
    return once.Runner(database, "pier", "sweep", "hourly", limit, list(command) or ["true"])


def test_it_runs_when_it_has_elapsed_since_the_last_success_and_not_again(capfd: pytest.CaptureFixture[str]) -> None:
    shared = {"now": 10 * HOUR + 20}
    assert runner(Fake(shared), "echo", "first").run() == 0
    shared["now"] += 30  # the other host's timer, delayed by chance
    assert runner(Fake(shared), "echo", "second").run() == 0
    output = capfd.readouterr().out
    assert output.count("first") == 1
    assert "pier-sweep is not due: it ran on " in output
    assert "1970-01-01 10:00:20 UTC and is due again 1970-01-01 11:00:00 UTC" in output
    assert output.endswith("pier-run echo second\n")
    assert output.count("second") == 1
    shared["now"] = 11 * HOUR
    runner(Fake(shared), "echo", "third").run()
    assert "third" in capfd.readouterr().out


def test_a_host_whose_clock_is_a_little_ahead_waits_for_the_elapse(monkeypatch: pytest.MonkeyPatch) -> None:
    shared: dict[str, Any] = {"now": 11 * HOUR - 3, "success": 10 * HOUR + 5}
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        shared["now"] += seconds

    monkeypatch.setattr(once.time, "sleep", sleep)
    assert runner(Fake(shared)).turn() is True
    assert waited == [3]


def test_a_run_that_failed_leaves_the_timer_due_for_the_other_host(capfd: pytest.CaptureFixture[str]) -> None:
    shared = {"now": 10 * HOUR}
    assert runner(Fake(shared), "false").run() == 1
    assert shared["status"] == 1
    assert runner(Fake(shared), "echo", "done").run() == 0
    assert "done" in capfd.readouterr().out
    assert shared["success"] == 10 * HOUR


def test_who_comes_second_waits_and_takes_over_when_the_first_dies(capfd: pytest.CaptureFixture[str]) -> None:
    dead = object()
    shared = {"now": 10 * HOUR, "lock": dead, "host": "web-1", "started": 10 * HOUR, "running": True}
    threading.Timer(0.3, lambda: shared.update(lock=None)).start()
    assert runner(Fake(shared), "echo", "taken over").run() == 0
    output = capfd.readouterr().out
    assert "pier-sweep runs on web-1 since 1970-01-01 10:00:00 UTC; waiting, in case it fails there" in output
    assert "taken over" in output


def test_a_run_whose_lock_is_lost_is_stopped_and_tried_afresh(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shared = {"now": 10 * HOUR}
    log, again = tmp_path / "log", tmp_path / "again"
    command = f"echo began >> {log}; test -e {again} || {{ touch {again}; sleep 60; echo late >> {log}; }}"
    database = Fake(shared, failing=1, once_exists=again)
    assert runner(database, "sh", "-c", command).run() == 0
    assert log.read_text().split() == ["began", "began"]
    assert database.connections == 2
    assert "has lost its connection to the database (server closed the connection unexpectedly)" in capfd.readouterr().out
    with pytest.raises(once.OnceError, match="lost 3 times"):
        runner(Fake({"now": 10 * HOUR}, failing=9), "sleep", "60").run()


def test_a_command_past_its_limit_is_stopped_with_its_children(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shared = {"now": 10 * HOUR}
    assert runner(Fake(shared), "sh", "-c", f"sleep 47 & echo $! > {tmp_path}/pid; wait", limit=0.3).run() == 124
    assert "has not ended within 0.3 s" in capfd.readouterr().out
    assert "success" not in shared
    child = Path("/proc") / (tmp_path / "pid").read_text().strip() / "cmdline"
    deadline = time.monotonic() + 10
    while child.exists() and child.read_bytes():  # a process that nobody has reaped yet has no words any more
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("lines", "moment"),
    [
        (["Normalized form: *-*-* 03:30:00", "    Next elapse: Mon 2026-11-23 03:30:00 UTC", "       From now: 22h left"], 1795404600.0),
        (["    Next elapse: Mon 2026-11-23 06:30:00 MSK", "       (in UTC): Mon 2026-11-23 03:30:00 UTC"], 1795404600.0),
        (["Normalized form: 2020-01-01 00:00:00", "    Next elapse: never"], None),
    ],
)
def test_systemds_words_about_a_calendar_are_understood(lines: list[str], moment: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = load(ROOT / "roles/process/files/once.py", "evk_once_fresh")
    answer = subprocess.CompletedProcess([], 0, "\n".join(lines) + "\n", "")
    monkeypatch.setattr(fresh.subprocess, "run", lambda *_a, **_k: answer)
    assert fresh.next_elapse("daily", 0) == moment


# --- against a real PostgreSQL, where this machine has one (the application's tests install it) -----------------------


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    if not (POSTGRESQL / "initdb").exists():
        pytest.skip("PostgreSQL is not installed here")
    with tempfile.TemporaryDirectory(prefix="evk-once-") as folder:
        become: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(folder, "postgres")
            become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]

        def server(program: str, *words: str) -> None:
            argv = [*become, str(POSTGRESQL / program), "-D", f"{folder}/data", *words]
            done = subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False, cwd=folder)
            assert done.returncode == 0, done.stderr

        server("initdb", "-A", "trust", "-U", "app", "--no-sync")
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        server("pg_ctl", "-w", "-o", options, "-l", f"{folder}/log", "start")
        yield f"postgresql://app@/postgres?host={folder}"
        server("pg_ctl", "-m", "immediate", "stop")


def database(url: str) -> Any:
    return once.Database(psycopg, url, "", "pier-sweep")


def test_the_real_lock_and_table_let_one_of_many_run(url: str, tmp_path: Path) -> None:
    hosts = [runner(database(url), "sh", "-c", f"echo ran >> {tmp_path}/log; sleep 0.2") for _ in range(5)]
    threads = [threading.Thread(target=host.run) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (tmp_path / "log").read_text() == "ran\n"
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT name, exit_status, success_started_at = started_at, finished_at > started_at FROM evenkeel.timer_runs"
        ).fetchone()
    assert row == ("pier-sweep", 0, True, True)


def test_a_real_connection_that_is_killed_stops_the_run_and_frees_the_lock(url: str, tmp_path: Path) -> None:
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("UPDATE evenkeel.timer_runs SET success_started_at = NULL")
        command = f"test -e {tmp_path}/again && exit; touch {tmp_path}/again; sleep 60; touch {tmp_path}/late"
        host = runner(database(url), "sh", "-c", command)
        thread = threading.Thread(target=lambda: setattr(host, "status", host.run()))
        thread.start()
        deadline = time.monotonic() + 30
        while not (tmp_path / "again").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pier-sweep once'")
        thread.join(30)
        assert host.status == 0
        assert admin.execute("SELECT exit_status FROM evenkeel.timer_runs").fetchone() == (0,)
    assert not (tmp_path / "late").exists()


def test_a_database_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "PATIENCE_SECONDS", 0.2)
    with pytest.raises(once.OnceError, match="the database through which the hosts agree cannot be reached"):
        database("postgresql://app@/postgres?host=/nowhere").connect()


def test_a_stop_by_hand_stops_the_command_too(tmp_path: Path) -> None:
    """The whole program, with a driver and a credential laid beside it."""
    (tmp_path / "psycopg2.py").write_text("class Error(Exception): pass\n")
    (tmp_path / once.CREDENTIAL).write_text("secret")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'tests/unit')!r}, {str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "import test_once as t\n"
        "t.once.Database = lambda *_: t.Fake({'now': 36000.0})\n"
        "sys.exit(t.once.main(['--app', 'pier', '--timer', 'sweep', '--calendar', 'hourly', '--database', 'x', '--limit', '60',"
        f" '--', 'sh', '-c', 'touch {tmp_path}/on; exec sleep 60']))\n"
    )
    program = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "CREDENTIALS_DIRECTORY": str(tmp_path)})
    deadline = time.monotonic() + 60
    while not (tmp_path / "on").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    program.terminate()
    assert program.wait(30) == -signal.SIGTERM

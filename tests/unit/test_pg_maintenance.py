"""Maintenance of a cluster: where it acts, what it waits for, whom it never holds up, and what it tells when something cannot be done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from programs import ROOT, load

maintenance = load(ROOT / "roles/pg_maintenance/files/pg_maintenance.py", "evk_pg_maintenance")
filters = load(ROOT / "filter_plugins/postgresql.py", "evk_maintenance_filters")
POSTGRESQL = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture(autouse=True)
def metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(maintenance, "METRICS", tmp_path)
    monkeypatch.setattr(maintenance, "become_postgres", lambda: None)
    return tmp_path / "maintenance-core.prom"


class Driver:
    """A driver whose server answers the question for its role with these, one after another; an exception is raised."""

    class Error(Exception):
        pass

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked = 0

    def connect(self, **_: Any) -> Any:
        self.asked += 1
        self.answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(self.answer, str):
            raise self.Error(self.answer)
        return self

    closed = False
    description = True

    def cursor(self) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def execute(self, _statement: str, _values: object) -> None:
        pass

    def fetchall(self) -> list[Any]:
        return [self.answer]

    def close(self) -> None:
        pass


def run_with(driver: Any, action: str = "vacuum", target: str = "core", **settings: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    known = {"port": 5432, "ready_pause_seconds": 0, "lock_timeout_seconds": 0.1, "lock_tries": 2, **settings}
    return maintenance.Run(driver, action, maintenance.parse_target(target), maintenance.Settings(**known), said.append), said


# --- D4: ready? ---------------------------------------------------------------------------------------------------------


def test_d4_thirty_tries_and_then_one_clear_message(metrics: Path) -> None:
    driver = Driver("connection refused\nmore")
    run, said = run_with(driver)
    with pytest.raises(maintenance.MaintenanceError) as failed:
        run.maintain()
    assert driver.asked == len(said) == 30
    assert said[0] == "try 1 of 30: cluster core is not ready: connection refused"
    text = str(failed.value)
    assert text.startswith("cluster core was not ready within 30 tries, 0 s apart, so nothing was done (connection refused). Next: ")
    assert maintenance.read_metrics(metrics)["relations_failed", "vacuum"] == 1


def test_d4_the_tries_are_five_seconds_apart() -> None:
    assert (maintenance.Settings(5432).ready_tries, maintenance.Settings(5432).ready_pause_seconds) == (30, 5)
    defaults = (ROOT / "roles/pg_maintenance/defaults/main.yml").read_text()
    assert "pg_maintenance_ready_tries: 30\npg_maintenance_ready_pause_seconds: 5\n" in defaults


def test_a_standby_leaves_it_to_the_primary_and_tells_no_stale_figures(metrics: Path) -> None:
    maintenance.write_metrics("core", "vacuum", 1.0, 2.0, maintenance.Tally(done=3))
    run, said = run_with(Driver((True, "pg-core-2")))
    assert run.maintain() == 0
    assert said == ["cluster core: this member is a standby of pg-core-2; its primary does the work, not this one"]
    assert not metrics.exists()


def test_a_standby_that_follows_nobody_may_be_the_primary_in_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = run_with(Driver((True, None), "starting up", (False, None)))
    assert run.wait_until_ready() == ""
    assert [line.split(": ", 2)[2] for line in said] == ["it is a standby that follows no primary", "starting up"]


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_d3_vacuum_full_is_refused_with_the_reason_and_what_to_do_instead(capsys: pytest.CaptureFixture[str]) -> None:
    assert maintenance.main(["vacuum_full", "core"], Driver("never asked")) == 2
    said = capsys.readouterr().err
    assert "VACUUM FULL is refused. It locks every table against reads and writes" in said
    assert "`reindex` rebuilds indexes while they are used" in said
    program = (ROOT / "roles/pg_maintenance/files/pg_maintenance.py").read_text()
    assert "(FULL" not in program, "no statement has it"


def test_a_cluster_of_other_hosts_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(maintenance, "SETTINGS", tmp_path)
    (tmp_path / "pg-maintenance-plugins.json").write_text('{"port": 5433}')
    assert maintenance.main(["vacuum", "core"], Driver("never asked")) == 2
    assert 'this host is no member of a cluster "core"; it is of: plugins' in capsys.readouterr().err


def test_targets_and_the_units_that_carry_them() -> None:
    assert filters.maintenance_target("core") == "core"
    assert filters.maintenance_target("core", "", "public.t") == "core::public.t"
    target = filters.maintenance_target("core", "my-shop", "public.order lines")
    assert maintenance.parse_target(target) == maintenance.Target("core", "my-shop", "public.order lines")
    assert maintenance.parse_target("core").whole and not maintenance.parse_target("core:x").whole
    with pytest.raises(maintenance.UsageError, match="has no schema"):
        maintenance.parse_target("core::orders")


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("core", "core"),
        ("core:my-shop:public.order lines", r"core:my\x2dshop:public.order\x20lines"),
        ('core::publíc."T"/x', r"core::publ\xc3\xadc.\x22T\x22-x"),
        (".x", r"\x2ex"),
    ],
)
def test_units_are_escaped_as_systemd_does(text: str, escaped: str) -> None:
    """What systemd-escape of systemd 252 writes."""
    assert filters.systemd_escape(text) == escaped


# --- metrics ------------------------------------------------------------------------------------------------------------


def test_a_failed_run_leaves_the_time_of_the_last_success_and_the_other_action_alone(metrics: Path) -> None:
    maintenance.write_metrics("core", "vacuum", 90.0, 100.0, maintenance.Tally(done=3))
    maintenance.write_metrics("core", "reindex", 190.0, 200.0, maintenance.Tally(done=5))
    maintenance.write_metrics("core", "vacuum", 290.0, 300.0, maintenance.Tally(1, ["public.t"]))
    text = metrics.read_text()
    assert 'evenkeel_maintenance_last_success_timestamp_seconds{cluster="core",action="vacuum"} 100.000' in text
    assert 'evenkeel_maintenance_last_run_timestamp_seconds{cluster="core",action="vacuum"} 300.000' in text
    assert 'evenkeel_maintenance_last_success_timestamp_seconds{cluster="core",action="reindex"} 200.000' in text
    assert 'evenkeel_maintenance_relations_failed{cluster="core",action="vacuum"} 1.000' in text
    assert [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")] == [
        f"evenkeel_maintenance_{name}" for name in maintenance.HELP
    ]
    assert metrics.stat().st_mode & 0o777 == 0o644


def test_bloat_is_shown_before_and_after() -> None:
    before = [maintenance.Bloat("public.a", "index", 1 << 20, 1 << 19), maintenance.Bloat("public.gone", "table", 1 << 20, None)]
    assert maintenance.bloat_lines(before[:1]) == ["public.a  index     1.0 MB  bloat 512.0 kB (50 %)"]
    (line,) = maintenance.bloat_lines(before, [maintenance.Bloat("public.a", "index", 1 << 19, 0)])
    assert line == "public.a  index     1.0 MB  bloat 512.0 kB (50 %)  ->   512.0 kB  bloat 0 B (0 %)"


# --- against a real PostgreSQL, where this machine has one --------------------------------------------------------------


@pytest.fixture(scope="module")
def folder() -> Iterator[str]:
    if not (POSTGRESQL / "initdb").exists():
        pytest.skip("PostgreSQL is not installed here")
    with tempfile.TemporaryDirectory(prefix="evk-pgm-") as folder:
        become: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(folder, "postgres")
            become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]

        def server(program: str, *words: str) -> None:
            argv = [*become, str(POSTGRESQL / program), "-D", f"{folder}/data", *words]
            done = subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False, cwd=folder)
            assert done.returncode == 0, done.stderr

        server("initdb", "-A", "trust", "-U", "postgres", "--no-sync")
        server(
            "pg_ctl", "-w", "-o", f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off", "-l", f"{folder}/log", "start"
        )
        yield folder
        server("pg_ctl", "-m", "immediate", "stop")


@pytest.fixture
def shop(folder: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[psycopg.Connection[Any]]:
    """A database with a table of two indexes; its connection."""
    monkeypatch.setattr(maintenance, "SOCKETS", folder)
    with psycopg.connect(f"host={folder} user=postgres dbname=postgres", autocommit=True) as admin:
        admin.execute("DROP DATABASE IF EXISTS shop WITH (FORCE)")
        admin.execute("CREATE DATABASE shop")
    with psycopg.connect(f"host={folder} user=postgres dbname=shop", autocommit=True) as connection:
        connection.execute("CREATE TABLE orders (id int PRIMARY KEY, note text)")
        connection.execute("INSERT INTO orders SELECT n, repeat('x', 20) FROM generate_series(1, 20000) AS n")
        connection.execute('CREATE INDEX "Note idx" ON orders (note)')
        yield connection


def indexes(shop: psycopg.Connection[Any]) -> dict[str, bool]:
    """Name of each index of the table -> whether it is valid."""
    rows = shop.execute("SELECT indexrelid::regclass::text, indisvalid FROM pg_index WHERE indrelid = 'orders'::regclass")
    return {name.strip('"'): valid for name, valid in rows.fetchall()}


def interrupt_a_reindex(shop: psycopg.Connection[Any], folder: str) -> None:
    """Leave what a REINDEX CONCURRENTLY leaves that is killed: an open transaction holds it up until it is."""
    with (
        psycopg.connect(f"host={folder} user=postgres dbname=shop") as holder,
        psycopg.connect(f"host={folder} user=postgres dbname=shop", autocommit=True) as killed,
    ):
        holder.execute("LOCK TABLE orders IN ROW EXCLUSIVE MODE")  # as a writer has it

        def fails() -> None:
            with pytest.raises(psycopg.Error):
                killed.execute("REINDEX INDEX CONCURRENTLY orders_pkey")

        thread = threading.Thread(target=fails)
        thread.start()
        deadline = time.monotonic() + 30
        while "orders_pkey_ccnew" not in indexes(shop):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        shop.execute("SELECT pg_terminate_backend(%s)", [killed.info.backend_pid])
        thread.join(30)


def test_d3_all_tables_of_all_databases_are_vacuumed_and_analyzed(shop: psycopg.Connection[Any], metrics: Path) -> None:
    run, said = run_with(psycopg, "vacuum")
    assert run.maintain() == 0, said
    row = shop.execute(
        "SELECT last_vacuum IS NOT NULL, last_analyze IS NOT NULL FROM pg_stat_user_tables WHERE relname = 'orders'"
    ).fetchone()
    deadline = time.monotonic() + 10  # statistics come a moment later
    while row != (True, True) and time.monotonic() < deadline:
        time.sleep(0.1)
        shop.execute("SELECT pg_stat_clear_snapshot()")
        row = shop.execute(
            "SELECT last_vacuum IS NOT NULL, last_analyze IS NOT NULL FROM pg_stat_user_tables WHERE relname = 'orders'"
        ).fetchone()
    assert row == (True, True)
    assert any(line.startswith("postgres: ") for line in said)
    values = maintenance.read_metrics(metrics)
    assert values["relations_done", "vacuum"] > 100, "catalogs, too"
    assert values["last_success_timestamp_seconds", "vacuum"] == values["last_run_timestamp_seconds", "vacuum"]


def test_d4_an_invalid_index_of_an_interrupted_reindex_is_dropped_by_the_next_run(shop: psycopg.Connection[Any], folder: str) -> None:
    for action in ("reindex", "vacuum"):
        interrupt_a_reindex(shop, folder)
        assert indexes(shop)["orders_pkey_ccnew"] is False
        run, said = run_with(psycopg, action)
        assert run.maintain() == 0, said
        assert "shop: dropped public.orders_pkey_ccnew, which an interrupted REINDEX CONCURRENTLY had left behind" in said
        assert indexes(shop) == {"orders_pkey": True, "Note idx": True}


def test_d3_indexes_are_rebuilt_and_what_cannot_be_is_named(shop: psycopg.Connection[Any]) -> None:
    shop.execute("CREATE TABLE slots (during int4range, EXCLUDE USING gist (during WITH &&))")
    shop.execute("INSERT INTO orders VALUES (0, 'x'), (-1, 'x')")
    with pytest.raises(psycopg.Error):
        shop.execute("CREATE UNIQUE INDEX CONCURRENTLY broken ON orders (note)")
    before = dict(shop.execute("SELECT relname, relfilenode FROM pg_class WHERE relkind = 'i' AND oid >= 16384").fetchall())
    run, said = run_with(psycopg, "reindex")
    assert run.maintain() == 0, said
    after = dict(shop.execute("SELECT relname, relfilenode FROM pg_class WHERE relkind = 'i' AND oid >= 16384").fetchall())
    same = {name for name in before if before[name] == after.get(name)}
    assert same == {"broken", "slots_during_excl"}
    assert any("public.broken is invalid and was left alone" in line for line in said)
    assert any("public.slots_during_excl was left out: an exclusion constraint" in line for line in said)
    assert any(name.startswith("pg_toast_") for name in after if name not in same), "those of TOAST tables, too"


def test_a_lock_that_cannot_be_had_is_tried_again_then_named_and_the_rest_is_done(
    shop: psycopg.Connection[Any], folder: str, metrics: Path
) -> None:
    shop.execute("CREATE TABLE other (id int PRIMARY KEY)")
    with psycopg.connect(f"host={folder} user=postgres dbname=shop") as holder:
        holder.execute("LOCK TABLE orders IN SHARE UPDATE EXCLUSIVE MODE")
        run, said = run_with(psycopg, "reindex")
        with pytest.raises(maintenance.MaintenanceError, match=r"could not be done \(named above\). Next, when the cause is gone: "):
            run.maintain()
    assert any("shop: public.orders_pkey" in line and line.endswith("tries again in 0.1 s") for line in said)
    assert any(line.startswith("not done: shop: public.orders_pkey") and "lock timeout, 2 times" in line for line in said)
    values = maintenance.read_metrics(metrics)
    assert (values["relations_failed", "reindex"], ("last_success_timestamp_seconds", "reindex") in values) == (2, False)
    assert values["relations_done", "reindex"] == 2, "those of the other table and of TOAST"
    assert indexes(shop) == {"orders_pkey": True, "Note idx": True}, "and nothing is left behind"


def test_no_lock_is_waited_for_longer_than_the_role_says(shop: psycopg.Connection[Any]) -> None:
    run, _said = run_with(psycopg, lock_timeout_seconds=7)
    with run.connected("shop") as session:
        run.prepare(session)
        assert session.ask("SHOW lock_timeout") == [("7s",)]


def test_one_run_at_a_time_in_a_cluster_and_the_second_says_for_whom_it_waits(shop: psycopg.Connection[Any], folder: str) -> None:
    with psycopg.connect(f"host={folder} user=postgres dbname=postgres application_name=first", autocommit=True) as first:
        first.execute("SELECT pg_advisory_lock(%s, %s)", maintenance.TURN)
        run, said = run_with(psycopg, "reindex")
        thread = threading.Thread(target=run.maintain)
        thread.start()
        deadline = time.monotonic() + 30
        while not said:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert said[0].startswith("waits for first (process ")
        assert thread.is_alive()
    thread.join(60)
    assert said[-1].endswith("nothing left undone")
    run, said = run_with(psycopg, "reindex", limit_seconds=0.1)
    with psycopg.connect(f"host={folder} user=postgres dbname=postgres", autocommit=True) as first:
        first.execute("SELECT pg_advisory_lock(%s, %s)", maintenance.TURN)
        with pytest.raises(maintenance.MaintenanceError, match="its turn did not come within"):
            run.maintain()


def held_up(shop: psycopg.Connection[Any], folder: str, meanwhile: Any) -> tuple[Any, list[str], list[BaseException]]:
    """A reindex that an open transaction holds up, and what becomes of it when something happens meanwhile."""
    run, said = run_with(psycopg, "reindex", "core:shop", lock_timeout_seconds=60)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            run.maintain()
        except maintenance.MaintenanceError as error:
            failed.append(error)

    with psycopg.connect(f"host={folder} user=postgres dbname=shop") as holder:
        holder.execute("LOCK TABLE orders IN ROW EXCLUSIVE MODE")  # as a writer has it
        thread = threading.Thread(target=work)
        thread.start()
        deadline = time.monotonic() + 30
        while not any(name.endswith("_ccnew") for name in indexes(shop)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        meanwhile(run)
        thread.join(2)
    thread.join(60)
    return run, said, failed


def test_told_to_stop_it_cancels_its_statement_and_leaves_nothing_behind(shop: psycopg.Connection[Any], folder: str) -> None:
    at_work = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'REINDEX%' AND state = 'active'"

    def stop(run: Any) -> None:
        assert shop.execute(at_work).fetchone() == (1,)
        run.stop(15, None)
        deadline = time.monotonic() + 20
        while shop.execute(at_work).fetchone() != (0,):  # although nothing else has ended it
            assert time.monotonic() < deadline
            time.sleep(0.05)

    _run, _said, (error,) = held_up(shop, folder, stop)
    assert "it was stopped at shop: " in str(error)
    assert "Next, when it suits: playbooks/maintenance.yml" in str(error)
    assert set(indexes(shop)) == {"orders_pkey", "Note idx"}


def test_a_primary_that_is_lost_midway_ends_the_run_with_a_clear_message(shop: psycopg.Connection[Any], folder: str) -> None:
    kill = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pg_maintenance reindex core' AND datname = 'shop'"
    )
    _run, _said, (error,) = held_up(shop, folder, lambda _run: shop.execute(kill))
    assert "cluster core has lost its primary on this host, or the connection to it, in the middle of the run" in str(error)
    assert "Next: patronictl list core" in str(error)


def test_progress_names_the_phase_and_who_holds_it_up(shop: psycopg.Connection[Any], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "PROGRESS_SECONDS", 0.1)
    _run, said, failed = held_up(shop, folder, lambda _run: time.sleep(1))
    assert failed == []
    assert any(": waiting for writers before build, waits for process " in line for line in said), said


def test_what_would_be_done_is_told_and_nothing_is_done(
    shop: psycopg.Connection[Any], folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_a_reindex(shop, folder)
    (tmp_path / "settings.json").write_text(json.dumps({"port": 5432}))
    words = ["--settings", str(tmp_path / "settings.json")]
    assert maintenance.main(["reindex", "core", "--dry-run", *words], psycopg) == 0
    said = capsys.readouterr().out
    assert "shop: would drop public.orders_pkey_ccnew" in said
    assert "shop: 3 indexes would be rebuilt" in said
    assert "orders_pkey_ccnew" in indexes(shop)
    assert maintenance.main(["reindex", "core::public.orders", "--dry-run", *words], psycopg) == 0
    assert "shop: 3 indexes would be rebuilt" in capsys.readouterr().out, "that of its TOAST table, too"
    assert maintenance.main(["bloat", "core:shop", *words], psycopg) == 0
    assert "public.orders " in capsys.readouterr().out
    for target, sentence in (
        ("core:nope", 'cluster core has no database "nope"'),
        ("core::public.nope", "cluster core has no table public.nope"),
    ):
        assert maintenance.main(["vacuum", target, "--dry-run", *words], psycopg) == 2
        assert sentence in capsys.readouterr().err

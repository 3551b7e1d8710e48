"""H1-H3 on the host: every check can fail, starts wait for the healthy, the unhealthy are restarted within limits; and all is put back."""

from __future__ import annotations

import base64
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import testinfra
from conftest import playbook

Host = testinfra.host.Host
Table = Callable[..., None]

TABLE = "/etc/evenkeel/health.json"
QUICK = {"interval_seconds": 1, "timeout_seconds": 2, "retries": 3}
DAEMONS = "'evenkeel-health*.service'"
RESTARTS = "/var/lib/evenkeel/health/restarts.json"


@pytest.fixture(autouse=True)
def _once(host: Host) -> None:
    if not host.file("/run/converged").exists:
        pytest.skip("tested before the reboot")


def rows(host: Host) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(host.run("evenkeel-health status --json").stdout)}


def until(what: str, true: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.5)


def show(host: Host, unit: str, name: str) -> str:
    return str(host.check_output(f"systemctl show --value -p {name} {unit}"))


@contextmanager
def frozen(host: Host, unit: str, whom: str = "all") -> Iterator[None]:
    """Processes that are there and do nothing: what no supervisor notices."""
    host.check_output(f"systemctl kill --kill-whom={whom} --signal=SIGSTOP {unit}")
    try:
        yield
    finally:
        host.run(f"systemctl kill --kill-whom={whom} --signal=SIGCONT {unit}")


@pytest.fixture
def table(host: Host) -> Iterator[Table]:
    """Change rows of the table that the daemons read, and what they remember of restarts; both are put back."""
    kept = str(host.check_output(f"cat {TABLE}"))
    host.check_output(f"cp -a {TABLE} {TABLE}.kept; mv {RESTARTS} {RESTARTS}.kept || true")

    def change(changes: dict[str, dict[str, Any]], *more: dict[str, Any], **limits: int) -> None:
        content = json.loads(kept)
        for row in content["services"]:
            row |= changes.get(row["name"], {})
        content["services"] += more
        content["restarts"] |= limits
        data = base64.b64encode(json.dumps(content).encode()).decode()
        host.check_output(f"echo {data} | base64 -d > {TABLE} && systemctl restart {DAEMONS}")

    yield change
    # site.yml would restart a daemon that is hardly older than its table: it cannot know which one the daemon has read
    put_back = f"mv {TABLE}.kept {TABLE}; rm -f {RESTARTS}; mv {RESTARTS}.kept {RESTARTS} || true"
    host.check_output(f"{put_back}; sleep 1; systemctl restart {DAEMONS}")
    until("everything is healthy again", lambda: all(row["status"] == "healthy" for row in rows(host).values()))


# --- the checks -------------------------------------------------------------------------------------------------------


def test_h1_each_parameter_is_obeyed(host: Host, table: Table) -> None:
    base = {"kind": "command", "interval_seconds": 1, "timeout_seconds": 10, "retries": 3, "start_period_seconds": 0}
    table(
        {},
        {**base, "name": "test-retries", "command": ["false"]},
        {**base, "name": "test-timeout", "command": ["sleep", "60"], "timeout_seconds": 1, "retries": 1},
        {**base, "name": "test-interval", "command": ["true"], "interval_seconds": 3},
        {**base, "name": "test-start", "command": ["false"], "start_period_seconds": 3600, "retries": 1},
    )
    seen: list[dict[str, dict[str, Any]]] = []

    def over() -> bool:
        seen.append(rows(host))
        statuses = {name: row["status"] for name, row in seen[-1].items()}
        passed = seen[-1]["test-interval"]["streak"]
        return statuses["test-retries"] == statuses["test-timeout"] == "unhealthy" and passed >= 3

    until("all four show what they obey", over)
    for row in (now["test-retries"] for now in seen):
        assert (row["status"] == "unhealthy") == (row["streak"] <= -3), row
    assert seen[-1]["test-timeout"]["message"] == "sleep did not end within 1 s"
    moments = sorted({now["test-interval"]["checked"] for now in seen if now["test-interval"]["streak"]})
    assert all(later - sooner >= 2.9 for sooner, later in itertools.pairwise(moments)), moments
    start = seen[-1]["test-start"]
    assert (start["status"], start["streak"], "false ended with exit code 1" in start["message"]) == ("starting", 0, True)


UNITS = {
    "drydock-relay": "drydock-relay", "drydock-script-processor": "drydock-script-processor", "drydock-web": "drydock-web",
    "drydock-worker-export": "drydock-worker-export", "drydock-worker-latex": "drydock-worker-latex", "etcd": "etcd",
    "object-storage": "object-storage", "postgresql-core": "patroni@core", "postgresql-plugins": "patroni@plugins", "proxy": "nginx",
    "redis": "redis-server",
}  # fmt: skip


def test_h3_every_check_sees_a_service_that_has_stopped_answering(host: Host, table: Table) -> None:
    table({name: {"timeout_seconds": 2} for name in UNITS})
    services = {name for name, row in rows(host).items() if row["kind"] != "timer" and row["owner"] in ("drydock", "platform")}
    assert set(UNITS) <= services
    for name, unit in UNITS.items():
        before = show(host, f"{unit}.service", "ActiveState")
        with frozen(host, f"{unit}.service"):
            asked = host.run(f"evenkeel-health check {name}")
        assert before == "active"
        assert (asked.rc, "FAILED" in asked.stdout) == (1, True), f"{name} is frozen, and its check says {asked.stdout}"
    until("all answer again", lambda: host.run("evenkeel-health check").rc == 0)


def test_h3_a_timer_is_healthy_while_it_is_active_and_its_last_run_succeeded(host: Host, table: Table) -> None:
    timer, service = "drydock-prune-uploads.timer", "drydock-prune-uploads.service"
    table({"drydock-prune-uploads": {"interval_seconds": 1}})

    def status(wanted: str) -> Callable[[], bool]:
        return lambda: bool(rows(host)["drydock-prune-uploads"]["status"] == wanted)

    until("the timer is healthy", status("healthy"))
    host.check_output(f"systemctl stop {timer}")
    try:
        until("a timer that does not run is unhealthy", status("unhealthy"))
        assert f"{timer} is inactive" in rows(host)["drydock-prune-uploads"]["message"]
    finally:
        host.check_output(f"systemctl start {timer}")
    until("the timer is healthy again", status("healthy"))

    drop_in = f"/run/systemd/system/{service}.d"
    host.check_output(f"mkdir -p {drop_in} && printf '[Service]\\nExecStart=\\nExecStart=/bin/false\\n' > {drop_in}/test.conf")
    try:
        host.check_output("systemctl daemon-reload")
        assert host.run(f"systemctl start {service}").rc != 0
        until("a run that failed makes it unhealthy", status("unhealthy"))
        until("the operator has a note", lambda: host.file(f"/var/lib/evenkeel/failures/{service}").exists)
        screen = playbook("status")
        text = " ".join(screen.output.split())
        assert screen.code != 0
        assert f"{service} on single has failed" in text
        assert f"next: on single: journalctl -u {service} -n 50" in text
    finally:
        host.check_output(f"rm -rf {drop_in}; systemctl daemon-reload; systemctl start {service}")
    until("a run that succeeds makes it healthy", status("healthy"))


def test_health_is_there_as_metrics(host: Host) -> None:
    """In the words of Prometheus' text format, complete, and as fresh as the checks."""
    text = str(host.check_output("cat /var/lib/evenkeel/metrics/health*.prom"))
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) .+|[a-z_]+\{[a-z]+="[^"]+"(,[a-z]+="[^"]+")*\} -?[0-9.e+]+', line), line
    for name, row in rows(host).items():
        assert f'evenkeel_health_state{{service="{name}",state="{row["status"]}"}} 1' in text
        stamp = re.search(rf'^evenkeel_health_last_check_timestamp_seconds{{service="{name}"}} ([0-9.e+]+)$', text, re.MULTILINE)
        assert stamp and float(stamp.group(1)) > row["checked"] - 60, name


# --- starts that wait --------------------------------------------------------------------------------------------------


def test_h2_a_start_waits_for_the_healthy_and_names_whom_it_waits_for(host: Host) -> None:
    since = str(host.check_output("date '+%F %T'")).strip()

    def said(words: str) -> bool:
        return words in str(host.check_output(f"journalctl -u drydock-worker-export --since '{since}' -o cat --no-pager"))

    host.check_output("systemctl stop drydock-worker-export redis-server")
    try:
        host.check_output("systemctl start --no-block drydock-worker-export")
        until("it says whom it waits for", lambda: said("drydock-worker-export waits for redis ("))
        assert show(host, "drydock-worker-export", "ActiveState") == "activating", "it has not been started without Redis"
        # PONG is not enough to be started by: a check must have seen it
        host.check_output("systemctl start redis-server")
        until("it starts once Redis is healthy", lambda: show(host, "drydock-worker-export", "ActiveState") == "active")
        assert said("redis is healthy after")
    finally:
        host.check_output("systemctl start redis-server && systemctl start drydock-worker-export")
    host.check_output("evenkeel-health wait --timeout 120 redis drydock-worker-export")


def test_h2_a_wait_that_is_too_long_fails_the_start_with_one_line(host: Host) -> None:
    since = str(host.check_output("date '+%F %T'")).strip()
    drop_in = "/run/systemd/system/drydock-worker-export.service.d"
    wait = "ExecStartPre=\\nExecStartPre=+/usr/local/bin/evenkeel-health wait --timeout 2 --for %%N redis\\n"
    host.check_output("systemctl stop drydock-worker-export redis-server")
    host.check_output(f"mkdir -p {drop_in} && printf '[Service]\\n{wait}Restart=no\\n' > {drop_in}/test.conf && systemctl daemon-reload")
    try:
        assert host.run("systemctl start drydock-worker-export").rc != 0
        lines = str(host.check_output(f"journalctl -u drydock-worker-export --since '{since}' -o cat --no-pager")).splitlines()
        given_up = [line for line in lines if "gave up" in line]
        assert len(given_up) == 1, lines
        assert re.match(
            r"drydock-worker-export gave up: after 2 s not healthy: redis \(.+\)\. Next: journalctl -u redis-server", given_up[0]
        )
    finally:
        host.check_output(f"rm -rf {drop_in}; systemctl daemon-reload; systemctl reset-failed drydock-worker-export")
        host.check_output("systemctl start redis-server && systemctl start drydock-worker-export")
    host.check_output("evenkeel-health wait --timeout 120 redis drydock-worker-export")


# --- restarts of the unhealthy -----------------------------------------------------------------------------------------


def judged(host: Host, since: str) -> str:
    units = "-u evenkeel-health -u evenkeel-health-restart"
    return str(host.check_output(f"journalctl {units} --since '{since}' -o cat --no-pager"))


def test_a_web_and_a_worker_that_hang_are_restarted_up_to_the_limit(host: Host, table: Table) -> None:
    since = str(host.check_output("date '+%F %T'")).strip()
    units = {"drydock-web": "all", "drydock-worker-export": "main"}
    table(dict.fromkeys(units, QUICK), limit=1)

    def healthy() -> bool:
        found = rows(host)
        return all(found[unit]["status"] == "healthy" and found[unit]["streak"] > 0 for unit in units)

    until("both are healthy", healthy)
    before = {unit: show(host, unit, "MainPID") for unit in units}
    for unit, whom in units.items():
        host.check_output(f"systemctl kill --kill-whom={whom} --signal=SIGSTOP {unit}")
    until("both run anew", lambda: all(show(host, unit, "MainPID") not in (pid, "0") for unit, pid in before.items()))
    until("both are healthy", healthy)
    for unit in units:
        assert f"{unit} is unhealthy and restarted (1 of 1 within 1 h): " in judged(host, since)

    # The limit: the next time it is left alone, and the operator told.
    pid, note = show(host, "drydock-worker-export", "MainPID"), "/var/lib/evenkeel/failures/drydock-worker-export.service"
    with frozen(host, "drydock-worker-export", "main"):
        until("the operator is told", lambda: host.file(note).exists)
        assert "is unhealthy and left alone after 1 restart within 1 h" in str(host.check_output(f"cat {note}"))
        assert show(host, "drydock-worker-export", "MainPID") == pid
    until("the note is gone when it is well", lambda: not host.file(note).exists)
    metrics = str(host.check_output("cat /var/lib/evenkeel/metrics/health-restarts.prom"))
    assert 'evenkeel_health_restarts_total{service="drydock-worker-export"} 1' in metrics


def test_what_others_cause_is_not_restarted_and_a_database_never_is(host: Host, table: Table) -> None:
    since = str(host.check_output("date '+%F %T'")).strip()
    names = ("drydock-worker-export", "postgresql-plugins", "redis")
    table(dict.fromkeys(names, QUICK))
    before = {unit: show(host, unit, "MainPID") for unit in ("drydock-worker-export", "patroni@plugins", "redis-server")}
    with frozen(host, "redis-server"):
        until("it says why not", lambda: "drydock-worker-export is unhealthy, but not restarted: it needs redis" in judged(host, since))
        assert rows(host)["redis"]["status"] == "unhealthy" or rows(host)["redis"]["streak"] < 0
    until("Redis is healthy", lambda: rows(host)["redis"]["status"] == "healthy")

    postmaster = str(host.check_output("head -1 /var/lib/postgresql/15/plugins/pgdata/postmaster.pid")).strip()
    host.check_output(f"kill -STOP {postmaster}")
    try:
        until("the database is unhealthy", lambda: rows(host)["postgresql-plugins"]["status"] == "unhealthy")
        # Even a daemon that has gone astray cannot have it restarted: root reads its own table.
        host.check_output("touch /run/evenkeel/health-restart/postgresql-plugins")
        refused = "a restart of 'postgresql-plugins' was asked for, which /etc/evenkeel/health.json does not allow"
        until("root refuses", lambda: refused in judged(host, since))
    finally:
        host.check_output(f"kill -CONT {postmaster}")
    until("the database is healthy", lambda: rows(host)["postgresql-plugins"]["status"] == "healthy")
    assert str(host.check_output("head -1 /var/lib/postgresql/15/plugins/pgdata/postmaster.pid")).strip() == postmaster
    assert {unit: show(host, unit, "MainPID") for unit in before} == before

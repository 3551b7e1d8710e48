"""The health daemon: its state machine, its checks and its command line."""

from __future__ import annotations

import http.server
import json
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, load

health = load(ROOT / "roles/healthcheck/files/health.py", "evk_health")
tables = load(ROOT / "filter_plugins/health.py", "evk_health_filter")

GOOD, BAD = health.Outcome(True, "fine"), health.Outcome(False, "broken")
SERVICE = health.Service("redis", "http", unit="redis.service", retries=3, start_period_seconds=10)


def play(outcomes: list[tuple[float, Any]], service: Any = SERVICE) -> Any:
    """The state after outcomes at these times; the service was started at 0."""
    state = health.begin("redis", "abc", 0.0)
    for moment, outcome in outcomes:
        state = health.advance(state, outcome, service, moment, 0.01)
    return state


def test_failures_within_the_start_period_do_not_count() -> None:
    state = play([(moment, BAD) for moment in range(10)])
    assert (state.status, state.streak, state.message) == ("starting", 0, "broken")


def test_the_first_success_makes_it_healthy() -> None:
    state = play([(1, BAD), (2, GOOD)])
    assert (state.status, state.streak, state.since) == ("healthy", 1, 2)


def test_failures_after_a_success_count_within_the_start_period_too() -> None:
    state = play([(1, GOOD), (2, BAD), (3, BAD)])
    assert (state.status, state.streak) == ("healthy", -2)
    assert health.advance(state, BAD, SERVICE, 4, 0.0).status == "unhealthy"


def test_only_failures_in_a_row_make_it_unhealthy() -> None:
    state = play([(11, BAD), (12, BAD), (13, GOOD), (14, BAD), (15, BAD)])
    assert (state.status, state.streak) == ("healthy", -2)
    state = play([(11, BAD), (12, BAD), (13, BAD), (14, BAD)])
    assert (state.status, state.streak, state.since) == ("unhealthy", -4, 13)


def test_one_success_makes_it_healthy_again() -> None:
    state = play([(11, BAD), (12, BAD), (13, BAD), (20, GOOD), (30, GOOD)])
    assert (state.status, state.streak, state.since) == ("healthy", 2, 20)


def test_a_unit_that_does_not_run_has_no_start_period() -> None:
    state = health.begin("redis", "", 0.0)
    for moment in range(3):
        state = health.advance(state, BAD, SERVICE, moment, 0.0)
    assert state.status == "unhealthy"


def test_a_starting_service_is_asked_more_often_but_only_while_failures_do_not_count() -> None:
    state = health.begin("redis", "abc", 0.0)
    assert health.pause_until_next(state, SERVICE, 5) == 1
    assert health.pause_until_next(state, SERVICE, 11) == 10
    assert health.pause_until_next(health.begin("redis", "", 0.0), SERVICE, 5) == 10


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/slow":
            for _ in range(20):  # a byte at a time: only a deadline over the whole ends this
                self.wfile.write(b"H")
                time.sleep(0.1)
            return
        if self.path == "/chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"3\r\npar\r\n3\r\nted\r\n0\r\n\r\n")
            return
        if self.path == "/page":
            self.send_error(404)
            return
        body = f"{self.headers['Authorization']} {self.headers['Host']} {self.headers['X-Extra']}".encode()
        self.send_response(503 if self.path == "/down" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def ask(url: str, **fields: Any) -> Any:
    service = health.Service("x", "http", url=url, timeout_seconds=1, **fields)
    return health.check(service, {"token": "s3cret"}, "-")


def test_http(url: str) -> None:
    assert ask(url).passed
    assert ask(f"{url}/down").message.startswith(f"{url}/down answered 503, expected 200: None 127.0.0.1"), "with what it says of it"
    assert ask(f"{url}/page").message == f"{url}/page answered 404, expected 200"
    assert ask(f"{url}/down", status=503).passed
    assert ask(url, bearer="token", contains="Bearer s3cret").passed
    assert ask(url, headers={"Host": "pier.example", "X-Extra": "1"}, contains="pier.example 1").passed
    assert ask(f"{url}/chunked", contains="parted").passed
    assert "without" in ask(url, contains="nowhere").message
    assert "credential none is missing" in ask(url, bearer="none").message


def test_http_that_never_ends_is_cut_at_the_deadline(url: str) -> None:
    start = time.monotonic()
    outcome = ask(f"{url}/slow")
    assert not outcome.passed
    assert "within 1 s" in outcome.message
    assert time.monotonic() - start < 1.8


def test_http_to_nobody() -> None:
    assert "refused" in ask("http://127.0.0.1:1/").message.lower()


def certificate(directory: Path, name: str) -> Path:
    """A self-signed certificate for `name`, with its key in the same file."""
    path = directory / f"{name.replace(':', '-')}.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    made = ["-subj", "/CN=test", "-addext", f"subjectAltName={name}", "-keyout", f"{path}.key", "-out", str(path)]
    subprocess.run(["openssl", "req", "-x509", *curve, *made], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.key").read_text())
    return path


@pytest.mark.parametrize(
    ("served", "trusted", "said"),
    [
        ("IP:127.0.0.1", "IP:127.0.0.1", ""),
        ("IP:127.0.0.1", "", "self-signed"),
        ("IP:127.0.0.1", "IP:127.0.0.2", "self-signed"),
        ("IP:127.0.0.2", "IP:127.0.0.2", "certificate is not valid for '127.0.0.1'"),
    ],
)
def test_http_over_tls_believes_only_a_certificate_of_its_ca_for_this_address(tmp_path: Path, served: str, trusted: str, said: str) -> None:
    pem = certificate(tmp_path, served)
    ca = str(pem if trusted == served else certificate(tmp_path, trusted)) if trusted else ""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        outcome = ask(f"https://127.0.0.1:{server.server_address[1]}/", ca=ca, contains="None")
    finally:
        server.shutdown()
    assert outcome.passed is (said == "")
    assert said in outcome.message


def run_command(*argv: str, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Any:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    service = health.Service("x", "command", command=list(argv), **{"timeout_seconds": 1, **fields})
    return health.check(service, {"redis": "s3cret"}, "-")


def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def sh(script: str, **fields: Any) -> Any:
        return run_command("/bin/sh", "-c", script, monkeypatch=monkeypatch, **fields)

    assert sh("echo PONG", expected="PONG").passed
    assert sh("echo NO", expected="PONG").message == 'sh answered without "PONG": NO'
    assert sh("echo why; exit 2").message == "sh ended with exit code 2: why"
    assert sh("echo $REDISCLI_AUTH", credentials={"REDISCLI_AUTH": "redis"}).message == "***"
    assert "could not be run" in run_command("/none", monkeypatch=monkeypatch).message
    monkeypatch.setenv("LEAK", "yes")
    assert sh('echo "<$LEAK>"').message == "<>"
    assert sh('echo "<$LEAK>"', user="pier").message == "<yes>"


def test_a_command_that_hangs_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = f"(sleep 3; touch {tmp_path}/late) & sleep 30"
    start = time.monotonic()
    outcome = run_command("/bin/sh", "-c", script, monkeypatch=monkeypatch, timeout_seconds=0.3)
    assert outcome.message == "sh did not end within 0.3 s"
    assert time.monotonic() - start < 2
    time.sleep(3)
    assert not (tmp_path / "late").exists()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with a table of one local and one remote service."""
    rows = [
        {"name": "redis", "kind": "http", "url": "http://127.0.0.1:1/", "unit": "redis.service"},
        {"name": "far", "kind": "http", "url": "http://127.0.0.1:1/", "remote": True, "unit": "far.service"},
    ]
    (tmp_path / "health.json").write_text(json.dumps({"services": rows}))
    (tmp_path / "units").mkdir()
    (tmp_path / "units/invocation:redis.service").symlink_to("abc")
    for name, path in (("TABLE", "health.json"), ("CREDENTIALS", "none"), ("STATES", "."), ("INVOCATIONS", "units")):
        monkeypatch.setattr(health, name, tmp_path / path)
    return tmp_path


def put(host: Path, **fields: Any) -> None:
    now = time.time()
    state = health.State("redis", "healthy", 4, now, now, now, 0.01, "fine", "abc")
    health.write_state(host, replace(state, **fields))


def test_status(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(host)
    assert health.main(["status"]) == 0
    assert "redis  healthy" in capsys.readouterr().out
    put(host, status="unhealthy", streak=-30)
    assert health.main(["status", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["status"], row["streak"]) == ("redis", "unhealthy", -30)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"streak": -1, "message": "no PONG"}, "redis (failing: no PONG)"),
        ({"status": "starting", "message": "no PONG"}, "redis (starting: no PONG)"),
        ({"invocation": "older"}, "redis (starting: redis.service was just started)"),
        ({"checked": 1.0}, "is evenkeel-health.service running?"),
    ],
)
def test_wait_names_whom_it_waits_for(host: Path, fields: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(host, **fields)
    assert health.main(["wait", "redis", "--timeout", "0.2", "--for", "pier-web"]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("pier-web waits for redis (")
    assert reason in shown.out
    assert shown.err.startswith("pier-web gave up: after 0 s not healthy: redis (")
    assert "journalctl -u redis.service" in shown.err


def test_wait_returns_when_it_becomes_healthy(host: Path) -> None:
    put(host, status="starting")
    threading.Timer(0.5, put, [host]).start()
    assert health.main(["wait", "redis", "--timeout", "10"]) == 0


def test_wait_asks_a_remote_service_itself(host: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main(["wait", "far", "--timeout", "0.2"]) == 1
    assert "on its own host" in capsys.readouterr().err
    table = json.loads((host / "health.json").read_text())
    table["services"][1]["url"] = url
    (host / "health.json").write_text(json.dumps(table))
    assert health.main(["wait", "far", "--timeout", "5"]) == 0


def test_a_service_with_alternatives_is_healthy_when_one_of_them_is(url: str) -> None:
    asked: list[str] = []

    def once(service: Any, _credentials: Any) -> Any:
        asked.append(service.url)
        return health.Outcome("good" in service.url, f"{service.url} was asked for {service.timeout_seconds:g} s")

    pair = health.Service("pair", "http", url="bad-1", remote=True, timeout_seconds=9, alternatives=[{"url": "bad-2"}, {"url": "good-3"}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(health, "check_once", once)
        assert health.check(pair, {}, "").message == "good-3 was asked for 3 s", "the time-out is shared"
        assert asked == ["bad-1", "bad-2", "good-3"]
        asked.clear()
        assert health.check(pair, {}, "").passed
        assert asked == ["good-3"], "who answered last is asked first"
        lost = replace(pair, alternatives=[{"url": "bad-2"}, {"url": "bad-3"}])
        outcome = health.check(lost, {}, "")
        assert (outcome.passed, outcome.message.count("was asked")) == (False, 3)
        assert outcome.message.startswith("bad-1"), "named in the order of the table"
    real = health.Service("real", "http", url="http://127.0.0.1:1/", remote=True, alternatives=[{"url": f"{url}/down"}, {"url": url}])
    assert health.check(real, {}, "").passed


def test_wait_for_a_name_that_nobody_knows(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main(["wait", "rediss"]) == 2
    assert 'no service "rediss"' in capsys.readouterr().err


def test_the_table_gets_the_defaults_and_refuses_nonsense() -> None:
    defaults = {"interval_seconds": 10, "retries": 30}
    (row,) = tables.health_table([{"name": "a", "kind": "unit", "unit": "a.service", "retries": 2}], defaults)
    assert (row["interval_seconds"], row["retries"]) == (10, 2)
    health.Service(**row)
    for rows, sentence in (
        ([{"name": "a", "kind": "http"}], "healthcheck_services.a.url: is missing"),
        ([{"name": "a b", "kind": "unit", "unit": "x"}], 'the name "a b" is not possible'),
        ([{"name": "a", "kind": "unit", "unit": "x"}] * 2, "two services have this name"),
        ([{"name": "a", "kind": "unit", "unit": "x", "remote": True}], "cannot be seen from here"),
        ([{"name": "a", "kind": "http", "url": "x", "user": "pier"}], "only a command runs as a user"),
        ([{"name": "a", "kind": "http", "url": "x", "alternatives": [{"command": ["x"]}]}], "each has url and nothing else"),
        ([{"name": "a", "kind": "command", "command": ["x"], "alternatives": [{"command": ["y"], "user": "z"}]}], "each has command and"),
    ):
        with pytest.raises(tables.HealthTableError, match=sentence):
            tables.health_table(rows, defaults)


def test_the_result_of_a_timers_last_run_is_believed_at_once() -> None:
    (row,) = tables.health_table([{"name": "a", "kind": "timer", "timers": ["a.timer"]}], {"retries": 30, "interval_seconds": 10})
    assert (row["retries"], row["interval_seconds"]) == (1, 10)
    health.Service(**row)


def test_only_a_unit_of_this_host_can_be_restarted() -> None:
    good = {"name": "a", "kind": "unit", "unit": "a.service", "restart": True, "after": ["b"]}
    other = {"name": "b", "kind": "http", "url": "x", "remote": True}
    (row, _) = tables.health_table([good, other], {})
    assert health.Service(**row).restart
    for wrong in (
        {"name": "b", "kind": "http", "url": "x", "restart": True},
        {**other, "unit": "b.service", "restart": True},
        {"name": "b", "kind": "timer", "timers": ["b.timer"], "unit": "b.service", "restart": True},
    ):
        with pytest.raises(tables.HealthTableError, match="only a service of this host that has a unit can be restarted"):
            tables.health_table([wrong], {})
    with pytest.raises(tables.HealthTableError, match='no row is called "b"'):
        tables.health_table([good], {})


def test_packages_are_for_the_role_not_for_the_program() -> None:
    (row,) = tables.health_table([{"name": "a", "kind": "command", "command": ["x"], "packages": ["x-tools"]}], {})
    health.Service(**row)


def test_one_daemon_for_each_user() -> None:
    rows = [
        {"name": "a"},
        {"name": "b", "user": "pier", "environment_files": ["/e", "/s"]},
        {"name": "c", "user": "pier", "environment_files": ["/e"]},
        {"name": "d", "user": "other", "remote": True},
    ]
    first, second = tables.health_watchers(rows)
    assert (first["unit"], first["environment_files"]) == ("evenkeel-health.service", [])
    assert (second["unit"], second["environment_files"]) == ("evenkeel-health-pier.service", ["/e", "/s"])


# --- timers -------------------------------------------------------------------------------------------------------------


def said(timer: str = "active", service: str = "inactive", result: str = "success", ran: str = "5") -> dict[str, dict[str, str]]:
    run = {"ActiveState": service, "Result": result, "ExecMainStatus": "1", "ExecMainExitTimestampMonotonic": ran}
    return {"x.timer": {"LoadState": "loaded", "ActiveState": timer}, "x.service": run}


@pytest.mark.parametrize(
    ("given", "noted", "passed", "words"),
    [
        (said(), False, True, "active; the last run succeeded"),
        (said(ran="0"), False, True, "no run since the boot"),
        (said(timer="inactive"), False, False, "x.timer is inactive: nothing starts x.service. Next: systemctl start x.timer"),
        ({}, False, False, "x.timer is unknown to systemd"),
        ({"x.timer": {"LoadState": "not-found", "ActiveState": "inactive"}}, False, False, "x.timer is not installed"),
        (said(service="failed", result="exit-code"), False, False, "failed (exit-code, exit status 1). Next: journalctl -u x.service"),
        (said(service="inactive", result="timeout"), False, False, "the last run of x.service failed (timeout"),
        (said(service="activating"), False, None, "x.service is running"),
        (said(timer="failed", service="activating"), False, False, "x.timer is failed"),
        (said(ran="0"), True, False, "the last run of x.service failed. Next:"),
        (said(service="activating"), True, None, "x.service is running"),
    ],
)
def test_h3_a_timer_is_healthy_when_it_is_active_and_its_last_run_did_not_fail(
    given: dict[str, dict[str, str]], noted: bool, passed: bool | None, words: str
) -> None:
    outcome = health.judge_timer("x.timer", given, noted)
    assert outcome.passed is passed
    assert words in outcome.message


def test_one_timer_of_several_is_enough_to_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(health, "FAILURES", tmp_path)
    service = health.Service("x", "timer", timers=["x.timer", "y.timer"])
    units = said() | {name.replace("x", "y"): value for name, value in said().items()}
    asked: list[list[str]] = []
    monkeypatch.setattr(health, "show_units", lambda names, _timeout: (asked.append(list(names)), units)[1])
    monkeypatch.setattr(health, "_SYSTEMD", health.Systemd())
    assert health.check(service, {}, "-").message == "active; the last run succeeded"
    assert health.check(service, {}, "-").passed is True
    assert len(asked) == 1, "systemd is asked once for rows that come one after another"
    (tmp_path / "y.service").touch()
    assert health.check(service, {}, "-").message.startswith("the last run of y.service failed")


def test_while_a_timers_service_runs_its_last_result_stands() -> None:
    service = health.Service("x", "timer", timers=["x.timer"], retries=1)
    running, failed = health.Outcome(None, "x.service is running"), health.Outcome(False, "it failed")
    state = health.advance(health.begin("x", "-", 0.0), running, service, 20.0, 0.0)
    assert state.status == "healthy"
    state = health.advance(state, failed, service, 30.0, 0.0)
    assert (state.status, state.streak) == ("unhealthy", -1), "at once, not after thirty times"
    state = health.advance(state, running, service, 40.0, 0.0)
    assert (state.status, state.streak, state.checked) == ("unhealthy", -1, 40.0)
    assert health.advance(state, GOOD, service, 50.0, 0.0).status == "healthy"


# --- metrics ------------------------------------------------------------------------------------------------------------


def test_metrics_are_what_prometheus_reads() -> None:
    states = [play([(1, GOOD), (2, GOOD)]), replace(play([(11, BAD), (12, BAD), (13, BAD)]), name="web"), health.begin("new", "", 0.0)]
    text = health.health_metrics(states)
    lines = text.splitlines()
    for line in (
        'evenkeel_health_state{service="redis",state="healthy"} 1',
        'evenkeel_health_state{service="redis",state="unhealthy"} 0',
        'evenkeel_health_state{service="web",state="unhealthy"} 1',
        'evenkeel_health_state{service="new",state="starting"} 1',
        'evenkeel_health_successes{service="redis"} 2',
        'evenkeel_health_failures{service="redis"} 0',
        'evenkeel_health_failures{service="web"} 3',
        'evenkeel_health_last_check_timestamp_seconds{service="web"} 13',
        'evenkeel_health_check_duration_seconds{service="web"} 0.0100',
    ):
        assert line in lines
    assert 'last_check_timestamp_seconds{service="new"}' not in text, "nothing was checked in 1970"
    for line in lines:
        if not line.startswith("#"):
            name = line.partition("{")[0]
            assert f"# TYPE {name} gauge" in lines
    assert max(lines.count(line) for line in lines) == 1


def test_a_full_disk_stops_no_watch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Watched:
        state = health.begin("x", "", 0.0)
        changed = True

    file = health.MetricsFile(tmp_path / "gone" / "health.prom")
    file.update([Watched()])
    Watched.changed = True
    file.update([Watched()])
    assert capsys.readouterr().err.count("cannot be written") == 1, "told once"
    (tmp_path / "gone").mkdir()
    Watched.changed = True
    file.update([Watched()])
    assert "evenkeel_health_state" in (tmp_path / "gone/health.prom").read_text()


def test_a_daemon_of_a_user_who_has_no_checks_any_more_lets_go_of_its_states(host: Path) -> None:
    """Otherwise it and the daemon that has them now would write over one another."""
    table, program = host / "health.json", ROOT / "roles/healthcheck/files/health.py"
    row = {"name": "redis", "kind": "command", "command": ["true"], "user": "nobody", "interval_seconds": 1}
    table.write_text(json.dumps({"services": [row]}))
    start = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import health; health.STATES = pathlib.Path(sys.argv[2]);"
        "health.METRICS = health.STATES; health.run_daemon(health.STATES / 'health.json', health.STATES, 'nobody')"
    )
    command = ["python3", "-c", start, str(program.parent), str(host)]

    def run(until: Path, there: bool) -> int | None:
        with subprocess.Popen(command) as daemon:
            deadline = time.monotonic() + 20
            while until.exists() is not there and time.monotonic() < deadline:
                time.sleep(0.1)
            table.write_text(json.dumps({"services": [{**row, "user": "other"}]}))
            try:
                return daemon.wait(20)
            finally:
                daemon.kill()

    assert run(host / "redis.json", there=True) == 0, "it ends, so that systemd starts it with the new table"
    assert run(host / "redis.json", there=False) == 0
    assert not (host / "redis.json").exists()
    assert not (host / "health-nobody.prom").exists(), "nor shall anybody read old metrics"


# --- restarts -----------------------------------------------------------------------------------------------------------

WEB = health.Service("web", "http", unit="web.service", retries=3, restart=True, after=["redis"])
LIMIT = health.Limit(3, 3600.0)


def at(status: str, streak: int, invocation: str = "abc") -> Any:
    return health.State("web", status, streak, 0.0, 0.0, 0.0, 0.0, "no answer", invocation)


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        (at("healthy", -2), at("unhealthy", -3), True),
        (at("unhealthy", -3), at("unhealthy", -4), False),
        (at("unhealthy", -5), at("unhealthy", -6), True),
        (at("unhealthy", -6), at("healthy", 1), True),
        (at("starting", 0), at("healthy", 1), True),
        (at("healthy", 1), at("healthy", 2), False),
        (at("healthy", -1), at("healthy", -2), False),
    ],
)
def test_root_is_asked_when_it_becomes_unhealthy_and_every_so_many_failures(before: Any, after: Any, wanted: bool) -> None:
    assert health.wants_judgement(before, after, WEB) is wanted
    assert not health.wants_judgement(before, after, replace(WEB, restart=False))


def judge(state: Any, recent: list[float], now: float = 10000.0, against: str = "", given_up: str = "") -> tuple[str, str]:
    action, told = health.judge_restart(WEB, state, health.Record(len(recent), recent, given_up), LIMIT, now, lambda: against)
    return action, told


def test_an_unhealthy_service_is_restarted_within_the_limit_and_then_left_to_a_person() -> None:
    sick = at("unhealthy", -3)
    assert judge(sick, []) == ("restart", "web is unhealthy and restarted (1 of 3 within 1 h): no answer")
    assert judge(sick, [9000.0, 9500.0])[0] == "restart"
    action, told = judge(sick, [9000.0, 9500.0, 9600.0])
    assert action == "give up"
    assert "web.service is unhealthy and left alone after 3 restarts within 1 h: no answer. Next: journalctl -u web.service -n 50" in told
    assert judge(sick, [9000.0, 9500.0, 9600.0], now=13000.0)[0] == "restart", "the window moves on"
    assert judge(sick, [1.0], given_up="abc")[0] == "give up", "and who was given up stays so until somebody starts it"
    assert judge(at("unhealthy", -3, "new run"), [1.0], given_up="abc")[0] == "restart"


def test_what_a_restart_would_not_cure_is_not_restarted() -> None:
    assert judge(at("unhealthy", -3), [], against="it needs redis, which is unhealthy") == (
        "leave",
        "web is unhealthy, but not restarted: it needs redis, which is unhealthy",
    )
    assert judge(at("healthy", 1), [])[0] == "forget"
    assert judge(at("starting", 0), [])[0] == ""


@pytest.fixture
def platform(host: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host with a web process that may be restarted, and what the root side sees and does."""
    web = {"name": "web", "kind": "http", "url": "http://x/", "unit": "web.service", "retries": 3, "restart": True, "after": ["redis"]}
    table = json.loads((host / "health.json").read_text())
    table["services"].append(web)
    (host / "health.json").write_text(json.dumps(table | {"restarts": {"limit": 2, "window_seconds": 3600}}))
    (host / "units/invocation:web.service").symlink_to("abc")
    for name in ("requests", "failures", "metrics"):
        (host / name).mkdir()
    for name, path in (("REQUESTS", "requests"), ("FAILURES", "failures"), ("METRICS", "metrics"), ("RESTARTS", "restarts.json")):
        monkeypatch.setattr(health, name, host / path)
    me = health.pwd.getpwuid(os.geteuid()).pw_name
    monkeypatch.setattr(health, "CHECK_USER", me)
    monkeypatch.setattr(health, "show_units", lambda names, _timeout: {name: {"ActiveState": "active"} for name in names})
    put(host)
    return host


def ask_root(host: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Leave requests, and return the units that were restarted."""
    restarted: list[str] = []

    def run(command: list[str], **_options: Any) -> Any:
        assert command[:3] == ["systemctl", "try-restart", "--no-block"], command
        assert json.loads((host / "restarts.json").read_text())["web"]["total"] > 0, "counted before it is done"
        restarted.append(command[-1])
        return subprocess.CompletedProcess(command, 0)

    for name in names:
        (host / "requests" / name).touch()
    monkeypatch.setattr(health.subprocess, "run", run)
    assert health.main(["restart"]) == 0
    assert not list((host / "requests").iterdir()), "or systemd would call again at once"
    return restarted


def sick(host: Path, **fields: Any) -> None:
    put(host, name="web", status="unhealthy", streak=-3, message="no answer", **fields)


def test_root_restarts_up_to_the_limit_and_then_tells_the_operator(
    platform: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sick(platform)
    assert ask_root(platform, monkeypatch, "web") == ["web.service"]
    assert ask_root(platform, monkeypatch, "web") == ["web.service"]
    assert ask_root(platform, monkeypatch, "web") == []
    note = (platform / "failures/web.service").read_text()
    assert "web.service is unhealthy and left alone after 2 restarts within 1 h: no answer. Next: journalctl" in note
    assert "left alone after 2 restarts" in capsys.readouterr().out
    metrics = (platform / "metrics/health-restarts.prom").read_text()
    assert 'evenkeel_health_restarts_total{service="web"} 2' in metrics
    assert 'evenkeel_health_given_up{service="web"} 1' in metrics
    put(platform, name="web", status="healthy")
    assert ask_root(platform, monkeypatch, "web") == []
    assert not (platform / "failures/web.service").exists(), "it is well: the note is out of date"
    assert 'evenkeel_health_given_up{service="web"} 0' in (platform / "metrics/health-restarts.prom").read_text()


def test_root_restarts_nothing_that_the_table_does_not_name(
    platform: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(platform, status="unhealthy", streak=-3)
    (platform / "requests/folder").mkdir()
    (platform / "requests/folder/file").touch()
    assert ask_root(platform, monkeypatch, "redis", "nobody") == []
    assert capsys.readouterr().out.count("does not allow") == 3


def test_a_daemon_asks_for_no_restart_that_would_cure_nothing(platform: Path, capsys: pytest.CaptureFixture[str]) -> None:
    services = {service.name: service for service in health.load_table(platform / "health.json")}
    dead = replace(services["web"], kind="command", command=["false"], retries=1)
    watcher = health.Watcher(dead, {}, platform, 0.0, [services["redis"]])
    watcher.state = replace(watcher.state, status="healthy")
    put(platform, streak=-1, message="no PONG")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        watcher._turn()
        assert "web is unhealthy, but not restarted: it needs redis, which is failing (no PONG)" in capsys.readouterr().out
        assert not list((platform / "requests").iterdir())
        put(platform)
        watcher._turn()
    assert [path.name for path in (platform / "requests").iterdir()] == ["web"]


def test_what_a_service_needs_elsewhere_is_asked_there_by_who_may(platform: Path, url: str) -> None:
    far = health.Service("far", "http", url=f"{url}/down", remote=True)
    assert health.trouble_of([far], {}).startswith("far, which is not healthy")
    assert health.trouble_of([replace(far, url=url)], {}) == ""
    secret = health.Service("redis", "command", command=["false"], remote=True, credentials={"REDISCLI_AUTH": "redis-health"})
    assert health.trouble_of([secret], {}) == "", "a daemon without the secret cannot know"


def test_root_looks_for_itself(platform: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    put(platform, name="web", status="healthy")
    assert ask_root(platform, monkeypatch, "web") == [], "it is well"
    sick(platform, invocation="older")
    assert ask_root(platform, monkeypatch, "web") == [], "what was unhealthy is gone"
    sick(platform)
    with monkeypatch.context() as patch:
        patch.setattr(health, "show_units", lambda names, _timeout: {name: {"ActiveState": "activating"} for name in names})
        assert ask_root(platform, monkeypatch, "web") == [], "it is being started"
    assert "not restarted: web.service is activating" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(health, "CHECK_USER", "daemon")
        assert ask_root(platform, monkeypatch, "web") == [], "somebody else has written that state"
    assert ask_root(platform, monkeypatch, "web") == ["web.service"]

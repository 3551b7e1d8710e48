"""Draining: what nginx runs, what is remembered, what is refused, and what playbooks are told."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, load

drain = load(ROOT / "roles/proxy/files/drain.py", "evk_drain")
processes = load(ROOT / "filter_plugins/processes.py", "evk_drain_processes")

CONFIGURATION = """\
http {
    upstream shop-web {
        least_conn;
        server 10.0.0.1:8000 max_fails=1 fail_timeout=10s;  # web-1
        server 10.0.0.2:8000 max_fails=1 fail_timeout=10s;  # web-2
        keepalive 32;
    }

    upstream shop-api {
        server [fd00::1]:9000 max_fails=0 fail_timeout=10s;  # web-1
        server 10.0.0.3:9000;  # api
    }
    server {
        listen 443;
    }
}
"""


class Proxy:
    """A proxy without nginx: what would be run is written down, and a reload renders as nginx.service does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: list[str] = []
        self.in_flight = [0]
        self.refuses = False

    def run(self, command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        self.ran.append(command[0])
        if command[0] == "systemctl":
            return subprocess.CompletedProcess(command, drain.main(["render"]), "", "")
        if command[0] == "nginx":
            return subprocess.CompletedProcess(command, int(self.refuses), "", "[emerg] unknown directive")
        left = self.in_flight.pop(0) if len(self.in_flight) > 1 else self.in_flight[0]
        return subprocess.CompletedProcess(command, 0, "0 0 here there\n" * left, "")

    def down(self) -> list[str]:
        """The hosts behind the server lines that nginx would run with `down`."""
        lines = (self.folder / "run/nginx.conf").read_text().splitlines()
        return [line.split("# ")[1] for line in lines if " down;" in line]


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    (tmp_path / "run").mkdir()
    (tmp_path / "nginx.conf").write_text(CONFIGURATION)
    paths = {"CONFIGURATION": "nginx.conf", "RUNNING": "run/nginx.conf", "DRAINED": "drained", "PAGE": "page.json", "LOCK": "lock"}
    for name, path in paths.items():
        monkeypatch.setattr(drain, name, tmp_path / path)
    proxy = Proxy(tmp_path)
    monkeypatch.setattr(drain.subprocess, "run", proxy.run)
    assert drain.main(["render"]) == 0
    proxy.ran.clear()
    return proxy


def out(host: str, *more: str) -> int:
    code: int = drain.main(["out", host, "--reason", "disk swap", *more])
    return code


def test_a_drained_host_is_down_in_every_route_and_nothing_else_changes(proxy: Proxy) -> None:
    assert (proxy.folder / "run/nginx.conf").read_text() == CONFIGURATION
    assert out("web-1") == 0
    assert proxy.down() == ["web-1", "web-1"]
    assert "server [fd00::1]:9000 max_fails=0 fail_timeout=10s down;  # web-1" in (proxy.folder / "run/nginx.conf").read_text()
    assert (proxy.folder / "nginx.conf").read_text() == CONFIGURATION, "what the role wrote stays as it is"
    assert drain.main(["in", "web-1"]) == 0
    assert (proxy.folder / "run/nginx.conf").read_text() == CONFIGURATION


def test_a_second_time_changes_nothing_and_reloads_nothing(proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    assert out("web-1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"changed": True, "message": "web-1 is drained", "in_flight": 0}
    proxy.ran.clear()
    assert out("web-1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["changed"] is False
    assert "systemctl" not in proxy.ran
    for changed in (True, False):
        assert drain.main(["in", "web-1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["changed"] is changed


def test_who_drained_since_when_and_why_is_shown(proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    out("web-1", "--owner", "deploy")
    capsys.readouterr()
    assert drain.main(["list", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["host"], entry["owner"], entry["reason"], entry["known"]) == ("web-1", "deploy", "disk swap", True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry["since"])
    (proxy.folder / "drained/gone.json").write_text("not JSON")
    assert drain.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "web-1  since" in shown
    assert "gone" in shown
    assert "no route leads to this host any more" in shown


def test_the_last_server_of_a_route_is_refused_in_one_sentence_that_names_the_route(
    proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert out("web-2") == 0
    assert out("web-1") == 3
    said = capsys.readouterr().err
    assert "web-1 stays: it is the last server of route shop-web" in said
    assert proxy.down() == ["web-2"]
    assert not (proxy.folder / "drained/web-1.json").exists()
    assert out("web-1", "--force") == 0
    assert proxy.down() == ["web-1", "web-2", "web-1"]


def test_requests_in_flight_are_waited_for_within_bounds(proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    proxy.in_flight = [2, 1, 0]
    assert out("web-1") == 0
    assert capsys.readouterr().out == "web-1 is drained\n"
    proxy.in_flight = [2]
    assert out("web-1", "--wait", "0.3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["in_flight"] == 2


def test_what_one_has_drained_another_does_not_put_back_but_an_operator_may(proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    out("web-1")
    assert out("web-1", "--owner", "deploy", "--json") == 0
    assert drain.main(["in", "web-1", "--owner", "deploy"]) == 0
    assert "web-1 stays drained: disk swap" in capsys.readouterr().out
    assert proxy.down() == ["web-1", "web-1"]
    drain.main(["in", "web-1"])
    out("web-1", "--owner", "deploy")
    assert drain.main(["in", "web-1"]) == 0
    assert proxy.down() == []


def test_nothing_is_remembered_that_nginx_did_not_take(proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    proxy.refuses = True
    assert out("web-1") == 1
    said = capsys.readouterr().err
    assert "unknown directive" in said
    assert "nginx goes on as it was" in said
    assert not list((proxy.folder / "drained").glob("*.json"))
    assert [path.name for path in (proxy.folder / "run").iterdir()] == ["nginx.conf"]
    proxy.refuses = False
    out("web-1")
    proxy.refuses = True
    assert drain.main(["in", "web-1"]) == 1
    assert proxy.down() == ["web-1", "web-1"]
    assert drain.read_drained()["web-1"]["reason"] == "disk swap"


def test_an_interrupted_drain_is_finished_by_the_next_one(proxy: Proxy) -> None:
    drain.write_drained({"host": "web-1", "owner": "operator", "reason": "x", "by": "me", "since": "now"})
    assert proxy.down() == []
    assert out("web-1") == 0
    assert proxy.down() == ["web-1", "web-1"]


def test_it_is_remembered_while_nginx_does_not_run(proxy: Proxy) -> None:
    (proxy.folder / "run/nginx.conf").unlink()
    assert out("web-1") == 0
    assert "systemctl" not in proxy.ran
    assert drain.main(["render"]) == 0
    assert proxy.down() == ["web-1", "web-1"]


@pytest.mark.parametrize("verb", ["out", "in"])
def test_a_host_that_no_route_knows(proxy: Proxy, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("wbe-1", "../nginx"):
        assert drain.main([verb, name, *(["--reason", "x"] if verb == "out" else [])]) == 2
        assert "known are: api, web-1, web-2" in capsys.readouterr().err


ROUTES = [
    {"name": "web", "path": "/", "servers": [{"name": "web-1"}, {"name": "web-2"}]},
    {"name": "api", "path": "/api", "servers": [{"name": "web-2"}]},
]


def test_playbooks_drain_hosts_that_another_can_stand_in_for() -> None:
    assert processes.has_understudy(ROUTES, "web-1")
    assert not processes.has_understudy(ROUTES, "web-2"), "it alone serves /api"
    assert not processes.has_understudy(ROUTES, "db-1")
    assert not processes.has_understudy([], "web-1")


def test_playbooks_leave_out_a_proxy_that_is_down_and_fail_for_all_else() -> None:
    def said(message: str) -> str:
        return json.dumps({"changed": False, "message": message, "in_flight": 0})

    results: list[dict[str, Any]] = [
        {"item": "proxy-1", "rc": 0, "stdout": said("web-1 is drained")},
        {"item": "proxy-2", "unreachable": True},
        {"item": "proxy-3", "rc": 3, "stdout": said("web-1 stays: it is the last")},
        {"item": "proxy-4", "rc": 2, "stdout": "", "stderr": "", "msg": "[Errno 2] No such file"},
        {"item": "proxy-5", "skipped": True},
    ]
    told = processes.drain_result(results)
    assert told["problems"] == ["proxy-3: web-1 stays: it is the last", "proxy-4: [Errno 2] No such file"]
    assert [note.split(":")[0].split(" ")[0] for note in told["notes"]] == ["proxy-1", "proxy-2", "proxy-5"]
    assert processes.drain_result(results[:3], [0, 3])["problems"] == []


# --- the maintenance page ---------------------------------------------------------------------------------------------

PAGE_LINE = "    map $from_own_host$is_operator $is_kept_out { default 0; 00 0; }  # evenkeel-page"


@pytest.fixture
def page(proxy: Proxy, tmp_path: Path) -> Proxy:
    (tmp_path / "nginx.conf").write_text(f"{PAGE_LINE}\n{CONFIGURATION}")
    assert drain.main(["render"]) == 0
    proxy.ran.clear()
    return proxy


def switch(*words: str) -> int:
    code: int = drain.main(list(words), "evenkeel-page")
    return code


def runs_with(proxy: Proxy) -> str:
    """What nginx does with users: 1 keeps them out."""
    return (proxy.folder / "run/nginx.conf").read_text().splitlines()[0].split(" 00 ")[1][0]


def test_the_page_is_switched_for_nginx_and_remembered_with_who_and_why(page: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs_with(page) == "0"
    assert switch("on", "--reason", "new hall", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"changed": True, "message": "users get the maintenance page: new hall"}
    assert runs_with(page) == "1"
    assert (page.folder / "run/nginx.conf").read_text().replace("00 1", "00 0") == (page.folder / "nginx.conf").read_text()
    switch("status", "--json")
    assert json.loads(capsys.readouterr().out)["reason"] == "new hall"
    assert switch("off") == 0
    assert runs_with(page) == "0"
    switch("status")
    assert capsys.readouterr().out.endswith("users get the platform again\nthe page is off\n")


def test_switched_twice_changes_nothing_and_a_converge_leaves_it(page: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    switch("on", "--reason", "new hall")
    page.ran.clear()
    assert switch("on", "--reason", "other", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["changed"] is False
    assert page.ran == []
    (page.folder / "nginx.conf").write_text((page.folder / "nginx.conf").read_text() + "# changed\n")
    assert drain.main(["render"]) == 0
    assert runs_with(page) == "1"
    assert out("web-1") == 0
    assert runs_with(page) == "1", "draining leaves it, too"


def test_a_page_that_nginx_did_not_take_is_not_remembered(page: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    page.refuses = True
    assert switch("on", "--reason", "x") == 1
    assert "evenkeel-page: nginx goes on as it was" in capsys.readouterr().err
    assert drain.read_page() == {}
    page.refuses = False
    switch("on", "--reason", "x")
    page.refuses = True
    assert switch("off") == 1
    assert drain.read_page()["reason"] == "x"


def test_a_record_that_cannot_be_read_keeps_the_page_on(page: Proxy) -> None:
    (page.folder / "page.json").write_text("")
    assert drain.main(["render"]) == 0
    assert runs_with(page) == "1"


def test_a_proxy_without_the_page_says_what_to_do(proxy: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    assert switch("on", "--reason", "x") == 1
    assert "knows no maintenance page; apply the role proxy to this host" in capsys.readouterr().err

"""Deploys under load lose nothing, and a release that does not hold is taken back on every host without a hand (V3)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import IO

import pytest
import suite
from conftest import INVENTORY, Build, Hosts, Load, current, entries, playbook
from load.places import Platform, until
from suite import ROOT

#: Machines are noisy: the promised half minute is measured, and only what is hopeless fails.
HOPELESS_SECONDS = 180
URLS = "drydock/src/drydock/urls.py"
WSGI = "drydock/src/drydock/wsgi.py"


def text(path: str) -> str:
    return (ROOT / path).read_text()


@pytest.fixture(scope="module")
def second(build: Build) -> str:
    """A release without migrations."""
    return build({WSGI: text(WSGI) + "\n# the next release\n"})


def broken_path(path: str, only_through_proxy: bool) -> str:
    """Drydock's WSGI, with one path that answers 500, for everybody or only when the proxy asks for a user."""
    proxied = "environ.get('HTTP_X_FORWARDED_FOR') and " if only_through_proxy else ""
    return (
        text(WSGI)
        + f'''

_well = application


def application(environ, start_response):
    """Break one path."""
    if {proxied}environ["PATH_INFO"] == "{path}":
        start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
        return [b"broken for a test"]
    return _well(environ, start_response)
'''
    )


def there_and_back(hosts: Hosts, first: str, second: str) -> None:
    """Deploy one release on both hosts, and roll back to the other."""
    run = playbook("deploy", "-e", f"release={second}")
    assert run.code == 0, run.output[-5000:]
    assert current(hosts) == [second, second]
    run = playbook("rollback")
    assert run.code == 0, run.output[-5000:]
    assert current(hosts) == [first, first]


def test_a_deploy_and_a_rollback_under_load_fail_no_request_and_lose_no_job(hosts: Hosts, first: str, second: str, load: Load) -> None:
    there_and_back(hosts, first, second)
    outcome = load.over()
    assert load.failures() == []
    assert len(load.browsing.requests) > 300
    assert (outcome.lost, outcome.wrong, outcome.refused) == ([], {}, [])
    assert outcome.accepted > 5
    assert outcome.done == outcome.accepted, outcome


def test_a_release_that_is_not_ready_on_the_canary_never_reaches_the_others(hosts: Hosts, first: str, build: Build, load: Load) -> None:
    started = hosts["web-2"].check_output("systemctl show -p ActiveEnterTimestampMonotonic drydock-web drydock-worker-export")
    bad = build({WSGI: broken_path("/ready", only_through_proxy=False)})
    run = playbook("deploy", "-e", f"release={bad}")
    assert run.code != 0
    assert "ready: GET /ready answered 500, not 200: broken for a test" in run.text
    assert f"Every host is back on release {first}" in run.text
    assert current(hosts) == [first, first]
    assert hosts["web-2"].check_output("systemctl show -p ActiveEnterTimestampMonotonic drydock-web drydock-worker-export") == started
    assert load.over().lost == []
    # the canary was drained before it broke: nobody saw it
    assert load.failures() == []
    refused = playbook("rollback", "-e", f"release={bad}")
    assert refused.code != 0
    assert f"{bad} is marked bad" in refused.text


def test_a_release_that_fails_users_is_taken_back_everywhere_without_a_hand(hosts: Hosts, first: str, build: Build) -> None:
    bad = build({WSGI: broken_path("/login", only_through_proxy=True)})
    run = playbook("deploy", "-e", f"release={bad}")
    assert run.code != 0
    assert "login page: GET /login answered 500, not 200" in run.text
    assert current(hosts) == [first, first]
    entry = entries(hosts)[-1]
    assert (entry["kind"], entry["release"], entry["previous"], entry["outcome"]) == ("deploy", bad, first, "rolled back")
    assert "login page: GET /login answered 500" in entry["why"]
    print(f"back after {entry['back_seconds']} s")
    assert entry["back_seconds"] < HOPELESS_SECONDS
    assert playbook("status").code == 0


def test_a_release_that_does_not_start_tells_its_last_words(hosts: Hosts, first: str, build: Build) -> None:
    bad = build({WSGI: 'raise RuntimeError("this release does not start")\n'})
    run = playbook("deploy", "-e", f"release={bad}")
    assert run.code != 0
    assert "this release does not start" in run.text
    assert f"Every host is back on release {first}" in run.text
    assert current(hosts) == [first, first]


def begun(name: str, *arguments: str, output: int | IO[str] = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """A deploy or a rollback in a process group of its own."""
    command = suite.command(name, *arguments, inventory=INVENTORY)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=suite.environment(),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def killed_midway(hosts: Hosts, first: str, second: str, name: str, *arguments: str) -> None:
    """A deploy or a rollback between these releases that dies when one of the two hosts has switched."""
    process = begun(name, *arguments)
    try:
        until("one host to be switched", lambda: sorted(current(hosts)) == sorted([first, second]), 300, 0.5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_after_a_killed_deploy_a_strangers_lock_is_shown_and_a_rollback_restores(hosts: Hosts, first: str, second: str) -> None:
    killed_midway(hosts, first, second, "deploy", "-e", f"release={second}")
    lock = json.loads(hosts["web-2"].check_output("cat /var/lib/evenkeel/lock.json"))
    assert second in lock["purpose"]
    stranger = {**lock, "who": "somebody@elsewhere"}
    for host in hosts.values():
        host.check_output(f"echo '{json.dumps(stranger)}' > /var/lib/evenkeel/lock.json")
    run = playbook("deploy", "-e", f"release={second}")
    assert run.code != 0
    assert "somebody@elsewhere" in run.text and f"-e take_over={lock['id']}" in run.text, run.output[-3000:]
    assert sorted(current(hosts)) == sorted([first, second])
    run = playbook("rollback", "-e", f"take_over={lock['id']}")
    assert run.code == 0, run.output[-5000:]
    assert current(hosts) == [first, first]
    assert not hosts["web-2"].file("/var/lib/evenkeel/lock.json").exists


def test_a_killed_deploy_is_finished_by_the_next_and_rolled_back_without_a_network_by_a_broken_release(
    hosts: Hosts, first: str, second: str
) -> None:
    """The lock of the killed run is one's own. Then: no way out of the lab, and a release that cannot run a single command of its own.

    The rollback is killed, too: the next one goes on with it and does not turn round.
    """
    killed_midway(hosts, first, second, "deploy", "-e", f"release={second}")
    run = playbook("deploy", "-e", f"release={second}")
    assert run.code == 0, run.output[-5000:]
    assert current(hosts) == [second, second]
    routes = {name: host.check_output("ip -4 route show default") for name, host in hosts.items()}
    for host in hosts.values():
        host.check_output("ip -4 route del default")
        host.check_output(f"find /opt/drydock/releases/{second}/venv -name 'drydock*' -prune -exec mv {{}} {{}}.gone ';'")
    try:
        assert hosts["web-1"].run("timeout 5 bash -c '</dev/tcp/192.0.2.1/80'").rc != 0
        killed_midway(hosts, first, second, "rollback")
        run = playbook("rollback")
        assert run.code == 0, run.output[-5000:]
        assert current(hosts) == [first, first]
        print(re.findall(r"again, after \d+ s", run.text))
    finally:
        for name, host in hosts.items():
            host.check_output(f"ip -4 route add {routes[name]}")
            host.check_output(f"rm -rf /opt/drydock/releases/{second}")
    assert playbook("status").code == 0


def test_a_host_that_is_lost_midway_is_named_and_the_next_deploy_brings_both_there(
    hosts: Hosts, platform: Platform, first: str, second: str, tmp_path: Path
) -> None:
    said = tmp_path / "deploy.log"
    with said.open("w") as output:
        process = begun("deploy", "-e", f"release={second}", output=output)
        try:
            until("the first host to be switched", lambda: current({"web-1": hosts["web-1"]}) == [second], 300, 0.5)
            platform.machine("power-off", "web-2")
            code = process.wait(600)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            platform.machine("power-on", "web-2")
    words = " ".join(said.read_text().split())
    assert code != 0
    assert "web-2 does not answer any more" in words, words[-4000:]
    until("the platform to be well again", lambda: playbook("status").code == 0, 300, 5)
    there_and_back(hosts, first, second)


def test_the_ledger_is_whole_and_a_changed_entry_is_found(hosts: Hosts) -> None:
    assert playbook("ledger").code == 0
    path = "/var/lib/evenkeel/ledger/ledger.jsonl"
    hosts["web-1"].check_output(f'cp {path} /root/ledger.kept && sed -i \'3s/"who":"[^"]*"/"who":"nobody@nowhere"/\' {path}')
    try:
        run = playbook("ledger")
        assert run.code != 0
        assert "web-1" in run.text and "entry 3" in run.text, run.output[-2000:]
        hosts["web-1"].check_output(f"head -n -2 /root/ledger.kept > {path}")
        run = playbook("ledger")
        assert run.code != 0
        assert "web-1" in run.text, run.output[-2000:]
    finally:
        hosts["web-1"].check_output(f"mv /root/ledger.kept {path}")
    assert playbook("ledger").code == 0

"""What the playbooks promise: honest check mode, one clear sentence for bad input, and nothing changed by a refusal."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import suite
import testinfra
import yaml
from conftest import INVENTORY, KEPT, ROOT, Run, playbook
from suite import RELEASES


@pytest.fixture(autouse=True)
def _once(request: pytest.FixtureRequest, host: testinfra.host.Host) -> None:
    """After a reboot only the status is asked again: what playbooks do on a running host has been tested before it."""
    if request.node.name != "test_status_is_green" and not host.file("/run/converged").exists:
        pytest.skip("tested before the reboot")


def refused(run: Run, *sentence: str) -> None:
    """The run failed before it changed anything, and said why in these words."""
    assert run.code != 0, run.output[-2000:]
    assert run.count("changed") == 0, run.output[-2000:]
    text = " ".join(run.output.split())
    for words in sentence:
        assert words in text, f"{words!r} is not in:\n{run.output[-3000:]}"


def test_check_mode_on_the_converged_host_changes_nothing() -> None:
    run = playbook("site", "--check", "--diff")
    assert (run.code, run.count("changed"), run.count("failed")) == (0, 0, 0), run.output[-3000:]


def test_check_mode_on_a_fresh_host_does_not_fail() -> None:
    run = playbook("site", "--check", inventory=ROOT / "molecule/fresh/inventory")
    assert (run.code, run.count("failed")) == (0, 0), run.output[-3000:]
    assert run.count("changed") > 20, "a fresh host needs nearly everything"


def test_status_is_green() -> None:
    run = playbook("status")
    assert run.code == 0, run.output
    assert "all is well" in run.output
    assert re.search(r"core +primary +single", run.output), run.output


def test_status_is_red_and_says_what_is_wrong(host: testinfra.host.Host) -> None:
    host.check_output("systemctl stop nginx")
    try:
        run = playbook("status")
        assert run.code != 0
        assert "NOT WELL" in run.output
        assert "proxy on single" in run.output
    finally:
        host.check_output("systemctl start nginx")
    host.check_output("evenkeel-health wait --timeout 120 proxy")


def test_verify_names_the_failing_check(host: testinfra.host.Host) -> None:
    run = playbook("verify", "-e", json.dumps({"app": contract(checks=[{"name": "nowhere", "path": "/nowhere"}])}))
    assert run.code != 0
    assert "nowhere: GET /nowhere answered 404, not 200" in run.output


def running(host: testinfra.host.Host) -> str:
    """The release that runs; the newest archive may be another scenario's, which is tested beside this one."""
    return str(host.check_output("readlink /opt/drydock/current")).rpartition("/")[2]


def test_second_deploy_of_the_same_release_changes_nothing(host: testinfra.host.Host) -> None:
    started = host.check_output("systemctl show -p ActiveEnterTimestampMonotonic drydock-web drydock-worker-latex")
    run = playbook("deploy", "-e", f"release={running(host)}")
    assert (run.code, run.count("changed")) == (0, 0), run.output[-3000:]
    assert host.check_output("systemctl show -p ActiveEnterTimestampMonotonic drydock-web drydock-worker-latex") == started


# --- wrong input -----------------------------------------------------------------------------------------------------


def contract(**changes: object) -> dict[str, object]:
    """The demo's app contract with some of its values replaced."""
    app: dict[str, object] = yaml.safe_load((ROOT / "inventories/demo/group_vars/all/app.yml").read_text())["app"]
    return {**app, **changes}


def test_missing_secret_is_named() -> None:
    given = {path.name: "x" for path in (KEPT / "secrets").iterdir()}
    refused(playbook("site", "-e", json.dumps({"secrets": {**given, "redis_health": ""}})), "no value for secrets.redis_health")


def test_unknown_name_in_the_contract_is_named() -> None:
    processes = {"web": {"kind": "web", "hosts": "web", "port": 8000, "comand": ["x"], "health": {"http": {"path": "/"}}}}
    refused(
        playbook("site", "-e", json.dumps({"app": contract(processes=processes, bootstrap={})})),
        "app.processes.web.comand: unknown name, did you mean command?",
    )


def test_port_conflict_names_both_services() -> None:
    refused(
        playbook("site", "-e", json.dumps({"platform_ports": {"redis": 5432}})),
        "port conflict on host 'single'", "redis and postgresql-core both want TCP port 5432",
    )  # fmt: skip


def test_empty_group_is_named(tmp_path: Path) -> None:
    inventory = tmp_path / "inventory"
    shutil.copytree(INVENTORY, inventory, symlinks=False)
    hosts = yaml.safe_load((inventory / "hosts.yml").read_text())
    hosts["all"]["children"]["redis"] = {"hosts": {}}
    (inventory / "hosts.yml").write_text(yaml.safe_dump(hosts))
    refused(playbook("site", inventory=inventory), "inventory group 'redis' (the message broker) has no host")


def test_a_release_that_was_tampered_with_is_refused(host: testinfra.host.Host) -> None:
    whole = RELEASES / f"{running(host)}.tar"
    corrupt = RELEASES / "9.9.9-badbadbadbad.tar"
    data = bytearray(whole.read_bytes())
    data[len(data) // 2] ^= 1
    corrupt.write_bytes(data)
    shutil.copy(f"{whole}.sig", f"{corrupt}.sig")
    before = host.check_output("readlink /opt/drydock/current; ls /opt/drydock/releases")
    try:
        refused(playbook("deploy", "-e", "release=9.9.9-badbadbadbad"), str(corrupt), "is corrupt or was altered")
    finally:
        suite.remove_release("9.9.9-badbadbadbad")
    assert host.check_output("readlink /opt/drydock/current; ls /opt/drydock/releases") == before


def test_unknown_release_lists_those_there_are() -> None:
    refused(playbook("deploy", "-e", "release=0.0.0-nosuch"), "names 0 releases; there are:")


def test_host_that_has_not_been_converged_is_told_what_to_type(tmp_path: Path) -> None:
    kept = shutil.copytree(KEPT, tmp_path / "kept", ignore=shutil.ignore_patterns("ledger-head.json"))
    run = playbook("deploy", "-e", f"inventory_state_dir={kept}", inventory=ROOT / "molecule/fresh/inventory")
    refused(run, "fresh has not been converged", "playbooks/site.yml")


def test_deploy_to_a_part_of_the_platform_is_refused() -> None:
    refused(playbook("deploy", "--limit", "single"), "Run it without --limit")


def test_unknown_commit_is_named() -> None:
    refused(playbook("release", "-e", "ref=no-such-tag"), "'no-such-tag' is no commit, tag or branch")

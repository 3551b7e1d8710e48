"""What the playbooks promise: honest check mode, one clear sentence for bad input, the gate, and nothing changed by a refusal."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import testinfra
import yaml
from conftest import INVENTORY, KEPT, ROOT, STATE, Run, playbook

RELEASES = STATE / "releases/drydock"


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


def test_second_deploy_of_the_same_release_changes_nothing(host: testinfra.host.Host) -> None:
    started = host.check_output("systemctl show -p ActiveEnterTimestampMonotonic drydock-web drydock-worker-latex")
    run = playbook("deploy")
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


def test_corrupt_release_is_refused(host: testinfra.host.Host) -> None:
    newest = max(RELEASES.glob("*.tar"), key=lambda path: path.stat().st_mtime)
    corrupt = RELEASES / "9.9.9-badbadbadbad.tar"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    corrupt.write_bytes(data)
    Path(f"{corrupt}.sha256").write_text(Path(f"{newest}.sha256").read_text().replace(newest.name, corrupt.name))
    before = host.check_output("readlink /opt/drydock/current; ls /opt/drydock/releases")
    try:
        refused(playbook("deploy", "-e", "release=9.9.9-badbadbadbad"), "is corrupt")
    finally:
        corrupt.unlink()
        Path(f"{corrupt}.sha256").unlink()
    assert host.check_output("readlink /opt/drydock/current; ls /opt/drydock/releases") == before


def test_unknown_release_lists_those_there_are() -> None:
    refused(playbook("deploy", "-e", "release=0.0.0-nosuch"), "names 0 releases; there are:")


def test_host_that_has_not_been_converged_is_told_what_to_type() -> None:
    refused(playbook("deploy", inventory=ROOT / "molecule/fresh/inventory"), "fresh has not been converged", "playbooks/site.yml")


def test_deploy_to_a_part_of_the_platform_is_refused() -> None:
    refused(playbook("deploy", "--limit", "single"), "Run it without --limit")


def test_unknown_commit_is_named() -> None:
    refused(playbook("release", "-e", "ref=no-such-tag"), "'no-such-tag' is no commit, tag or branch")


# --- the gate ----------------------------------------------------------------------------------------------------------


MIGRATION = '''"""Adds a column, to be refused."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("documents", "%s")]
    operations = [migrations.AddField("document", "note", models.TextField(default=""))]
'''


def release_of(folder: Path, path: str, text: str) -> Iterator[str]:
    """A release of a commit in which one file has this text; removed afterwards, so that `latest` means what it meant."""
    checkout = folder / "checkout"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
    (checkout / path).write_text(text)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", str(checkout), "add", "."], check=True)
    subprocess.run(["git", "-C", str(checkout), *identity, "commit", "-q", "-m", "Change one file"], check=True)
    run = playbook("release", "-e", f"repository={checkout}")
    assert run.code == 0, run.output
    newest = max(RELEASES.glob("*.tar"), key=lambda path: path.stat().st_mtime)
    yield newest.name.removesuffix(".tar")
    newest.unlink()
    Path(f"{newest}.sha256").unlink()


@pytest.fixture
def release_with_migration(tmp_path: Path) -> Iterator[str]:
    """A release of a commit that has one more migration."""
    folder = "drydock/src/drydock/documents/migrations"
    last = max(path.stem for path in (ROOT / folder).glob("0*.py"))
    yield from release_of(tmp_path, f"{folder}/9999_note.py", MIGRATION % last)


def state_of(host: testinfra.host.Host) -> str:
    """What a refused deploy must leave alone: the release that runs, the processes, the schema."""
    return host.check_output(
        "readlink /opt/drydock/current; systemctl show -p ActiveEnterTimestampMonotonic 'drydock-*';"
        " for port in 5432 5433; do runuser -u postgres -- pg_dump -p $port --schema-only drydock | grep -v restrict | sha256sum;"
        " runuser -u postgres -- psql -p $port -Atc 'select app, name from django_migrations order by 1, 2' drydock | sha256sum; done"
    )


def test_pending_migration_stops_the_deploy_until_exactly_it_is_approved(host: testinfra.host.Host, release_with_migration: str) -> None:
    before = state_of(host)
    run = playbook("deploy", "-e", f"release={release_with_migration}")
    assert run.code != 0
    assert "documents.9999_note" in run.output
    assert "Add field note to document" in run.output
    assert "Nothing was changed" in run.output
    assert "-e migrations_approved=" in run.output
    assert state_of(host) == before

    run = playbook("deploy", "-e", f"release={release_with_migration}", "-e", "migrations_approved=0123456789abcdef")
    assert run.code != 0
    assert "the approval 0123456789abcdef is for another plan" in " ".join(run.output.split())
    assert state_of(host) == before

    host.check_output(f"rm -rf /opt/drydock/releases/{release_with_migration}")


@pytest.fixture
def release_that_does_not_start(tmp_path: Path) -> Iterator[str]:
    """A release of a commit whose web process ends at once."""
    yield from release_of(tmp_path, "drydock/src/drydock/wsgi.py", 'raise RuntimeError("this release does not start")\n')


def test_release_that_does_not_start_says_how_to_go_back_and_going_back_works(
    host: testinfra.host.Host, release_that_does_not_start: str
) -> None:
    running = host.check_output("readlink /opt/drydock/current").rpartition("/")[2]
    try:
        run = playbook("deploy", "-e", f"release={release_that_does_not_start}")
        assert run.code != 0
        text = " ".join(run.output.split())
        assert f"Release {release_that_does_not_start} did not come up on single" in text
        assert "this release does not start" in text
        assert f"To go back to {running}, type:" in text
    finally:
        back = playbook("deploy", "-e", f"release={running}")
    assert back.code == 0, back.output[-3000:]
    assert playbook("status").code == 0
    host.check_output(f"rm -rf /opt/drydock/releases/{release_that_does_not_start}")

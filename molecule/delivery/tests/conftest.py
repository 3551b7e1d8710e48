"""Two hosts, playbooks as a user runs them, releases made for the tests, and users who notice when something is amiss."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import testinfra

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "pairs"))
sys.path.append(str(Path(__file__).resolve().parents[1]))

import suite
from load.places import Platform
from suite import ROOT, STATE, Run
from users import Load, users

INVENTORY = ROOT / "molecule/delivery/inventory"
KEPT = STATE / "inventories/delivery"  # what the controller keeps of the platform
HOSTS = ("web-1", "web-2")
MIGRATIONS = "drydock/src/drydock/documents/migrations"
MODELS = "drydock/src/drydock/documents/models.py"

Hosts = dict[str, testinfra.host.Host]
Build = Callable[..., str]


def playbook(name: str, *arguments: str, timeout: float = 900) -> Run:
    """Run a playbook of the suite on the two hosts; users are watched for less long than usual after a deploy."""
    watch = ("-e", "deploy_watch_seconds=3") if name == "deploy" else ()
    return suite.playbook(name, *watch, *arguments, inventory=INVENTORY, timeout=timeout)


def plan() -> dict[str, Any]:
    """The migration plan that was shown last."""
    found: dict[str, Any] = json.loads((KEPT / "migration-plan.json").read_text())
    return found


def deployed(release: str, *arguments: str) -> Run:
    """Deploy a release, approving the plan that it shows."""
    shown = playbook("deploy", "-e", f"release={release}", "-e", "gate=plan")
    assert shown.code == 0, shown.output[-4000:]
    return playbook("deploy", "-e", f"release={release}", "-e", f"migrations_approved={plan()['fingerprint']}", *arguments)


@pytest.fixture(scope="session")
def hosts() -> Hosts:
    return {name: testinfra.get_host(f"ssh://{name}", ssh_config=str(STATE / "labs/delivery/ssh_config")) for name in HOSTS}


@pytest.fixture(scope="session")
def platform() -> Platform:
    return Platform.of(INVENTORY)


def current(hosts: Hosts) -> list[str]:
    """The release that each host runs."""
    return [host.check_output("readlink /opt/drydock/current").rpartition("/")[2] for host in hosts.values()]


def state_of(hosts: Hosts) -> list[str]:
    """What a refused deploy must leave alone: the release that runs, the processes, and on the host that has it the schema and its rows."""
    # by name: a timer's service is loaded only while it runs
    running = "systemctl list-units --plain --no-legend --state=running 'drydock-*' | cut -d' ' -f1 | sort"
    ask = f"readlink /opt/drydock/current; systemctl show -p Id,ActiveEnterTimestampMonotonic --no-pager $({running})"
    seen = [host.check_output(ask) for host in hosts.values()]
    for port in (5432, 5433):
        ask = f"runuser -u postgres -- psql -p {port} -Atc 'select app, name, applied from django_migrations order by 1, 2' drydock"
        dump = f"runuser -u postgres -- pg_dump -p {port} --schema-only drydock | grep -v restrict"
        seen += [hosts["web-1"].check_output(ask), hosts["web-1"].check_output(dump)]
    return seen


def entries(hosts: Hosts) -> list[dict[str, Any]]:
    """The ledger."""
    return [json.loads(line) for line in hosts["web-2"].check_output("cat /var/lib/evenkeel/ledger/ledger.jsonl").splitlines()]


@pytest.fixture(scope="session")
def first(hosts: Hosts) -> str:
    """The release that converge.yml deployed."""
    return current(hosts)[0]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """Builds releases of commits that change files of Drydock: build(path=text, …); each one of its own, beginning with HEAD."""
    made: list[str] = []

    def one(changes: dict[str, str], of: str = "") -> str:
        """of: id of a release of these tests whose checkout this one goes on from."""
        folder = folders[of] if of else tmp_path_factory.mktemp("release")
        release = suite.build_release(folder, INVENTORY, **changes)
        folders[release] = folder
        made.append(release)
        return release

    folders: dict[str, Path] = {}
    yield one
    for release in made:
        suite.remove_release(release)


def migration(after: str, operations: str, head: str = "") -> str:
    """The text of a migration of Drydock's documents."""
    return f'''"""Made for a test."""

from django.db import migrations, models
{head}

class Migration(migrations.Migration):
    dependencies = [("documents", "{after}")]
    operations = [{operations}]
'''


@pytest.fixture(scope="session")
def last() -> str:
    """Name of the newest migration of Drydock's documents."""
    return max(path.stem for path in (ROOT / MIGRATIONS).glob("0*.py"))


def models_with_note() -> str:
    """Drydock's documents with one more column."""
    text = (ROOT / MODELS).read_text()
    line = "    title = models.CharField(max_length=200)\n"
    assert line in text
    return text.replace(line, line + "    note = models.TextField(null=True)  # noqa: DJ001\n", 1)


@pytest.fixture
def load(platform: Platform) -> Iterator[Load]:
    """A few requests a second and a job every few seconds."""
    with users(platform, requests_per_second=10, jobs_per_minute=15) as one:
        yield one

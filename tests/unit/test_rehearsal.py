"""The rehearsal of migrations: what is judged and how it is told, and the room from which nothing live can be reached."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from migration_world import PYTHON, World, cluster
from programs import ROOT, load

from filter_plugins import rehearsal as f
from filter_plugins.app_contract import app_contract
from filter_plugins.topology import topology

program = load(ROOT / "roles/process/files/rehearse.py", "evk_rehearse")
run = load(ROOT / "roles/process/files/run.py", "evk_rehearse_run")

GROUPS = {
    "all": ["db-1", "db-2", "web-1", "store"],
    "etcd": ["db-1"],
    "postgresql_core": ["db-1", "db-2"],
    "postgresql_plugins": ["db-2"],
    "redis": ["db-1"],
    "web": ["web-1"],
    "worker": ["web-1"],
    "proxy": ["web-1"],
    "backup": ["store"],
}
ADDRESSES = {"db-1": "10.0.0.1", "db-2": "10.0.0.2", "web-1": "10.0.0.3", "store": "10.0.0.4"}
TOPOLOGY = topology(GROUPS, ADDRESSES)
APP: dict[str, Any] = {
    "name": "pier",
    "install": {"project": ".", "lock": "lock"},
    "secrets": {"TOKEN": "x"},
    "databases": {"core": {"name": "pier"}},
    "migrations": {"django": ["default"]},
    "processes": {
        "web": {"kind": "web", "hosts": "web", "port": 8000, "command": ["serve", "{credentials}/key"], "credentials": {"key": "/etc/key"},
                "health": {"http": {"path": "/up"}}},
        "admin": {"kind": "web", "hosts": "web", "port": 8001, "path": "/admin", "command": ["serve"], "health": {"http": {"path": "/up"}}},
    },
    "checks": [
        {"name": "login", "path": "/login", "contains": "password"},
        {"name": "admin", "path": "/admin/login"},
        {"name": "ping", "path": "/ping", "method": "POST"},
        {"name": "secret", "path": "/secret", "bearer": "TOKEN"},
    ],
}  # fmt: skip
CONTRACT = app_contract(APP, GROUPS)
JOBS = {
    "ca_file": "/etc/ca.crt",
    "platform": "pier.example.org",
    "apply": {"argv": ["python", "-", "apply"], "stdin": "", "seconds": 60},
    "probe": {"argv": f.rehearsal_probe(CONTRACT), "stdin": ""},
}
MIGRATION = {"database": "core", "app": "shop", "name": "0002_more", "seconds": 1.5}


# --- the verdict --------------------------------------------------------------------------------------------------------


def rehearsed(
    answers: dict[tuple[str, int], dict[str, str]], problem: str = "", current: str = "old"
) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """A rehearsal in which a release says these things, by how often migrations were applied; and who was asked when."""
    asked: list[tuple[str, int]] = []
    applied = 0

    def examine(release: str) -> dict[str, str]:
        asked.append((release, applied))
        return answers.get((release, applied), {"page": "", "table": ""})

    def apply() -> tuple[str, list[dict[str, Any]]]:
        nonlocal applied
        applied += 1
        return problem, [MIGRATION]

    return program.rehearse(current, "new", examine, apply), asked


def test_the_current_release_is_tried_before_and_after_and_the_new_one_after() -> None:
    verdict, asked = rehearsed({})
    assert asked == [("old", 0), ("old", 1), ("new", 1)]
    assert (verdict["outcome"], verdict["why"], verdict["migrations"]) == ("passed", "", [MIGRATION])


def test_what_breaks_the_current_release_is_named_and_the_new_one_is_not_asked() -> None:
    verdict, asked = rehearsed({("old", 1): {"page": "", "table": "column title does not exist"}})
    assert verdict["outcome"] == "failed"
    assert verdict["why"] == "the running release old does not work on the migrated copy (table: column title does not exist)"
    assert asked[-1] == ("old", 1)


def test_what_failed_before_is_not_counted_and_what_is_new_is() -> None:
    """A check that needs the broker fails in every rehearsal; a model that the new release brings was not there before."""
    away = {"page": "answered 503, not 200", "table": ""}
    assert rehearsed({("old", 0): away, ("old", 1): away, ("new", 1): away})[0]["outcome"] == "passed"
    verdict, _ = rehearsed({("old", 0): away, ("new", 1): {**away, "brought": "relation brought does not exist"}})
    assert verdict["why"] == "the new release new does not work on the migrated copy (brought: relation brought does not exist)"
    counted = {row["check"]: row["counts"] for row in verdict["checks"] if row["release"] == "new"}
    assert counted == {"page": False, "table": True, "brought": True}


def test_migrations_that_fail_end_the_rehearsal() -> None:
    verdict, asked = rehearsed({}, problem="value too long")
    assert verdict["why"] == "the migrations fail on the copy: value too long"
    assert asked == [("old", 0)]


def test_before_the_first_deploy_the_new_release_alone_is_tried() -> None:
    verdict, asked = rehearsed({}, current="")
    assert (verdict["outcome"], asked) == ("passed", [("new", 1)])


def test_the_program_that_applies_is_judged_by_its_last_line_or_its_exit_code() -> None:
    line = json.dumps({"outcome": "failed", "why": "lock timeout", "migrations": [MIGRATION]})
    assert program.applied(1, f"progress\n{line}\n", "") == ("lock timeout", [MIGRATION])
    assert program.applied(0, json.dumps({"outcome": "succeeded", "migrations": []}), "noise") == ("", [])
    assert program.applied(0, "Applying… OK\n", "") == ("", []), "a command of the contract may say what it likes"
    assert program.applied(2, "Applying…\n", "Traceback\nerror: no such table\n") == ("error: no such table", [])
    assert program.applied(1, "", "") == ("it said nothing", [])


def test_a_traceback_is_told_by_its_error() -> None:
    said = "Traceback (most recent call last):\n  File …\nThe above exception was the direct cause of the following exception:\n\n"
    assert (
        program.last_words(f"{said}django.db.utils.DataError: value too long\n\n  File x\n") == "django.db.utils.DataError: value too long"
    )
    assert program.last_words("starting\nstopped\n") == "stopped"


def test_answers_are_compared_with_what_the_check_expects() -> None:
    check = {"status": 200, "contains": ["password"]}
    assert program.wrong_answer(check, 200, "<input name=password>") == ""
    assert program.wrong_answer(check, 500, "") == "answered 500, not 200"
    assert program.wrong_answer(check, 200, "hello") == "the answer lacks 'password'"


def test_a_probe_that_ends_badly_is_a_problem() -> None:
    assert program.probed(0, 'noise\n{"core a.B": ""}\n', "") == {"core a.B": ""}
    assert program.probed(1, "", "ImportError: no module\n") == {"the models of the application": "ImportError: no module"}


# --- what the programs are told -------------------------------------------------------------------------------------------


def request(made: dict[str, Any] | None = None) -> dict[str, Any]:
    return f.rehearsal_request(CONTRACT, TOPOLOGY, "web-1", ["old", "new"], made or {"core": {"certificate": "PEM", "at": 5.0}}, JOBS)


def test_a_copy_listens_for_the_host_that_rehearses_alone_and_has_the_names_of_the_members() -> None:
    assert f.rehearsal_copies(CONTRACT, TOPOLOGY, "web-1") == [
        {"cluster": "core", "room": {"database": "pier", "user": "pier", "address": "10.0.0.4", "port": 15432, "client": "10.0.0.3",
                                     "names": ["db-1", "10.0.0.1", "db-2", "10.0.0.2"]}}
    ]  # fmt: skip


def test_a_port_that_does_not_exist_is_refused() -> None:
    high = topology(GROUPS, ADDRESSES, {"postgresql-core": 60000})
    with pytest.raises(Exception, match=r"the rehearsal's copy of core would listen on port 70000"):
        f.rehearsal_copies(CONTRACT, high, "web-1")


def test_every_address_of_the_platform_is_in_the_room_and_every_member_is_a_door_to_the_copy() -> None:
    told = request()
    assert told["addresses"] == sorted(ADDRESSES.values())
    assert [(copy["members"], copy["live_port"], copy["address"], copy["port"]) for copy in told["copies"]] == [
        (["10.0.0.1", "10.0.0.2"], 5432, "10.0.0.4", 15432)
    ]
    assert "secret" not in json.dumps(told).lower().replace("/secret", ""), "secrets are read by systemd alone"


def test_a_web_process_answers_its_own_checks_that_change_nothing_and_need_no_secret() -> None:
    webs = {web["name"]: web for web in request()["webs"]}
    assert [check["path"] for check in webs["web"]["checks"]] == ["/up", "/login"]
    assert [check["path"] for check in webs["admin"]["checks"]] == ["/up", "/admin/login"]
    assert webs["web"]["checks"][1]["host"] == "pier.example.org"


def test_only_django_has_a_probe() -> None:
    assert f.rehearsal_probe({"migrations": {"django": ["default"], "settings": "pier.settings"}}) == [
        "python", "-", "default", "--settings", "pier.settings"
    ]  # fmt: skip
    assert f.rehearsal_probe({"migrations": {"django": []}}) == []


# --- what came of it --------------------------------------------------------------------------------------------------------

ABOUT = {"release": "new", "current": "old", "fingerprint": "f" * 16, "data": "the backup of core of yesterday"}
SAID = {"outcome": "passed", "why": "", "seconds": 12.3, "migrations": [MIGRATION], "checks": []}
LOCK = {"table": "public.orders", "mode": "AccessExclusiveLock", "migration": "", "seconds": 12.0, "rows": 1000000}


def test_a_lock_beyond_the_limit_fails_and_names_migration_table_and_rows() -> None:
    said = {**SAID, "migrations": [{**MIGRATION, "seconds": 12.1}]}
    verdict = f.rehearsal_verdict(said, {"core": [LOCK, {**LOCK, "table": "public.small", "seconds": 0.1}]}, ABOUT, 5)
    assert verdict["outcome"] == "failed"
    assert verdict["why"] == (
        "shop.0002_more holds AccessExclusiveLock on public.orders with 1000000 rows in core for 12.0 s, in which nobody could read or "
        "write it; 5 s are allowed (migrate_lock_limit_seconds)"
    )
    assert f.rehearsal_verdict(SAID, {"core": [LOCK]}, ABOUT, 30)["outcome"] == "passed"


def test_a_lock_is_put_down_to_a_migration_only_if_no_other_took_as_long() -> None:
    def names(*migrations: dict[str, Any], **said: str) -> str:
        verdict = f.rehearsal_verdict({**SAID, "migrations": list(migrations), **said}, {"core": [LOCK]}, ABOUT, 5)
        return str(verdict["locks"][0]["migration"])

    long, short = {**MIGRATION, "seconds": 12.1}, {**MIGRATION, "name": "0003_less", "seconds": 0.1}
    assert names(long, short) == "shop.0002_more"
    assert names(long, {**long, "database": "plugins"}) == "shop.0002_more", "one migration of two databases"
    assert names(long, {**short, "seconds": 30}) == ""
    assert names(long, outcome="failed", why="the migrations fail on the copy: time-out") == "", "it may be that of the failed one"
    verdict = f.rehearsal_verdict(SAID, {"core": [{**LOCK, "migration": "shop.0003_less"}]}, ABOUT, 5)
    assert verdict["why"].startswith("shop.0003_less holds"), "its session said so"


def test_the_ledger_keeps_what_it_promises() -> None:
    entry = f.rehearsal_entry(f.rehearsal_verdict(SAID, {}, ABOUT, 5))
    assert entry == {"kind": "rehearsal", "release": "new", "current": "old", "fingerprint": "f" * 16, "outcome": "passed", "why": "",
                     "seconds": 12.3, "migrations": [MIGRATION]}  # fmt: skip


def test_a_rehearsal_that_could_not_be_held_is_no_pass_and_says_what_to_type() -> None:
    why = f.rehearsal_problem([{"rc": 0}, {"failed": True, "stderr": "Backup: no room.\n"}], "Restore")
    verdict = f.rehearsal_verdict({"why": why}, {}, ABOUT, 5)
    assert (verdict["outcome"], verdict["held"]) == ("failed", False)
    refusal = f.rehearsal_refusal(verdict, "inventories/x")
    assert "it could not be held: Restore: Backup: no room" in refusal
    assert refusal.endswith("ansible-playbook -i inventories/x playbooks/rehearse.yml -e release=new")


def test_the_text_tells_times_checks_and_what_was_not_judged() -> None:
    rows = [
        {"release": "old", "when": "before", "check": "GET /ready", "problem": "answered 503, not 200", "counts": False},
        {"release": "old", "when": "after", "check": "GET /ready", "problem": "answered 503, not 200", "counts": False},
        {"release": "old", "when": "after", "check": "core a.B", "problem": "column x does not exist", "counts": True},
        {"release": "old", "when": "after", "check": "GET /", "problem": "", "counts": True},
    ]
    text = f.rehearsal_text(
        f.rehearsal_verdict({**SAID, "outcome": "failed", "why": "broken", "checks": rows}, {"core": [LOCK]}, ABOUT, 30)
    )
    assert "rehearsal of new on the backup of core of yesterday: failed (12 s)" in text
    assert "1.50 s  core: shop.0002_more" in text
    assert "current release old on the migrated copy: 1 checks as they should be, 1 not" in text
    assert "core a.B: column x does not exist" in text
    assert "not judged, because the current release fails it on an untouched copy, too: GET /ready" in text
    assert f.rehearsal_refusal({**ABOUT, "held": True, "outcome": "passed", "why": ""}, "x") == ""


# --- the room -----------------------------------------------------------------------------------------------------------------


def test_a_command_enters_the_room_and_keeps_its_walls(tmp_path: Path) -> None:
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/tool").touch(mode=0o755)
    settings = {"user": "u", "group": "g", "environment_files": ["/etc/e"], "environment": {"A": "1"}, "properties": ["PrivateTmp=yes"]}
    room = {"unit": "x.service", "environment": {"A": "2"}, "properties": ["TemporaryFileSystem=/run"]}
    argv = run.systemd_run(settings, tmp_path, ["tool"], 60, room)
    assert "--unit=x.service" in argv
    assert "--setenv=A=2" in argv
    assert argv.index("--property=PrivateTmp=yes") < argv.index("--property=TemporaryFileSystem=/run") < argv.index("--")
    assert "--unit=x.service" not in run.systemd_run(settings, tmp_path, ["tool"], 60)


def test_the_room_hides_what_is_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "PLACE", tmp_path)
    stage = program.Stage(request(), type("FakeRoom", (), {"path": "/proc/1/fd/9"}))
    stage.place.mkdir()
    web = {web["name"]: web for web in request()["webs"]}["web"]
    described = json.loads(stage.description(web).read_text())
    assert described["unit"] == "evenkeel-rehearsal-web.service"
    assert set(described["properties"]) >= {
        "NetworkNamespacePath=/proc/1/fd/9",
        "TemporaryFileSystem=/run",
        f"BindPaths={tmp_path}/pier/state:/var/lib/pier",
        f"BindPaths={tmp_path}/pier/log:/var/log/pier",
        f"BindPaths={tmp_path}/pier/run:/run/pier",
        f"BindReadOnlyPaths={tmp_path}/pier/ca.crt:/etc/ca.crt",
        "LoadCredential=key:/etc/key",
    }
    assert program.in_place("{credentials}/key", "x.service") == "/run/credentials/x.service/key"


@pytest.fixture
def echo() -> tuple[str, int]:
    """A server on this host's loopback that gives back what it gets, in place of a copy."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            client, _ = listener.accept()
            with client:
                while data := client.recv(1024):
                    client.sendall(data)

    threading.Thread(target=answer, daemon=True).start()
    address: tuple[str, int] = listener.getsockname()
    return address


ROOM = """
import sys
sys.path.insert(0, sys.argv[1])
import rehearse, socket, json
copy = ("127.0.0.1", int(sys.argv[2]))
room = rehearse.Room(["10.99.0.1", "10.99.0.2"])
room.door("10.99.0.1", 5432, copy)
said = {}
def tried(name, call):
    try:
        said[name] = call()
    except OSError as error:
        said[name] = type(error).__name__
def through():
    with room.connect("10.99.0.1", 5432) as link:
        link.sendall(b"hello")
        return link.recv(16).decode()
tried("door", through)
tried("other port", lambda: room.connect("10.99.0.1", 6379) and "open")
tried("other address", lambda: room.connect("10.99.0.2", 5432) and "open")
tried("the copy itself", lambda: room.connect(*copy) and "open")
tried("outside", lambda: room.connect("192.0.2.1", 80) and "open")
with socket.create_connection(copy) as link:
    said["back home"] = "open"
print(json.dumps(said))
"""


@pytest.mark.skipif(os.geteuid() != 0 or subprocess.run(["unshare", "-n", "true"], check=False).returncode != 0, reason="needs root")
def test_from_the_room_only_the_door_is_reached(echo: tuple[str, int]) -> None:
    """The very network of the room: its door leads out, and nothing else does, not even to this host's own loopback."""
    done = subprocess.run(
        [sys.executable, "-c", ROOM, str(ROOT / "roles/process/files"), str(echo[1])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("door") == "hello"
    assert said.pop("back home") == "open"
    assert set(said.values()) <= {"ConnectionRefusedError", "OSError"}, said


def test_a_door_whose_copy_is_gone_closes() -> None:
    gone = socket.create_server(("127.0.0.1", 0))
    dead = gone.getsockname()
    gone.close()
    listener = socket.create_server(("127.0.0.1", 0))
    serve: Callable[..., None] = program.serve
    threading.Thread(target=serve, args=(listener, dead), daemon=True).start()
    with socket.create_connection(listener.getsockname(), timeout=5) as link:
        assert link.recv(10) == b""


# --- the probe, on a real PostgreSQL -------------------------------------------------------------------------------------

MODELS = """
from django.db import models
class Shelf(models.Model):
    label = models.CharField(max_length=20)
class Item(models.Model):
    name = models.CharField(max_length=20)
    code = models.CharField(max_length=20, unique=True)
    shelf = models.ForeignKey(Shelf, models.CASCADE)
"""
ITEMS = (
    'CreateModel("Shelf", [("id", models.BigAutoField(primary_key=True)), ("label", models.CharField(max_length=20))]), '
    'CreateModel("Item", [("id", models.BigAutoField(primary_key=True)), ("name", models.CharField(max_length=20)), '
    '("code", models.CharField(max_length=20, unique=True)), ("shelf", models.ForeignKey("shop.Shelf", models.CASCADE))])'
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with cluster() as server:
        world = World(tmp_path_factory.mktemp("shop"), server, "shop_probed")
        (world.folder / "shop/models.py").write_text(MODELS)
        world.migration("0001_initial", ITEMS)
        world.run("apply", "core")
        with world.session() as session:
            session.execute(
                "INSERT INTO shop_shelf (label) VALUES ('top'); INSERT INTO shop_item (name, code, shelf_id) VALUES ('a', 'b', 1)"
            )
        yield world


@pytest.mark.parametrize(
    ("change", "item", "shelf"),
    [
        ("SELECT 1", "", ""),
        ("ALTER TABLE shop_item ADD COLUMN note text", "", ""),
        ("ALTER TABLE shop_item ADD COLUMN note text NOT NULL DEFAULT ''", "", ""),
        ("ALTER TABLE shop_item DROP COLUMN name", "reading fails: column shop_item.name does not exist", ""),
        ("ALTER TABLE shop_item RENAME TO shop_thing", 'reading fails: relation "shop_item" does not exist', ""),
        (
            "ALTER TABLE shop_item ADD COLUMN kind text NOT NULL DEFAULT 'x'; ALTER TABLE shop_item ALTER COLUMN kind DROP DEFAULT",
            "new rows must have a value in kind, which this release does not write",
            "",
        ),
        (
            "DELETE FROM shop_item; ALTER TABLE shop_item ADD COLUMN kind text NOT NULL",
            "new rows must have a value in kind, which this release does not write",
            "",
        ),
        (
            "ALTER TABLE shop_shelf ADD CONSTRAINT upper CHECK (label = upper(label)) NOT VALID",
            "",
            'writing fails: new row for relation "shop_shelf" violates check constraint "upper"',
        ),
    ],
)
def test_the_probe_finds_what_a_release_cannot_work_with(shop: World, change: str, item: str, shelf: str) -> None:
    name = f"shop_{abs(hash(change))}"
    with shop.session("postgres", "super") as session:
        session.execute(f"CREATE DATABASE {name} OWNER shop TEMPLATE {shop.name}")
    with shop.session(name) as session:
        session.execute(change)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(shop.folder),
        "DJANGO_SETTINGS_MODULE": "project",
        "SERVER": str(shop.server),
    }
    done = subprocess.run(
        [str(PYTHON), "-", "core"], input=(ROOT / "playbooks/files/django_probe.py").read_text(), cwd=shop.folder,
        env={**environment, "NAME": name, "APPS": "shop"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert program.probed(done.returncode, done.stdout, done.stderr) == {"core shop.Item": item, "core shop.Shelf": shelf}
    with shop.session(name) as session:
        assert session.execute("SELECT count(*) FROM shop_shelf").fetchone() == (1,), "what it wrote, it took back"

"""Pruning: what goes, what stays, and that a dry run says exactly what the run then does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, load

import filter_plugins.processes as processes
from filter_plugins.app_contract import ContractError, app_contract

prune = load(ROOT / "library/prune.py", "evk_prune")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with seven releases, of which the oldest runs, an interrupted one, a journal, packages and notes."""
    releases = tmp_path / "shop/releases"
    for number in range(7):
        (releases / f"1.{number}").mkdir(parents=True)
        (releases / f"1.{number}/wheel").write_bytes(b"x" * 50_000)
        os.utime(releases / f"1.{number}", (number, number))
    (releases / ".partial-x").mkdir()
    (tmp_path / "shop/current").symlink_to("releases/1.0")
    (tmp_path / "journal/id").mkdir(parents=True)
    for number, name in enumerate(("system@1.journal", "system@2.journal~", "system.journal")):
        (tmp_path / "journal/id" / name).write_bytes(b"x" * (1 << 20))
        os.utime(tmp_path / "journal/id" / name, (number, number))
    (tmp_path / "packages/partial").mkdir(parents=True)
    for name in ("a.deb", "partial/b.deb", "lock"):
        (tmp_path / "packages" / name).write_text("x")
    (tmp_path / "failures").mkdir()
    for unit in ("here.service", "gone.service"):
        (tmp_path / "failures" / unit).write_text("has failed")
    for name in ("JOURNAL", "PACKAGES", "FAILURES"):
        monkeypatch.setattr(prune, name, tmp_path / name.lower())
    monkeypatch.setattr(prune, "unit_exists", lambda unit: unit == "here.service")
    return tmp_path


class Ended(Exception):
    """The module has ended; the arguments are its result."""


def run(monkeypatch: pytest.MonkeyPatch, check_mode: bool = False, **params: Any) -> dict[str, Any]:
    """The module's result."""

    class Module:
        def __init__(self, argument_spec: dict[str, Any], supports_check_mode: bool) -> None:
            assert supports_check_mode
            self.check_mode = check_mode
            self.params = {name: option.get("default") for name, option in argument_spec.items()} | params

        def exit_json(self, **result: Any) -> None:
            raise Ended(result)

        def fail_json(self, **result: Any) -> None:
            raise Ended({**result, "failed": True})

    monkeypatch.setattr(prune, "AnsibleModule", Module)
    with pytest.raises(Ended) as ended:
        prune.main()
    result: dict[str, Any] = ended.value.args[0]
    return result


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_dry_run_removes_nothing_and_the_run_exactly_what_it_said(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"releases": str(host / "shop/releases"), "releases_kept": 5, "journal_max_mb": 2, "packages": True}
    before = everything(host)
    told = run(monkeypatch, check_mode=True, **asked)
    assert everything(host) == before
    done = run(monkeypatch, **asked)
    assert [line.replace("would remove", "removed").replace("would free", "freed") for line in told["lines"]] == done["lines"]
    assert (told["changed"], told["freed_bytes"], told["releases"]) == (True, done["freed_bytes"], done["releases"])
    gone = {name for name in before - everything(host) if not name.endswith("/wheel")}
    assert gone == {
        "shop/releases/1.1", "shop/releases/.partial-x", "journal/id/system@1.journal", "packages/a.deb", "packages/partial/b.deb",
        "failures/gone.service",
    }  # fmt: skip
    assert done["releases"] == ["1.0", "1.2", "1.3", "1.4", "1.5", "1.6"]
    assert done["freed_bytes"] > 1 << 20
    again = run(monkeypatch, **asked)
    assert (again["changed"], again["freed_bytes"]) == (False, 0)


def test_the_release_that_runs_stays_however_old_it_is(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, releases=str(host / "shop/releases"), releases_kept=1)
    assert result["releases"] == ["1.0", "1.6"]
    assert (host / "shop/current/wheel").exists()


def test_the_release_to_go_back_to_stays_however_old_it_is(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, releases=str(host / "shop/releases"), releases_kept=1, releases_protected=["1.2"])
    assert result["releases"] == ["1.0", "1.2", "1.6"]
    all_of_them = run(monkeypatch, releases=str(host / "shop/releases"))
    assert (all_of_them["releases"], all_of_them["lines"][0].split("; ")[1]) == (result["releases"], "removed nothing")


def test_archives_of_releases_that_hosts_carry_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        for suffix in (".tar", ".tar.sig", ".audit.json"):
            (tmp_path / f"1.{number}{suffix}").write_text("x")
            os.utime(tmp_path / f"1.{number}{suffix}", (number, number))
    run(monkeypatch, archives=str(tmp_path), archives_protected=["1.0"], releases_kept=2)
    assert everything(tmp_path) == {f"1.{number}{suffix}" for number in (0, 2, 3) for suffix in (".tar", ".tar.sig", ".audit.json")}


def test_the_application_prunes_its_own_and_its_failure_is_told(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; print('first'); print('unchanged carts: none is old' if '--dry-run' in sys.argv else 'changed carts: removed 2')"
    command = [sys.executable, "-c", code]
    carts = {"name": "carts", "command": command, "dry_run": [*command, "--dry-run"]}
    bad = {"name": "bad", "command": [sys.executable, "-c", "import sys; sys.exit('no database')"], "dry_run": ["true"]}
    releases = {"releases": str(host / "shop/releases"), "releases_kept": 9}
    (host / "failures/gone.service").unlink()
    (host / "shop/releases/.partial-x").rmdir()
    told = run(monkeypatch, check_mode=True, commands=[carts], **releases)
    assert ("carts      none is old" in told["lines"], told["changed"]) == (True, False)
    done = run(monkeypatch, commands=[carts, bad], **releases)
    assert ("carts      removed 2" in done["lines"], done["changed"]) == (True, True)
    assert (done["failed"], done["msg"]) == (True, "bad: no database")
    (host / "shop/current").unlink()
    assert not run(monkeypatch, commands=[bad], **releases).get("failed"), "nothing is deployed yet"


CONTRACT: dict[str, Any] = {
    "name": "shop",
    "install": {"project": ".", "lock": "lock"},
    "processes": {"sweep": {"kind": "timer", "hosts": "worker", "command": ["x"], "on_calendar": "daily"}},
}
GROUPS = {"worker": ["w1", "w2"], "all": ["w1", "w2"]}


def test_the_contract_names_commands_with_their_dry_run() -> None:
    carts = {"name": "carts", "hosts": "worker", "once": True, "command": ["shop", "prune", 3], "dry_run": ["-n"]}
    files = {"name": "files", "hosts": "worker", "command": ["shop", "files"], "dry_run": ["-n"]}
    contract = app_contract({**CONTRACT, "prune": [carts, files]}, GROUPS)
    assert [entry["name"] for entry in processes.contract_prune(contract, "w2")] == ["files"]
    assert processes.contract_prune(contract, "w1")[0] == {
        "name": "carts",
        "command": ["/usr/local/sbin/shop-run", "shop", "prune", "3"],
        "dry_run": ["/usr/local/sbin/shop-run", "shop", "prune", "3", "-n"],
    }
    for entries, sentence in (
        ([{**carts, "dry_run": []}], "app.prune.carts.dry_run: is empty"),
        ([{key: value for key, value in carts.items() if key != "dry_run"}], "app.prune.carts.dry_run: is missing"),
        ([carts, carts], "app.prune.carts: two entries have this name"),
        ([{**carts, "hosts": "wokrer"}], 'app.prune.carts.hosts: the inventory has no group "wokrer", did you mean worker?'),
    ):
        with pytest.raises(ContractError, match=sentence.replace("?", r"\?")):
            app_contract({**CONTRACT, "prune": entries}, GROUPS)


def test_the_module_runs_as_ansible_runs_it(tmp_path: Path) -> None:
    """Its arguments are as documented; here it finds nothing to do."""
    words = ["localhost", "-i", "localhost,", "-c", "local", "-m", "prune", "--check", "-a", json.dumps({"archives": str(tmp_path)})]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    done = subprocess.run(["ansible", *words], cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert "changed: false" in done.stdout, done.stdout + done.stderr

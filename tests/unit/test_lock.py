"""The platform's lock: one run at a time, an ended run of the same person is taken over, everything else is a person's decision."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.plugins.action import ActionBase
from programs import ROOT, load

import filter_plugins.ledger as ledger

module = load(ROOT / "library/platform_lock.py", "evk_platform_lock")
plugin = load(ROOT / "action_plugins/platform_lock.py", "evk_platform_lock_action")
lock = plugin.this_process.__globals__


class Controller:
    """A person at a controller, who works on the lock in a file."""

    def __init__(self, path: Path, who: str, monkeypatch: pytest.MonkeyPatch, process: dict[str, Any] | None = None) -> None:
        self.path, self.who, self.monkeypatch = path, who, monkeypatch
        self.process = lock["this_process"]() if process is None else process

    def __call__(self, state: str, name: str = "", check_mode: bool = False, **args: Any) -> dict[str, Any]:
        self.monkeypatch.setattr(plugin, "whoami", lambda: self.who)
        self.monkeypatch.setattr(plugin, "this_process", lambda: self.process)
        self.monkeypatch.setattr(ActionBase, "run", lambda *_: {})
        action = object.__new__(plugin.ActionModule)
        named = {"id": name, "run": f"deploy-{name}", "purpose": f"deploy of release {name}"} if name else {}
        action._task = SimpleNamespace(args={"state": state, "path": str(self.path), **named, **args}, check_mode=check_mode)
        defaults = {key: option.get("default") for key, option in module.ARGUMENT_SPEC.items()}
        action._execute_module = lambda _name, module_args, task_vars: module.work({**defaults, **module_args}, check_mode=check_mode)
        result: dict[str, Any] = action.run()
        return result


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state/lock.json"


def ended_process() -> dict[str, Any]:
    """A process of this machine that is gone."""
    with subprocess.Popen(["true"]) as child:
        pass
    return {**lock["this_process"](), "pid": child.pid, "started": 1}


def test_one_at_a_time_and_given_back_by_its_owner_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, bob = Controller(path, "alice@a", monkeypatch), Controller(path, "bob@b", monkeypatch, {"machine": "other", "pid": 7})
    took = alice("held", "a1")
    assert (took["taken"], took["refused"], took["resumed"], took["note"], took["lock"]["who"]) == (True, "", {}, "", "alice@a")
    assert path.stat().st_mode & 0o777 == 0o640
    again = alice("held", "a1")
    assert (again["taken"], again["changed"], again["refused"]) == (False, False, "")
    refused = bob("held", "b1")
    assert (refused["taken"], refused["changed"]) == (False, False)
    for part in ("deploy of release a1 (deploy-a1) by alice@a holds the lock since", " seconds ago; until ", "at the longest"):
        assert part in refused["refused"]
    note = bob("released", "b1")["note"]
    assert note == "this run does not have the lock any more: deploy of release a1 (deploy-a1) by alice@a has taken it over"
    assert alice("read")["lock"]["id"] == "a1"
    assert alice("released", "a1")["changed"] and not alice("released", "a1")["changed"]
    assert (path.exists(), bob("held", "b1")["taken"]) == (False, True)


def test_a_run_that_still_works_on_this_controller_is_never_taken_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alice = Controller(path, "alice@a", monkeypatch)
    alice("held", "a1")
    for told in (alice("held", "a2"), alice("held", "a2", take_over="a1")):
        assert not told["taken"]
        pid = alice.process["pid"]
        assert f"It still runs here as process {pid}: wait for it, or end it (kill {pid})" in told["refused"]
        assert "take_over" not in told["refused"]


def test_an_ended_run_of_the_same_person_is_taken_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Controller(path, "alice@a", monkeypatch, ended_process())("held", "a1")
    other = Controller(path, "bob@a", monkeypatch)("held", "b1")
    assert "Its process on this controller has ended" in other["refused"] and "add -e take_over=a1" in other["refused"]
    told = Controller(path, "alice@a", monkeypatch)("held", "a2")
    assert (told["taken"], told["changed"], told["resumed"]) == (True, True, {"run": "deploy-a1", "purpose": "deploy of release a1"})
    assert told["note"].startswith("An earlier run of yours ended without its last words: its lock is taken over (deploy of release a1")
    assert told["lock"]["id"] == "a2"


def test_what_cannot_be_known_is_a_persons_decision(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Controller(path, "alice@a", monkeypatch, {**lock["this_process"](), "machine": "other", "pid": 7})("held", "a1")
    alice = Controller(path, "alice@a", monkeypatch)
    assert "only its controller knows (process 7)" in alice("held", "a2")["refused"]
    wrong = alice("held", "a2", take_over="zz")["refused"]
    assert wrong.startswith("The lock zz is not there any more; the one held now is a1: deploy of release a1")
    told = Controller(path, "bob@b", monkeypatch)("held", "b1", take_over="a1")
    assert (told["taken"], told["resumed"]["run"]) == (True, "deploy-a1")
    assert told["note"].startswith("The lock of alice@a is taken over (deploy of release a1, deploy-a1, ")


def test_a_name_that_is_wrong_does_not_take_over_an_ended_run_either(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Controller(path, "alice@a", monkeypatch, ended_process())("held", "a1")
    assert not Controller(path, "alice@a", monkeypatch)("held", "a2", take_over="zz")["taken"]


def test_an_expired_lock_is_told_as_such_and_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Controller(path, "alice@a", monkeypatch, {})("held", "a1", hours=-1)
    told = Controller(path, "bob@b", monkeypatch)("held", "b1")
    assert not told["taken"]
    assert "it has expired at" in told["refused"]


def test_check_mode_takes_nothing_and_tells(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bob = Controller(path, "bob@b", monkeypatch)
    assert (bob("held", "b1", check_mode=True)["note"], path.parent.exists()) == ("", False)
    Controller(path, "alice@a", monkeypatch, {})("held", "a1")
    told = bob("held", "b1", check_mode=True)
    assert (told["refused"], told["taken"]) == ("", False)
    assert "alice@a holds the lock" in told["note"]
    assert bob("read")["lock"]["id"] == "a1"


def test_a_file_that_is_no_lock_is_not_overwritten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir()
    for text in ("", "[]", '{"id": "a1"}'):
        path.write_text(text)
        with pytest.raises(module.LockError, match="is no lock of this suite"):
            Controller(path, "bob@b", monkeypatch)("held", "b1")
        assert path.read_text() == text


def test_the_process_is_the_one_that_made_the_workers() -> None:
    """As Ansible does: the playbook forks workers, one of which asks."""
    utils = lock["__file__"]
    code = (
        "import importlib.util, os, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests/unit')!r})\n"
        "import conftest\n"
        f"spec = importlib.util.spec_from_file_location('l', {utils!r})\n"
        "l = importlib.util.module_from_spec(spec); spec.loader.exec_module(l)\n"
        "own = os.getpid()\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        "        print(own == l.this_process()['pid'], l.life(l.this_process()), flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait(); os._exit(0)\n"
        "os.wait()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True runs\n", done.stderr


def test_life() -> None:
    here = lock["this_process"]()
    life = lock["life"]
    assert life(here) == "runs"
    assert life({**here, "started": here["started"] + 1}) == "gone", "the number went to another process"
    assert life({**here, "boot": "before"}) == "gone"
    assert life({**here, "namespace": "pid:[1]"}) == "unknown"
    assert life({**here, "machine": "x"}) == "unknown"
    assert life({}) == "unknown"
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    started = int(lock["_stat"](child.pid, Path("/proc"))[19])
    assert life({**here, "pid": child.pid, "started": started}) == "gone", "a zombie does nothing any more"
    child.wait()


def test_ages() -> None:
    now = datetime(2026, 11, 23, tzinfo=UTC)
    for seconds, text in ((-3, "0 seconds"), (90, "90 seconds"), (720, "12 minutes"), (7200, "2 hours"), (200000, "2 days")):
        assert lock["ago"]((now - timedelta(seconds=seconds)).isoformat(), now) == f"{text} ago"


def answer(item: str, **told: Any) -> dict[str, Any]:
    return {"item": item, "lock": {"id": "a"}, "refused": "", "taken": True, "resumed": {}, "note": "", "who": "x@y", **told}


DOWN = {"item": "b1", "unreachable": True, "msg": "no route"}


def test_what_several_hosts_say_is_one_sentence() -> None:
    assert ledger.lock_judged([answer("p1"), answer("p2")]) == {
        "problem": "", "notes": [], "taken": ["p1", "p2"], "resumed": {}, "who": "x@y",
    }  # fmt: skip
    told = ledger.lock_judged([answer("p1"), answer("p2", refused="held", taken=False)])
    assert (told["problem"], told["taken"]) == ("held", ["p1"])
    told = ledger.lock_judged([answer("p1"), DOWN])
    assert (told["problem"], told["notes"]) == ("", ["No answer from b1: the lock counts on p1 alone"])
    assert ledger.lock_judged([DOWN])["problem"] == "Whether another run is at work cannot be known: no answer from b1"
    assert ledger.lock_judged([answer("p1", refused="held", taken=False), {"item": "p2", "skipped": True}])["problem"] == "held"
    assert ledger.lock_judged([answer("p1"), {"item": "p2", "msg": "no lock."}])["problem"] == "p2: no lock"
    was = {"run": "deploy-z", "purpose": "z"}
    told = ledger.lock_judged([answer("p1", resumed=was, note="taken over, 2 s"), answer("p2", resumed=was, note="taken over, 3 s")])
    assert (told["notes"], told["resumed"]) == (["taken over, 2 s"], was)


def test_what_giving_back_tells() -> None:
    results = [DOWN, {"item": "p1", "msg": "gone"}, answer("p2", note="lost"), answer("p3")]
    assert ledger.unlock_notes(results) == [
        "b1 does not answer: if it holds the lock, your next run takes it over",
        "p1: the lock was not given back: gone",
        "p2: lost",
    ]

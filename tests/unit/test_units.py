"""The `units` module: what it refuses, and when a unit has to be started again."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible.module_utils import evenkeel_units
from ansible.module_utils.evenkeel_units import Live, Record, Trigger, Wanted

CONF = "/etc/etcd/etcd.yml"
RUNNING = Live(load="loaded", active="active", sub="running", file_state="enabled", invocation="one", started_at=1000.0)
ABSENT = Trigger("absent")


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "etcd.service", "state": "started", "enabled": True, "restart_on": [CONF]},
        {"name": "patroni@core.service", "drop_in": {"template": "x.j2"}, "vars": {"a": 1}, "state": "started"},
        {"name": "vacuum@.timer", "content": "[Timer]\n"},
        {"name": "a-b\\x2dc.mount", "masked": False},
        {"name": "web.socket", "template": "w.j2", "state": "started", "requires_path": "/opt/app/current"},
        {"name": "old.service", "state": "absent"},
        {"name": "apt-daily.timer", "masked": True, "state": "stopped"},
    ],
)
def test_accepts(entry: dict[str, Any]) -> None:
    assert evenkeel_units.check_units([entry]) == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("etcd", "must be a mapping"),
        ({"state": "started"}, "needs name"),
        ({"name": "etcd", "state": "started"}, "needs name, a whole unit name"),
        ({"name": "-H.service;x", "state": "started"}, "needs name"),
        ({"name": "../x.service", "state": "started"}, "needs name"),
        ({"name": "a.service"}, "says nothing about the unit"),
        ({"name": "a.service", "state": "restarted"}, "state must be one of started, stopped, absent"),
        ({"name": "a.service", "enabled": "yes"}, "enabled must be true or false"),
        ({"name": "a.service", "state": "started", "restart": "no"}, "restart must be true or false"),
        ({"name": "a.service", "enabled": True, "restart": False}, "restart has no meaning without state: started"),
        ({"name": "a.service", "templates": "x"}, "unknown key 'templates'"),
        ({"name": "a.service", "template": "x", "content": "y"}, "has template and content"),
        ({"name": "a.service", "content": " "}, "content must be a non-empty text"),
        ({"name": "a.service", "drop_in": "x"}, "drop_in must be a mapping"),
        ({"name": "a.service", "drop_in": {}}, "drop_in needs template or content"),
        ({"name": "a.service", "drop_in": {"content": "x", "name": "y"}}, "drop_in: unknown key 'name'"),
        ({"name": "a.service", "content": "x", "vars": {"a": 1}}, "vars is only for template"),
        ({"name": "a.service", "state": "started", "restart_on": CONF}, "restart_on must be a list"),
        ({"name": "a.service", "state": "started", "restart_on": ["etc"]}, "'etc' is not an absolute path"),
        ({"name": "a.service", "enabled": True, "restart_on": [CONF]}, "no meaning without state: started"),
        ({"name": "a.service", "state": "absent", "enabled": False}, "no meaning with state: absent"),
        ({"name": "a@.service", "state": "started"}, "a template unit cannot run"),
        ({"name": "a@.service", "content": "x", "enabled": True}, "a template unit cannot be enabled"),
        ({"name": "a.service", "masked": True, "state": "started"}, "neither started nor enabled"),
        ({"name": "a.service", "masked": True, "content": "x"}, "a masked unit has no content"),
    ],
)
def test_refuses(entry: Any, message: str) -> None:
    problems = evenkeel_units.check_units([entry])
    assert any(message in problem for problem in problems), problems


def test_the_same_unit_twice() -> None:
    entry = {"name": "a.service", "state": "started"}
    assert evenkeel_units.check_units([entry, entry]) == ["unit 2 (a.service): the same unit as entry 1"]


def test_definition_of_an_instance_includes_its_template() -> None:
    assert evenkeel_units.definition_paths("p@core.service") == [
        "/etc/systemd/system/p@.service",
        "/etc/systemd/system/p@.service.d/evenkeel.conf",
        "/etc/systemd/system/p@core.service",
        "/etc/systemd/system/p@core.service.d/evenkeel.conf",
    ]
    assert len(evenkeel_units.definition_paths("etcd.service")) == 2


def test_reads_systemctl_show() -> None:
    output = (
        "Type=notify\nNRestarts=2\nResult=success\nExecMainCode=1\nExecMainStatus=3\nLoadState=loaded\n"
        "ActiveState=active\nSubState=running\nUnitFileState=enabled\nNeedDaemonReload=yes\nCanReload=yes\n"
        "InvocationID=abc\nInactiveExitTimestamp=Sat 2026-11-21 21:46:42.250000 UTC\nConditionResult=yes\n"
        "\n"
        "LoadState=not-found\nActiveState=inactive\nSubState=dead\nInactiveExitTimestamp=\nConditionResult=no\n"
    )
    live = evenkeel_units.parse_show(output, ["a.service", "b.timer"])
    first, second = live["a.service"], live["b.timer"]
    assert (first.known, first.running, first.enabled, first.needs_reload, first.can_reload) == (True,) * 5
    assert (first.restarts, first.started_at % 60) == (2, 42.25)
    assert (second.known, second.running, second.enabled, second.started_at) == (False, False, False, 0.0)
    with pytest.raises(ValueError, match="1 of 2"):
        evenkeel_units.parse_show("LoadState=loaded\n", ["a.service", "b.service"])


def test_waiting_for_an_automatic_restart_is_not_running() -> None:
    assert not dataclasses.replace(RUNNING, active="activating", sub="auto-restart").running
    assert dataclasses.replace(RUNNING, active="activating", sub="start").running


# When a unit has to be started again


def triggers(**digests: str) -> dict[str, Trigger]:
    """The definition is absent, the configuration as given and older than the process."""
    found = dict.fromkeys(evenkeel_units.definition_paths("etcd.service"), ABSENT)
    found[CONF] = Trigger(digests.get("conf", "h1"), 900.0)
    if "unit" in digests:
        found["/etc/systemd/system/etcd.service"] = Trigger(digests["unit"], 900.0)
    return found


def plan(
    live: Live = RUNNING,
    record: Record | None = None,
    now: dict[str, Trigger] | None = None,
    *,
    changed_files: set[str] | None = None,
    definition_changes: bool = False,
    path_exists: bool = True,
    **wanted: Any,
) -> evenkeel_units.Plan:
    unit = Wanted(**{"name": "etcd.service", "state": "started", "restart_on": (CONF,), **wanted})
    return evenkeel_units.plan_unit(
        unit,
        live,
        now or triggers(),
        record,
        definition_changes=definition_changes,
        changed_files=changed_files or set(),
        path_exists=path_exists,
    )


SAME = Record({CONF: "h1"}, "one")


def test_nothing_to_do() -> None:
    assert not plan(record=SAME).changes


def test_changed_content_restarts() -> None:
    done = plan(record=SAME, now=triggers(conf="h2"))
    assert (done.run, done.reasons) == ("restart", [CONF])


def test_content_that_went_away_restarts() -> None:
    assert plan(record=SAME, now=triggers(conf="absent")).run == "restart"


def test_a_trigger_that_was_not_recorded_restarts() -> None:
    assert plan(record=Record({}, "one")).run == "restart"


def test_a_running_unit_never_recorded_is_restarted_once() -> None:
    assert plan(record=None).run == "restart"
    assert plan(record=None, restart_on=(), now=triggers()).run == ""
    assert plan(record=None, restart_on=(), now=triggers(unit="u")).run == "restart"


def test_definition() -> None:
    known = Record({CONF: "h1", "/etc/systemd/system/etcd.service": "u1"}, "one")
    assert plan(record=known, now=triggers(unit="u1")).run == ""
    assert plan(record=known, now=triggers(unit="u2")).run == "restart"
    assert plan(record=known, now=triggers()).run == "restart"
    assert plan(record=SAME, definition_changes=True).run == "restart"
    assert plan(record=SAME, definition_changes=True, reload_on=(CONF,), restart_on=()).run == "restart"


def test_a_process_that_started_later_has_seen_older_files() -> None:
    """After a reboot or a crash the record speaks of another process."""
    other = dataclasses.replace(RUNNING, invocation="two")
    assert plan(other, SAME).run == ""
    assert plan(other, SAME, triggers(conf="h2")).run == "", "the file is older than the process"
    newer = {**triggers(), CONF: Trigger("h1", 1000.0)}
    assert plan(other, SAME, newer).run == "restart", "put right by the files module after the process had started"
    assert plan(RUNNING, SAME, newer).run == "", "the same process has seen this content"


def test_a_process_that_started_later_was_started_by_the_definition_of_then() -> None:
    other = dataclasses.replace(RUNNING, invocation="two")
    known = Record({CONF: "h1", "/etc/systemd/system/etcd.service": "u1"}, "one")
    assert plan(other, known, triggers(unit="u2")).run == "", "an operator or a crash restarted it after the definition was written"
    assert plan(other, known, triggers()).run == "", "the definition went away before"
    assert plan(dataclasses.replace(other, needs_reload=True), known, triggers(unit="u2")).run == "restart", "systemd had not read it"
    newer = {**triggers(), "/etc/systemd/system/etcd.service": Trigger("u2", 1000.0)}
    assert plan(other, known, newer).run == "restart"


def test_a_restart_that_others_make_is_due_until_it_is_made() -> None:
    able = dataclasses.replace(RUNNING, can_reload=True)
    unit = "/etc/systemd/system/etcd.service"
    done = plan(able, SAME, triggers(conf="h2"), restart=False)
    assert (done.run, done.unseen, done.changes) == ("", [CONF], False)
    done = plan(able, SAME, definition_changes=True, restart=False)
    assert (done.run, unit in done.unseen) == ("", True)
    done = plan(able, None, restart=False)
    assert (done.run, CONF in done.unseen) == ("", True)
    # a reload is made all the same
    done = plan(able, SAME, triggers(conf="h2"), definition_changes=True, restart=False, restart_on=(), reload_on=(CONF,))
    assert (done.run, done.reasons, CONF in done.unseen) == ("reload", [CONF], False)
    done = plan(RUNNING, SAME, triggers(conf="h2"), restart=False, restart_on=(), reload_on=(CONF,))
    assert (done.run, done.unseen) == ("", [CONF]), "it cannot reload"
    # what is kept then makes it due again, until another process has seen the files
    kept = Record({CONF: evenkeel_units.UNSEEN, unit: evenkeel_units.UNSEEN}, "one")
    assert plan(able, kept, triggers(unit="u"), restart=False).unseen == [unit, CONF]
    assert not plan(dataclasses.replace(able, invocation="two"), kept, triggers(unit="u"), restart=False).unseen
    # a unit that does not run is started
    assert plan(dataclasses.replace(RUNNING, active="failed"), SAME, triggers(conf="h2"), restart=False).run == "start"


def test_what_is_due_is_kept_in_the_record(library: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = library["units"]
    path = tmp_path / "records" / "etcd.json"
    monkeypatch.setattr(units, "record_path", lambda name: str(path))
    monkeypatch.setattr(units, "RECORD_DIRECTORY_ATTRIBUTES", units.Attributes(os.getuid(), os.getgid(), 0o700))
    monkeypatch.setattr(units, "RECORD_ATTRIBUTES", units.Attributes(os.getuid(), os.getgid(), 0o600))
    conf, key = tmp_path / "conf", tmp_path / "key"
    conf.write_text("a")
    key.write_text("b")
    unit = units.Unit({"name": "etcd.service", "state": "started", "restart": False, "restart_on": [str(conf), str(key)], "writes": []})
    unit.plan.unseen = [str(conf)]
    unit.record(RUNNING)
    record = units.read_record("etcd.service")
    assert record.digests[str(conf)] == evenkeel_units.UNSEEN
    assert record.digests[str(key)] == units.trigger(str(key)).digest
    assert record.invocation == RUNNING.invocation


def test_changed_files_of_the_task_before() -> None:
    assert plan(record=SAME, changed_files={CONF}).run == "restart"
    assert plan(dataclasses.replace(RUNNING, invocation="two"), SAME, changed_files={CONF}).run == "restart"
    assert plan(record=SAME, changed_files={"/etc/other"}).run == ""


def test_reload() -> None:
    able = dataclasses.replace(RUNNING, can_reload=True)
    changed = triggers(conf="h2")
    assert plan(able, SAME, changed, restart_on=(), reload_on=(CONF,)).run == "reload"
    assert plan(RUNNING, SAME, changed, restart_on=(), reload_on=(CONF,)).run == "restart", "it cannot reload"
    assert plan(able, SAME, changed, reload_on=(CONF,)).run == "restart", "restart_on is the stronger"
    assert plan(able, SAME, restart_on=(), reload_on=(CONF,)).run == ""


@pytest.mark.parametrize("active", ["inactive", "failed", "deactivating"])
def test_a_unit_that_is_down_is_started(active: str) -> None:
    assert plan(dataclasses.replace(RUNNING, active=active), SAME).run == "start"


def test_a_unit_on_its_way_up_is_waited_for() -> None:
    coming = dataclasses.replace(RUNNING, active="activating", sub="start-pre", invocation="two")
    done = plan(coming, SAME, triggers(conf="h2"))
    assert (done.run, done.join, done.changes) == ("", True, False)
    assert not plan(record=SAME).join


def test_required_path() -> None:
    done = plan(dataclasses.replace(RUNNING, active="inactive", file_state=""), path_exists=False, enabled=True)
    assert (done.run, done.waiting, done.enable) == ("", True, True)


def test_enabled_and_masked() -> None:
    fresh = Live(load="loaded")
    assert plan(fresh, enabled=True).enable
    assert not plan(RUNNING, SAME, enabled=True).enable
    assert plan(RUNNING, SAME, enabled=False).disable
    assert not plan(fresh, enabled=False).disable
    assert not plan(dataclasses.replace(RUNNING, file_state="static"), SAME, enabled=True).enable
    assert not plan(dataclasses.replace(RUNNING, file_state="static"), SAME, enabled=False).disable
    assert plan(dataclasses.replace(RUNNING, file_state="enabled-runtime"), SAME, enabled=True).enable
    masked = Live(load="masked", file_state="masked")
    assert plan(masked, masked=False).unmask
    assert plan(fresh, masked=True, state=None).mask
    assert not plan(masked, masked=True, state=None).mask


def test_stopped() -> None:
    assert plan(RUNNING, state="stopped", restart_on=()).run == "stop"
    waiting = dataclasses.replace(RUNNING, active="activating", sub="auto-restart")
    assert plan(waiting, state="stopped", restart_on=()).run == "stop"
    assert not plan(Live(), state="stopped", restart_on=()).changes


def test_install_section() -> None:
    text = b"[Unit]\nWantedBy=no\n[Install]\n# why\nWantedBy=a.target\n\n[X]\nAlias=b\n"
    assert evenkeel_units.install_section(text) == [b"WantedBy=a.target"]


def test_trigger_of_a_link_to_a_directory_follows_a_switch(library: dict[str, ModuleType], tmp_path: Path) -> None:
    units = library["units"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    current = tmp_path / "current"
    current.symlink_to("one")
    first = units.trigger(str(current))
    (tmp_path / "one/new").write_text("x")
    assert units.trigger(str(current)) == first
    current.unlink()
    current.symlink_to("two")
    assert units.trigger(str(current)).digest != first.digest
    assert units.trigger(str(tmp_path / "none")) == ABSENT
    (tmp_path / "f").write_text("x")
    assert units.trigger(str(tmp_path / "f/below")) == ABSENT


def test_damaged_record_counts_as_none(library: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = library["units"]
    monkeypatch.setattr(units, "record_path", lambda name: str(tmp_path / name))
    for text in ("", "{", "[]", '{"files": 5, "invocation": ""}', '{"files": {}}'):
        (tmp_path / "a.service").write_text(text)
        assert units.read_record("a.service") is None, text
    (tmp_path / "a.service").write_text('{"files": {"/a": "h"}, "invocation": "i"}')
    assert units.read_record("a.service") == Record({"/a": "h"}, "i")


def test_a_call_that_hangs_ends(library: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "systemctl").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    systemd = library["units"].Systemd(1)
    code, said = systemd.call("start", "--", "a.service")
    assert code == -1
    assert said == "no end after 1 s"

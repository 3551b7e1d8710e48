"""Backups and restores: which backup is chosen, what is refused, what was reached, and how it is told."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, load

from filter_plugins import backup as units
from filter_plugins import restore as r

b = load(ROOT / "roles/pgbackrest/files/backup.py", "evk_backup")
member = load(ROOT / "roles/pgbackrest/files/restore.py", "evk_restore")
watch = load(ROOT / "roles/pgbackrest/files/archive_watch.py", "evk_archive_watch")

HOUR = 3600.0


def backup(label: str, stopped: float, timeline: int = 1, lsn_stop: int = 100, kind: str = "full") -> Any:
    wal = f"{timeline:08X}" + "0000000000000001"
    return b.Backup(label, kind, "host", stopped - 60, stopped, wal, wal, lsn_stop, 30_000_000, 4_000_000, False)


def holding(
    *backups: Any, timeline: int = 1, history: tuple[tuple[int, int], ...] = (), archived: float = 10 * HOUR, name: str = "host"
) -> Any:
    return b.Holding(name, 1, backups, "15-1", f"{timeline:08X}" + "000000000000000A", history, archived)


# --- which backup a restore begins with ----------------------------------------------------------------------------------


def test_the_newest_backup_before_the_time_is_chosen() -> None:
    held = holding(backup("one", 1 * HOUR), backup("two", 3 * HOUR), backup("three", 5 * HOUR))
    chosen = b.choose("core", [held], b.Target("time", "", 4 * HOUR))
    assert chosen[1].label == "two"
    assert b.choose("core", [held], b.Target("latest"))[1].label == "three"


@pytest.mark.parametrize("at", [0.5 * HOUR, 10.1 * HOUR], ids=["before the oldest backup", "after the newest WAL"])
def test_a_time_outside_the_archive_is_refused_with_the_possible_range(at: float) -> None:
    held = holding(backup("one", 1 * HOUR))
    with pytest.raises(b.BackupError, match=r"core cannot be restored to .* from 1970-01-01 01:00:00\+00 to 1970-01-01 10:00:00\+00"):
        b.choose("core", [held], b.Target("time", "", at))


def test_a_backup_that_leads_into_an_abandoned_future_is_not_used() -> None:
    """Restored at LSN 150 of timeline 1, which became timeline 2: what was backed up on timeline 1 after that leads nowhere."""
    before, abandoned, after = backup("before", 1 * HOUR, 1, 100), backup("abandoned", 2 * HOUR, 1, 200), backup("after", 4 * HOUR, 2, 300)
    held = holding(before, abandoned, after, timeline=2, history=((1, 150),))
    assert [each.label for each in held.usable] == ["before", "after"]
    assert b.choose("core", [held], b.Target("time", "", 3 * HOUR))[1].label == "before"
    assert held.reaches == b.lsn("0/A000000")
    # and just after the restore, when the new timeline's history is archived but none of its WAL
    just = holding(before, abandoned, timeline=1, history=((1, 150),))
    assert [each.label for each in just.usable] == ["before"]
    assert just.reaches == 150, "not the end of what was abandoned"


def test_the_second_repository_is_asked_when_the_first_cannot_help() -> None:
    broken = b.Holding("host", 1, problem="it burns")
    chosen, _ = b.choose("core", [broken, holding(backup("one", 1 * HOUR), name="s3")], b.Target("latest"))
    assert chosen.repository == "s3"
    with pytest.raises(b.BackupError, match=r"no backup of core to restore from .*it burns"):
        b.choose("core", [broken], b.Target("latest"))


def test_a_restore_point_is_looked_for_from_the_oldest_backup_on() -> None:
    held = holding(backup("one", 1 * HOUR), backup("two", 3 * HOUR))
    assert b.choose("core", [held], b.Target("name", "before"))[1].label == "one"


@pytest.mark.parametrize(("text", "words"), [("2026-11-22 03:14:00", "has no zone"), ("yesterday", "is no time")])
def test_an_ambiguous_time_is_refused(text: str, words: str) -> None:
    with pytest.raises(b.BackupError, match=words):
        b.time_target(text)


def test_a_time_of_another_zone_is_told_in_utc() -> None:
    assert b.time_target("2026-11-22 06:14:00+03").text == "2026-11-22 03:14:00.000000+00"
    assert b.time_target("2026-11-22T03:14:00Z").at == b.time_target("2026-11-22 03:14:00+00").at


# --- what pgBackRest says -----------------------------------------------------------------------------------------------


def info(**status: Any) -> list[dict[str, Any]]:
    one = {"archive": {"start": "000000010000000000000003", "stop": "000000010000000000000003"}, "database": {"id": 1, "repo-key": 1}}
    one |= {
        "label": "20261122-010000F",
        "type": "full",
        "timestamp": {"start": 1.0, "stop": 5.0},
        "lsn": {"start": "0/3000028", "stop": "0/3000100"},
    }
    one |= {"info": {"size": 30, "repository": {"delta": 4}}, "error": False}
    return [
        {
            "name": "core",
            "backup": [one],
            "archive": [
                {"id": "15-1", "min": "000000010000000000000001", "max": "000000010000000000000007", "database": {"id": 1, "repo-key": 1}}
            ],
            "db": [{"id": 1, "repo-key": 1}],
            "repo": [
                {"key": 1, "status": {"code": 0, "message": "ok"}},
                {"key": 2, "status": {"code": 99, "message": "other\nhint", **status}},
            ],
        }
    ]


def test_info_is_read_for_each_repository() -> None:
    host, s3 = b.parse_info(info(), "core", {"1": "host", "2": "s3"})
    assert (host.backups[0].label, host.backups[0].lsn_stop, host.archive, host.wal_max[-1]) == ("20261122-010000F", 0x3000100, "15-1", "7")
    assert (s3.problem, s3.backups) == ("other", ())
    assert not s3.missing, "one that cannot be read is not made anew"
    assert b.parse_info([], "core", {"1": "host"})[0].missing


def test_verify_finds_bad_news_only() -> None:
    good = "stanza: core\nstatus: ok\n  archiveId: 15-1, total valid WAL: 9\n  backup: x, status: valid, total files checked: 3"
    assert b.complaints(good) == []
    bad = f"{good}\nbackup: y, status: invalid, total files checked: 3\n  missing: 0, checksum invalid: 1, size invalid: 0"
    assert len(b.complaints(bad)) == 2
    assert b.complaints("status: error") == ["status: error"]


def test_errors_are_told_in_one_line() -> None:
    assert b.last_error("2026 P00  ERROR: [056]: unable to find primary\n      HINT: x") == "unable to find primary"
    assert b.last_error("") == "it said nothing"


def test_table_shows_every_backup_and_marks_the_abandoned() -> None:
    held = holding(backup("one", 1 * HOUR), backup("two", 2 * HOUR, 1, 200), timeline=2, history=((1, 150),))
    text = b.table("core", [held, b.Holding("s3", 2, problem="it burns")])
    assert "restorable from 1970-01-01 01:00:00+00 to 1970-01-01 10:00:00+00" in text
    assert re.search(r"two  \(leads to an abandoned timeline\)", text)
    assert "core in repository s3: it burns" in text


def test_metrics_follow_the_conventions_and_are_silent_of_what_is_not_there() -> None:
    text = b.backup_metrics({"core": [holding(backup("one", 1 * HOUR)), b.Holding("s3", 2, problem="it burns")]})
    assert 'evenkeel_backup_newest_timestamp_seconds{cluster="core",repository="host",type="full"} 3600\n' in text
    assert 'evenkeel_backup_repository_usable{cluster="core",repository="s3"} 0\n' in text
    assert 'evenkeel_backup_database_bytes{cluster="core",repository="s3"}' not in text
    names = re.findall(r"^# TYPE (\S+) gauge$", text, re.MULTILINE)
    assert len(names) == len(set(names)) and all(f"# HELP {name} " in text for name in names)


# --- the drill ------------------------------------------------------------------------------------------------------------


def test_a_table_that_lost_all_its_rows_is_found_and_a_small_or_dropped_one_is_not() -> None:
    before = {"shop.public.orders": 5000, "shop.public.locks": 3, "shop.public.old": 700}
    assert b.emptied(before, {"shop.public.orders": 0, "shop.public.locks": 0}, 100) == ["shop.public.orders"]
    assert b.emptied(before, {"shop.public.orders": 1}, 100) == []


@pytest.fixture
def drill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    settings = {
        "repositories": {"1": "host", "2": "s3"},
        "clusters": {"core": {"members": ["a"]}},
        "binaries": "/x",
        "lost_rows": 100,
        "groups": [],
    }
    suite = b.Suite({**settings, "directory": str(tmp_path)})
    monkeypatch.setattr(b, "METRICS", tmp_path)
    monkeypatch.setattr(b.signal, "signal", lambda *_: None)
    monkeypatch.setattr(suite, "holdings", lambda _: [holding(backup("one", 1 * HOUR)), holding(backup("uno", 1 * HOUR), name="s3")])
    return suite


def run_drill(suite: Any, monkeypatch: pytest.MonkeyPatch, problem: str = "") -> Any:
    found = b.Drill(suite, "core")

    def check(held: Any, began: float) -> None:
        found.copy.data.mkdir(parents=True)
        if problem:
            raise b.BackupError(problem)
        found.state |= {"succeeded": began, "rows": {"t": 1}, "backup_ended": 1.0, "reached": 2.0, "restore_seconds": 3.0}

    monkeypatch.setattr(found, "check", check)
    try:
        found.run()
    finally:
        assert not found.copy.place.exists(), "it cleans up after itself, come what may"
    return found


def test_repositories_take_turns_and_a_failure_is_tried_again(drill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_drill(drill, monkeypatch).state["repository"] == "host"
    with pytest.raises(b.BackupError, match="did not restore from repository s3: it burns"):
        run_drill(drill, monkeypatch, "it burns")
    assert run_drill(drill, monkeypatch).state["repository"] == "s3"
    assert run_drill(drill, monkeypatch).state["repository"] == "host"


def test_a_failed_drill_turns_the_metric_and_keeps_the_last_success(drill: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_drill(drill, monkeypatch)
    with pytest.raises(b.BackupError):
        run_drill(drill, monkeypatch, "it burns")
    text = (tmp_path / "restore-drill-core.prom").read_text()
    assert 'evenkeel_restore_drill_success{cluster="core"} 0\n' in text
    assert "evenkeel_restore_drill_last_success_timestamp_seconds" in text


def test_a_copy_without_room_is_refused_with_the_figures(drill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(b.shutil, "disk_usage", lambda _: type("usage", (), {"free": 5_000_000}))
    with pytest.raises(b.BackupError, match=r"needs 1\.\d GB below .* and 4\.8 MB are free"):
        b.Copy(drill, "core", "drill").make(1, "one", 100_000_000, b.Target("latest"))


# --- on the database hosts -------------------------------------------------------------------------------------------------


def test_recovery_that_did_not_reach_the_target_is_found() -> None:
    target = {"kind": "time", "text": "2026-11-22 03:14:00+00", "at": b.time_target("2026-11-22 03:14:00+00").at}
    plan = {"reaches": 0x5000000}
    ended = "1\t0/50000A0\tbefore 2026-11-22 03:14:02+00"
    assert member.verdict(plan, target, ended, "2026-11-22 03:13:59+00") == ""
    assert "after the target" in member.verdict(plan, target, ended, "2026-11-22 03:14:01+00")
    assert "newest state" in member.verdict(plan, target, "1\t0/50000A0\tno recovery target specified", "")
    assert member.verdict(plan, {"kind": "latest"}, "1\t0/50000A0\tno recovery target specified", "") == ""
    assert "WAL is missing" in member.verdict(plan, {"kind": "latest"}, "1\t0/40000A0\tno recovery target specified", "")
    assert member.verdict(plan, {"kind": "name", "text": "deploy"}, '1\t0/4\tat restore point "deploy"', "") == ""


def test_a_host_remembers_which_restore_is_under_way(tmp_path: Path) -> None:
    settings = {"clusters": {"core": {"port": 5432, "data": str(tmp_path / "core/pgdata")}}, "binaries": "/x"}
    (tmp_path / "core").mkdir()
    own = member.Member("core", settings)
    own.remember(fingerprint="aaaa", step="stopped")
    again = member.Member("core", settings)
    again.mine({"fingerprint": "aaaa"})
    with pytest.raises(member.RestoreError, match=r"another restore .aaaa. of cluster core is under way"):
        again.mine({"fingerprint": "bbbb"})


def test_what_was_given_free_is_not_restored_again(tmp_path: Path) -> None:
    """The playbook was interrupted after that, and somebody may have written since."""
    (tmp_path / "core").mkdir()
    settings = {"clusters": {"core": {"port": 5432, "data": str(tmp_path / "core/pgdata")}}, "binaries": "/x"}
    plan = {"fingerprint": "aaaa"}
    own = member.Member("core", settings)
    own.remember(fingerprint="aaaa", step="recovered", kept="", result={"ended": "0/5"})
    own.forget()
    again = member.Member("core", settings)
    assert again.stop(plan) == {"step": "ended"}
    assert again.restore(plan) == {"ended": "0/5", "kept": ""}
    assert again.free(plan) == {"step": "free"}
    assert again.clear(plan) == {"step": "clear"}


def test_old_data_are_kept_where_there_is_room_and_return_when_the_restore_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "core/pgdata"
    data.mkdir(parents=True)
    (data / "old").touch()
    own = member.Member("core", {"clusters": {"core": {"port": 5432, "data": str(data)}}, "binaries": "/x"})
    own.remember(fingerprint="aaaa", step="stopped")
    monkeypatch.setattr(member.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10 * 1024**3}))
    kept = own.put_aside(1024, "aaaa")
    assert own.put_aside(1024, "aaaa") == kept == str(data.with_name("pgdata.before-aaaa"))
    data.mkdir()
    (data / "half").touch()
    own.back({"fingerprint": "aaaa"})
    assert [path.name for path in data.iterdir()] == ["old"]
    assert not own.file.exists()


def test_archive_watch_is_patient_for_a_while_and_then_says_what_it_means() -> None:
    state = watch.parse("0|8|3|1000|5|1000")
    assert watch.complaint("core", state, 1800, 900) == ""
    assert "5 segments of the WAL of cluster core wait for the archive, the oldest for 17 min" in watch.complaint("core", state, 2000, 900)
    assert watch.complaint("core", watch.parse("0|8|3|1000|0|0"), 9999, 900) == "", "an idle cluster has nothing to archive"
    assert 'evenkeel_archive_ready_segments{cluster="core"} 5\n' in watch.prometheus("core", state)


# --- what playbooks say -----------------------------------------------------------------------------------------------------


TOPOLOGY = {"postgresql": {name: {"members": [{"name": f"{name}-1"}, {"name": f"{name}-2"}], "port": 1} for name in ("core", "plugins")}}
NOTHING = dict.fromkeys(("cluster", "time", "name", "latest", "scratch", "confirm", "abort"), "")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({}, "Which cluster?"),
        ({"cluster": "cores", "latest": "yes"}, "There is no cluster cores"),
        ({"cluster": "core"}, "none is given"),
        ({"cluster": "core", "time": "t", "latest": "yes"}, "both time and latest are given"),
        ({"cluster": "core,plugins", "latest": "yes", "scratch": "yes"}, "is of one cluster"),
        ({"cluster": "core", "latest": "yes", "scratch": "no"}, "neither yes nor drop"),
        ({"cluster": "core,plugins", "time": "t"}, ""),
        ({"cluster": "core", "scratch": "drop"}, ""),
        ({"cluster": "core", "latest": "yes", "confirm": "../x"}, "is no fingerprint"),
        ({"abort": "0123456789abcdef"}, "No restore 0123456789abcdef has begun"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(typed: dict[str, str], words: str) -> None:
    problem = r.restore_request_problem({**NOTHING, **typed}, TOPOLOGY, {})
    assert words in problem and bool(words) == bool(problem)


def test_a_restore_that_has_begun_needs_its_fingerprint_only_and_one_that_has_ended_is_not_done_again() -> None:
    typed = {**NOTHING, "abort": "0123456789abcdef"}
    assert r.restore_request_problem(typed, TOPOLOGY, {"plan": {}}) == ""
    assert "ended at noon (restored)" in r.restore_request_problem(typed, TOPOLOGY, {"plan": {}, "ended": "noon", "outcome": "restored"})


def looks(leader: str = "core-1", **extra: Any) -> dict[str, list[dict[str, Any]]]:
    said = {"cluster": "core", "last_commit": "2026-11-22 04:00:00+00", "restoring": ""}
    return {host: [{**said, "role": "primary" if host == leader else "standby", **extra}] for host in ("core-1", "core-2")}


BACKUPS = {
    "target": {"kind": "time", "text": "2026-11-22 03:14:00.000000+00", "at": 1.0},
    "clusters": {
        "core": {
            "repository": "host",
            "number": 1,
            "backup": "F",
            "backup_ended": "e",
            "size": 1,
            "timeline": 1,
            "reaches": 1,
            "from": "f",
            "to": "t",
        }
    },
}


def test_the_plan_restores_where_the_cluster_leads_and_its_fingerprint_is_of_exactly_that() -> None:
    plan = r.restore_plan(BACKUPS, looks("core-2"), TOPOLOGY, "lab")
    assert (plan["clusters"]["core"]["member"], plan["clusters"]["core"]["others"]) == ("core-2", ["core-1"])
    assert plan["fingerprint"] == r.restore_plan(BACKUPS, looks("core-2", last_commit="later"), TOPOLOGY, "lab")["fingerprint"]
    others = [
        r.restore_plan(BACKUPS, looks("core-1"), TOPOLOGY, "lab"),
        r.restore_plan({**BACKUPS, "target": {"kind": "latest", "text": "", "at": 0}}, looks("core-2"), TOPOLOGY, "lab"),
        r.restore_plan(BACKUPS, looks("core-2"), TOPOLOGY, "production"),
    ]
    assert len({plan["fingerprint"], *(other["fingerprint"] for other in others)}) == 4
    assert "confirm=abc is of another plan" in r.restore_plan_problem(plan, looks("core-2"), "abc")
    assert r.restore_plan_problem(plan, looks("core-2"), plan["fingerprint"]) == ""
    assert "a restore is under way (dead)" in r.restore_plan_problem(plan, looks("core-2", restoring="dead"), "")


def test_the_plan_says_what_will_be_lost_and_who_is_concerned() -> None:
    now = b.time_target("2026-11-22 05:14:00+00").at
    text = r.restore_plan_text(r.restore_plan(BACKUPS, {"core-1": looks()["core-1"]}, TOPOLOGY, "lab"), now)
    assert "all that was committed after it, 2 hours of work at most; the newest commit is of 2026-11-22 04:00:00+00" in text
    assert "not there   core-2" in text
    assert "The application goes on, without this cluster" in text


def test_a_member_knows_its_part_and_failures_are_told() -> None:
    plan = r.restore_plan(BACKUPS, looks(), TOPOLOGY, "lab")
    assert r.restore_members_here(plan, "core-1", "member") == r.restore_members_here(plan, "core-2", "others") == ["core"]
    assert r.restore_members_here(plan, "core-2", "member") == []
    answers = [
        {"rc": 0, "stdout": "{}"},
        {"rc": 1, "stderr": "cluster core: no\n"},
        {"skipped": True},
        {"msg": "async task did not complete"},
    ]
    assert r.restore_failures(answers) == ["cluster core: no", "async task did not complete"]
    assert r.restore_results([{"rc": 0, "stdout": json.dumps({"cluster": "core", "ended": "0/5"})}, {"skipped": True}]) == {
        "core": {"ended": "0/5"}
    }


def test_timers_are_there_for_each_cluster_and_type() -> None:
    settings = {"calendars": dict.fromkeys(("full", "diff", "incr", "drill"), "daily"), "directories": ["/r"], "files": [], "memory_mb": 1}
    started = {unit["name"] for unit in units.repository_units(["core", "plugins"], settings) if unit.get("state") == "started"}
    assert started == {"backup-repository.service", "backup-metrics.timer"} | {
        f"{name}@{cluster}.timer"
        for name in ("backup-full", "backup-diff", "backup-incr", "restore-drill")
        for cluster in ("core", "plugins")
    }
    assert units.clusters_of({"core": {"members": [{"name": "a"}]}, "plugins": {"members": [{"name": "b"}]}}, "a").keys() == {"core"}


def test_a_cluster_has_a_first_backup_begun_until_each_repository_that_can_be_read_holds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"repositories": {}, "clusters": {"a": {}, "b": {}, "c": {}, "d": {}}, "directory": "/x", "binaries": "/x", "groups": []}
    suite = b.Suite({**settings, "lost_rows": 0})
    held, silent, empty = holding(backup("one", HOUR)), b.Holding("s3", 2, problem="it burns"), holding()
    there = {"a": [held, silent], "b": [held, empty], "c": [b.Holding("host", 1, missing=True), silent], "d": [silent, silent]}
    made: list[tuple[str, ...]] = []
    monkeypatch.setattr(suite, "holdings", lambda cluster: there[cluster])
    monkeypatch.setattr(suite, "call", lambda *words: made.append(words))
    assert suite.prepare() == {"changed": True, "without_backup": ["b", "c"]}
    assert made == [("stanza-create", "c")]


@pytest.mark.parametrize(
    ("seen", "pauses"), [([False, True, True, False], 4), ([True, False], 2), ([False] * 200, 61)], ids=["late", "died", "never there"]
)
def test_a_server_that_recovers_is_dead_when_it_was_there_and_is_gone(
    seen: list[bool], pauses: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: str) -> str:
        raise member.RestoreError("nobody is let in")

    now = [0.0]
    settings = {"clusters": {"core": {"port": 5432, "data": str(tmp_path / "core/pgdata")}}, "binaries": "/x"}
    own = member.Member("core", settings)
    monkeypatch.setattr(own, "ask", refuse)
    monkeypatch.setattr(own, "recovers", iter(seen).__next__)
    monkeypatch.setattr(member.time, "sleep", lambda seconds: now.append(now[-1] + seconds))
    monkeypatch.setattr(member.time, "monotonic", lambda: now[-1])
    with pytest.raises(member.RestoreError, match="the target was not reached"):
        own.wait_recovered(tmp_path / "log")
    assert len(now) - 1 == pauses


# --- copies for rehearsals ---------------------------------------------------------------------------------------------


def sample(at: float, transaction: str = "", mode: str = "", table: str = "", session: str = "") -> str:
    return f"{at:.6f}\t{transaction}\t{mode}\t{table}\t{session}\n"


def test_locks_are_summed_for_each_transaction_and_table_and_the_strongest_is_told() -> None:
    samples = "".join(
        sample(at, "3/7", mode, "public.orders", "evenkeel migrate shop.0002_more")
        for at in (100.0, 100.5, 103.0)
        for mode in ("ShareLock", "AccessExclusiveLock")
    )
    samples += (
        sample(104, "3/8", "ShareLock", "public.orders", "") + sample(105) + "\nconnection lost\n" + sample(104.5, "3/8", "ShareLock")
    )
    assert b.held(samples) == [
        {"table": "public.orders", "mode": "AccessExclusiveLock", "migration": "shop.0002_more", "seconds": 3.05},
        {"table": "public.orders", "mode": "ShareLock", "migration": "", "seconds": 0.05},
        {"table": "", "mode": "ShareLock", "migration": "", "seconds": 0.05},
    ]


def test_a_watch_that_ended_early_is_found() -> None:
    samples = sample(100) + sample(101) + "\n" + sample(140)
    assert b.longest_silence(samples, 99, 141) == 39
    assert b.longest_silence("psql: error", 99, 200) == 101


def test_a_copy_in_use_or_just_made_is_left_alone_and_an_old_one_is_swept(
    drill: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drill.clusters = {"core": {}}
    place = drill.directory / "rehearsal-core"
    (place / "pgdata").mkdir(parents=True)
    room = place / "room.json"
    room.write_text(json.dumps({"port": 15432}))
    monkeypatch.setattr(b, "is_connected", lambda port: False)
    drill.sweep()
    assert place.exists(), "somebody is about to come"
    os.utime(room, (1, 1))
    monkeypatch.setattr(b, "is_connected", lambda port: port == 15432)
    drill.sweep()
    assert place.exists(), "it is in use"
    with pytest.raises(b.BackupError, match="another rehearsal has the copy of core on this host"):
        monkeypatch.setattr(
            b.Suite, "plan", lambda *_: {"clusters": {"core": {"number": 1, "backup": "one", "size": 1, "backup_ended": ""}}}
        )
        drill.rehearsal("core", b.Room("shop", "shop", "10.0.0.4", 15432, "10.0.0.3", ("db-1",)))
    monkeypatch.setattr(b, "is_connected", lambda port: False)
    drill.clusters = {"core": {}, "plugins": {}}
    with (drill.directory / "rehearsal-plugins.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        drill.sweep()
        assert place.exists(), "the next cluster of the same rehearsal is being restored"
    drill.sweep()
    assert not place.exists()


def test_a_connection_is_seen_by_its_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert not b.is_connected(port), "listening is not a connection"
        with socket.create_connection(("127.0.0.1", port)):
            assert b.is_connected(port)


def test_a_copy_lets_in_one_user_from_one_host_and_shows_a_certificate_of_its_own(drill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(b.Copy, "configure", lambda copy: (copy.place / "pg_hba.conf").write_text("local all all trust\n"))
    copy = b.Rehearsal(drill, "core", b.Room("shop", "owner", "10.0.0.4", 15432, "10.0.0.3", ("db-1", "10.0.0.1")))
    copy.place.mkdir()
    copy.configure()
    assert (copy.place / "pg_hba.conf").read_text().splitlines()[1:] == ['hostssl "shop" "owner" 10.0.0.3/32 scram-sha-256']
    settings = (copy.place / "postgresql.conf").read_text()
    assert "listen_addresses = '10.0.0.4'\nport = '15432'\nssl = 'on'\n" in settings
    shown = subprocess.run(
        ["openssl", "x509", "-in", copy.place / "copy.crt", "-noout", "-ext", "subjectAltName"], capture_output=True, text=True, check=True
    )
    assert "DNS:db-1, IP Address:10.0.0.1" in shown.stdout
    assert (copy.place / "copy.key").stat().st_mode & 0o077 == 0


def test_what_a_command_said_is_shown_with_complaints_last() -> None:
    assert units.command_words({"stdout": "one\n\ntwo", "stderr": "but"}) == ["one", "two", "but"]
    assert units.command_words({"stdout": None}) == []

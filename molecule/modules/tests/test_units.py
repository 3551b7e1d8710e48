"""The `units` module on a real host: like systemd_service, and right after every interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Play

SLEEPER = "[Service]\nExecStart=/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n"
# A service that keeps in /run what it read when it started and when it was reloaded.
READER = """[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/cp /etc/evk-t.conf /run/evk-t.seen
ExecReload=/bin/cp /etc/evk-t.conf /run/evk-t.seen
"""
CONF = "/etc/evk-t.conf"
CLEAN = """
for unit in $(systemctl list-units --all --plain --no-legend 'evk-t*' | cut -d' ' -f1); do
  systemctl stop $unit; systemctl disable --quiet $unit; systemctl reset-failed $unit
done 2>/dev/null
rm -rf /etc/systemd/system/*evk-t* /etc/systemd/system/*/evk-t* /var/lib/evenkeel/units/evk-t* /etc/evk-t* /run/evk-t*
systemctl daemon-reload
"""


@pytest.fixture(autouse=True)
def clean(play: Play) -> Iterator[None]:
    play.shell(CLEAN)
    yield
    play.shell(CLEAN)


def service(**more: Any) -> dict[str, Any]:
    return {"name": "evk-t.service", "content": READER, "state": "started", "restart_on": [CONF], **more}


def write(play: Play, text: str) -> None:
    play.shell(f"printf '%s' '{text}' > {CONF}")


def seen(play: Play) -> str:
    return play.shell("cat /run/evk-t.seen")


def state(play: Play, *names: str) -> list[list[str]]:
    text = play.shell(
        f"for u in {' '.join(names)}; do echo $(systemctl is-active $u) $(systemctl is-enabled $u 2>/dev/null) "
        "$(systemctl show -p NeedDaemonReload --value $u); done"
    )
    return [line.split() for line in text.splitlines()]


def builtin(name: str, content: str, **options: Any) -> list[dict[str, Any]]:
    """What a role without the module does."""
    return [
        {"ansible.builtin.copy": {"dest": f"/etc/systemd/system/{name}", "content": content, "mode": "0644"}},
        {"ansible.builtin.systemd_service": {"name": name, "daemon_reload": True, **options}},
    ]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"state": "started", "enabled": True}, {"state": "started", "enabled": True}),
        ({"state": "stopped", "enabled": True}, {"state": "stopped", "enabled": True}),
        ({"enabled": False}, {"enabled": False}),
    ],
)
def test_the_same_as_systemd_service(play: Play, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    mine = {"name": "evk-t-a.service", "content": SLEEPER, **ours}
    other = builtin("evk-t-b.service", SLEEPER, **theirs)
    assert play.units(mine, check=True)["changed"] is True
    assert state(play, "evk-t-a.service") == [["inactive", "no"]], "check mode did something"
    assert play.units(mine)["changed"] is True
    play.run(*other)
    first, second = state(play, "evk-t-a.service", "evk-t-b.service")
    assert first == second
    for check in (True, False):
        assert play.units(mine, check=check)["changed"] is False
        assert not any(result["changed"] for result in play.run(*other, check=check).results)
    # the other way round, for a unit that exists
    reverse = {"state": "stopped", "enabled": False, "masked": False}
    packaged = {"name": "evk-t-a.service", **reverse}
    named = {"ansible.builtin.systemd_service": {"name": "evk-t-b.service", **reverse}}
    expected = play.run(named, check=True).last["changed"]
    assert play.units(packaged, check=True)["changed"] is expected
    assert play.units(packaged)["changed"] is expected
    assert play.run(named).last["changed"] is expected
    first, second = state(play, "evk-t-a.service", "evk-t-b.service")
    assert first == second
    assert play.units(packaged)["changed"] is False


def test_masked(play: Play) -> None:
    play.shell("mkdir -p /run/systemd/system; printf '%s' '" + SLEEPER + "' > /run/systemd/system/evk-t-m.service; systemctl daemon-reload")
    entry = {"name": "evk-t-m.service", "masked": True, "state": "stopped"}
    assert play.units(entry, check=True)["changed"] is True
    assert play.units(entry)["changed"] is True
    assert state(play, "evk-t-m.service")[0][:2] == ["inactive", "masked"]
    assert play.units(entry)["changed"] is False
    assert play.units({"name": "evk-t-m.service", "masked": False, "state": "started"})["started"] == ["evk-t-m.service"]
    assert play.units({"name": "evk-t-m.service", "masked": False, "state": "started"})["changed"] is False
    play.shell("systemctl stop evk-t-m; rm /run/systemd/system/evk-t-m.service; systemctl daemon-reload")


def test_changed_content_restarts_once(play: Play) -> None:
    write(play, "one")
    assert play.units(service())["started"] == ["evk-t.service"]
    assert play.units(service())["changed"] is False
    write(play, "two")
    assert play.units(service(), check=True)["restarted"] == ["evk-t.service"]
    done = play.units(service())
    assert done["restarted"] == done["changed_units"] == ["evk-t.service"]
    assert CONF in json.dumps(done["diff"]), "the diff names the reason"
    assert seen(play) == "two"
    assert play.units(service())["changed"] is False


def test_check_mode_knows_what_the_files_task_would_change(play: Play) -> None:
    write(play, "one")
    play.units(service())
    tasks = [
        {"files": {"files": [{"dest": CONF, "content": "two"}]}, "register": "f"},
        {"units": {"changed_files": "{{ f.changed_files }}", "units": [service()]}},
    ]
    assert play.run(*tasks, check=True).last["restarted"] == ["evk-t.service"]
    assert seen(play) == "one"
    assert play.run(*tasks).last["restarted"] == ["evk-t.service"]
    assert play.run(*tasks).last["changed"] is False
    assert play.run(*tasks, check=True).last["changed"] is False


def test_check_mode_on_a_fresh_host(play: Play) -> None:
    entries = [
        {"name": "evk-t-package.service", "drop_in": {"content": "[Service]\nNice=1\n"}, "enabled": True, "state": "started"},
        {"name": "evk-t-none.service", "state": "stopped", "enabled": False},
    ]
    assert play.units(*entries, check=True)["changed_units"] == ["evk-t-package.service"]
    failed = play.units(*entries, fails=True)
    assert "this host has no unit evk-t-package.service" in failed["msg"]
    assert "Nothing was changed" in failed["msg"]
    assert play.shell("ls /etc/systemd/system") == play.shell("ls /etc/systemd/system | grep -v evk-t-package")


def test_interrupted_between_files_and_restart(play: Play) -> None:
    """The files changed, then the play died: the next run, which changes no file, restarts."""
    write(play, "one")
    play.units(service())
    play.files({"dest": CONF, "content": "two"})
    assert seen(play) == "one"
    assert play.units(service())["restarted"] == ["evk-t.service"]
    assert seen(play) == "two"
    assert play.units(service())["changed"] is False


def test_interrupted_between_unit_file_and_reload(play: Play) -> None:
    play.units({"name": "evk-t.service", "content": SLEEPER, "state": "started"})
    changed = SLEEPER.replace("[Install]", "Nice=3\n[Install]")
    play.shell(f"printf '%s' '{changed}' > /etc/systemd/system/evk-t.service")
    entry = {"name": "evk-t.service", "content": changed, "state": "started"}
    assert play.units(entry, check=True)["restarted"] == ["evk-t.service"]
    assert play.units(entry)["restarted"] == ["evk-t.service"]
    assert play.shell("systemctl show -p Nice -p NeedDaemonReload --value evk-t.service").split() == ["3", "no"]
    assert play.units(entry)["changed"] is False


def test_interrupted_before_the_record(play: Play) -> None:
    """Restarted by a run that was killed before it could write down what the process has seen."""
    write(play, "one")
    play.units(service())
    play.shell("cp /var/lib/evenkeel/units/evk-t.service.json /run/evk-t.record")
    write(play, "two")
    play.units(service())
    play.shell("cp /run/evk-t.record /var/lib/evenkeel/units/evk-t.service.json")
    assert play.units(service())["changed"] is False, "the process is newer than the file"
    assert seen(play) == "two"


def test_edited_by_hand_and_put_right(play: Play) -> None:
    """An operator edits a file and restarts; the files module puts it right; the process must follow."""
    tasks = [
        {"files": {"files": [{"dest": CONF, "content": "right"}]}, "register": "f"},
        {"units": {"changed_files": "{{ f.changed_files }}", "units": [service()]}},
    ]
    play.run(*tasks)
    for interrupted in (False, True):
        play.shell(f"printf wrong > {CONF}; systemctl restart evk-t.service")
        if interrupted:
            play.run(tasks[0])
        assert play.run(*tasks).last["restarted"] == ["evk-t.service"]
        assert seen(play) == "right"
        assert play.run(*tasks).last["changed"] is False


def test_restarted_by_somebody_else_is_no_change(play: Play) -> None:
    write(play, "one")
    play.units(service())
    play.shell("systemctl restart evk-t.service")
    assert play.units(service())["changed"] is False
    write(play, "two")
    play.shell("sleep 0.2; systemctl restart evk-t.service")
    assert play.units(service())["changed"] is False, "it has already read the present file"
    write(play, "three")
    assert play.units(service())["restarted"] == ["evk-t.service"]


def test_a_restart_that_is_left_to_others_stays_due_until_they_make_it(play: Play) -> None:
    write(play, "one")
    entry = service(restart=False, content=READER)
    assert play.units(entry)["due"] == []
    for change in ("conf", "definition"):
        write(play, change)
        if change == "definition":
            entry["content"] = READER + "Nice=3\n"
        before = play.units(entry, check=True)
        assert (before["due"], before["restarted"]) == (["evk-t.service"], [])
        play.units(entry)
        again = play.units(entry)
        assert (again["due"], again["changed"]) == (["evk-t.service"], False)
        assert seen(play) != change
        play.shell("systemctl restart evk-t.service")
        after = play.units(entry)
        assert (after["due"], after["changed"], seen(play)) == ([], False, change)
        assert play.units(service(content=entry["content"]))["changed"] is False, "the record is that of the new process"


def test_running_before_it_was_known_is_restarted_once(play: Play) -> None:
    write(play, "default")
    play.shell(f"printf '%s' '{READER}' > /etc/systemd/system/evk-t.service; systemctl daemon-reload; systemctl start evk-t")
    packaged = {"name": "evk-t.service", "state": "started", "restart_on": [CONF]}
    assert play.units(packaged)["restarted"] == ["evk-t.service"]
    assert play.units(packaged)["changed"] is False


def test_reload_and_files_that_come_and_go(play: Play) -> None:
    entry = service(restart_on=["/etc/evk-t.more"], reload_on=[CONF])
    write(play, "one")
    play.units(entry)
    write(play, "two")
    done = play.units(entry)
    assert (done["reloaded"], done["restarted"], seen(play)) == (["evk-t.service"], [], "two")
    assert play.units(entry)["changed"] is False
    for script in ("echo x > /etc/evk-t.more", "rm /etc/evk-t.more"):
        play.shell(script)
        assert play.units(entry)["restarted"] == ["evk-t.service"]
        assert play.units(entry)["changed"] is False


def test_instance_with_drop_in(play: Play) -> None:
    template = {"name": "evk-t@.service", "content": SLEEPER}
    entry = {"name": "evk-t@core.service", "state": "started", "enabled": True, "drop_in": {"content": "[Service]\nNice=4\n"}}
    assert play.units(template, entry)["started"] == ["evk-t@core.service"]
    assert play.shell("systemctl show -p Nice --value evk-t@core.service") == "4"
    assert play.units(template, entry)["changed"] is False
    again = play.units({**template, "content": SLEEPER.replace("[Install]", "Environment=A=1\n[Install]")}, entry)
    assert again["restarted"] == ["evk-t@core.service"], "its template changed"
    assert play.shell("systemctl show -p Environment -p NeedDaemonReload --value evk-t@core.service").split() == ["A=1", "no"]
    gone = play.units({"name": "evk-t@core.service", "state": "absent"}, {"name": "evk-t@.service", "state": "absent"})
    assert gone["changed_units"] == ["evk-t@core.service", "evk-t@.service"]
    assert play.shell("find /etc/systemd/system /var/lib/evenkeel -name 'evk-t*'") == ""


def test_timer(play: Play) -> None:
    entries = [
        {"name": "evk-t.service", "content": "[Service]\nType=oneshot\nExecStart=/bin/true\n"},
        {
            "name": "evk-t.timer",
            "content": "[Timer]\nOnCalendar=daily\n[Install]\nWantedBy=timers.target\n",
            "enabled": True,
            "state": "started",
        },
    ]
    assert play.units(*entries)["started"] == ["evk-t.timer"]
    assert play.units(*entries)["changed"] is False
    entries[1]["content"] = entries[1]["content"].replace("daily", "weekly")
    assert play.units(*entries)["restarted"] == ["evk-t.timer"]


def test_socket_under_a_running_service(play: Play) -> None:
    """systemd refuses to restart a socket while its service runs."""
    socket = "[Socket]\nListenStream=127.0.0.1:18080\nBacklog={}\n[Install]\nWantedBy=sockets.target\n"
    entries = [
        {"name": "evk-t.socket", "content": socket.format(16), "enabled": True, "state": "started"},
        {"name": "evk-t.service", "content": SLEEPER, "state": "started"},
    ]
    play.units(*entries)
    entries[0]["content"] = socket.format(32)
    assert play.units(*entries)["restarted"] == ["evk-t.socket", "evk-t.service"]
    assert [each[0] for each in state(play, "evk-t.socket", "evk-t.service")] == ["active", "active"]
    assert play.units(*entries)["changed"] is False
    entries[0]["content"] = socket.format(64)
    assert play.units(entries[0])["restarted"] == ["evk-t.socket"]
    assert [each[0] for each in state(play, "evk-t.socket", "evk-t.service")] == ["active", "active"]


def test_required_path(play: Play) -> None:
    entry = {"name": "evk-t.service", "content": SLEEPER, "enabled": True, "state": "started", "requires_path": "/etc/evk-t.d"}
    assert play.units(entry)["waiting"] == ["evk-t.service"]
    assert play.units(entry)["changed"] is False
    assert state(play, "evk-t.service")[0][:2] == ["inactive", "enabled"]
    play.shell("mkdir /etc/evk-t.d")
    assert play.units(entry, check=True)["started"] == ["evk-t.service"]
    assert play.units(entry)["started"] == ["evk-t.service"]


@pytest.mark.parametrize(
    ("unit", "parts"),
    [
        ("Type=notify\nExecStart=/bin/sh -c 'echo no port 5432; exit 7'", ["start failed", "exit status 7", "no port 5432"]),
        ("ExecStart=/bin/sh -c 'echo no port 5432; sleep 0.1; exit 7'", ["ended at once", "exit status 7", "no port 5432"]),
        # between two of its restarts systemd has forgotten the exit status; the journal has it
        ("Restart=always\nExecStart=/bin/sh -c 'echo no port 5432; exit 7'", ["ended at once", "status=7", "no port 5432"]),
        ("ExecStart=/no/such/program", ["203", "/no/such/program"]),
    ],
)
def test_failing_unit_says_why_and_is_tried_again(play: Play, unit: str, parts: list[str]) -> None:
    good = {"name": "evk-t-good.service", "content": SLEEPER, "state": "started"}
    entry = {"name": "evk-t.service", "content": f"[Service]\n{unit}\n", "state": "started"}
    for _attempt in range(2):
        message = play.units(good, entry, fails=True)["msg"]
        for part in ("evk-t.service", "The last lines of its journal", *parts):
            assert part in message, message
        assert play.shell("ls /var/lib/evenkeel/units").split().count("evk-t.service.json") == 0
    done = play.units(good, {**entry, "content": SLEEPER})
    assert done["changed_units"] == ["evk-t.service"], "the good one was recorded although the other failed"
    assert play.units(good, {**entry, "content": SLEEPER})["changed"] is False


def test_a_unit_that_never_gets_ready_ends_the_task_in_time(play: Play) -> None:
    entry = {"name": "evk-t.service", "content": "[Service]\nType=notify\nExecStart=/bin/sleep infinity\n", "state": "started"}
    message = play.run({"units": {"units": [entry], "timeout_seconds": 2}}, fails=True).last["msg"]
    assert "evk-t.service: start has not ended within timeout_seconds=2; it is activating (start)" in message
    play.shell("systemctl stop evk-t.service")


def test_failed_unit_is_started_again(play: Play) -> None:
    content = "[Unit]\nStartLimitBurst=1\nStartLimitIntervalSec=1h\n[Service]\nExecStart=/bin/sleep infinity\n"
    entry = {"name": "evk-t.service", "content": content, "state": "started"}
    play.units(entry)
    play.shell("systemctl kill --signal=SEGV evk-t.service; sleep 0.3; systemctl start evk-t.service || true")
    assert state(play, "evk-t.service")[0][0] == "failed"
    assert play.units(entry)["started"] == ["evk-t.service"]
    assert state(play, "evk-t.service")[0][0] == "active"


def test_unmet_condition_is_told(play: Play) -> None:
    entry = {"name": "evk-t.service", "content": f"[Unit]\nConditionPathExists=/nope\n{SLEEPER}", "state": "started"}
    assert "a condition of its unit file is not met" in play.units(entry, fails=True)["msg"]


def test_killed_while_restarting(play: Play) -> None:
    """SIGKILL to the module while systemctl waits for a slow start: the next run ends with the new content."""
    slow = READER.replace("[Service]\n", "[Service]\nExecStartPre=/bin/sleep 2\n")
    write(play, "one")
    play.units(service(content=slow))
    write(play, "two")
    play.shell(
        "systemd-run --quiet --collect sh -c 'for i in $(seq 200); do "
        'p=$(pgrep -of "[s]ystemctl --no-ask-password restart"); '
        'if [ -n "$p" ]; then kill -9 $(cut -d" " -f4 /proc/$p/stat) $p; exit; fi; sleep 0.05; done\''
    )
    play.units(service(content=slow), fails=True)
    play.units(service(content=slow))
    assert seen(play) == "two"
    assert play.units(service(content=slow))["changed"] is False


def test_parallel_services_start_together_and_one_that_fails_keeps_no_other(play: Play) -> None:
    """Each of the last two waits for the other's file: one after another, neither would come up."""
    until = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/touch /run/evk-t.{}\n"
    until += "ExecStart=/bin/sh -c 'until [ -e /run/evk-t.{} ]; do sleep 0.1; done'\n"
    units = [
        {"name": "evk-t-bad.service", "content": "[Service]\nType=oneshot\nExecStart=/bin/false\n", "state": "started"},
        {"name": "evk-t-one.service", "content": until.format("one", "two"), "state": "started"},
        {"name": "evk-t-two.service", "content": until.format("two", "one"), "state": "started"},
    ]
    result = play.run({"units": {"units": units, "parallel": True, "timeout_seconds": 60}}, fails=True).last
    assert "evk-t-bad.service: start failed" in result["msg"]
    assert [row[0] for row in state(play, "evk-t-one.service", "evk-t-two.service")] == ["active", "active"]
    assert play.run({"units": {"units": units[1:], "parallel": True}}).last["changed"] is False

"""Starts and ends on a real host: steps in order (S1), one line for what is missing (S2, S4), twice the same (S5), no storm (P1)."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import testinfra
import yaml
from conftest import ADDRESS, INVENTORY, ROOT, playbook

START = """
- hosts: single
  gather_facts: false
  become: true
  tasks:
    - ansible.builtin.import_role: {name: process, tasks_from: units}
      vars: {__process_changed: []}
"""
PROCESSES = "drydock-relay drydock-script-processor drydock-web drydock-worker-export drydock-worker-latex"


@pytest.fixture(autouse=True)
def _once(request: pytest.FixtureRequest, host: testinfra.host.Host) -> None:
    """None of it depends on the reboot, after which the tests run again."""
    if not host.file("/run/converged").exists:
        pytest.skip("tested before the reboot")


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def show(host: testinfra.host.Host, unit: str, name: str) -> str:
    return str(host.check_output(f"systemctl show -p {name} --value {unit}"))


def steps_of_a_failed_start(host: testinfra.host.Host, unit: str) -> list[tuple[str, str]]:
    """Names and exit codes of the steps of the last start, in their order (`n/a` if one has not run), once systemd waits for the next."""
    seen: list[str] = []

    def waits() -> bool:
        seen[:] = host.check_output(f"systemctl show -p SubState -p ExecStartPre {unit}").splitlines()
        return "SubState=auto-restart" in seen

    wait_for(waits, f"{unit} is not tried again")
    ran = []
    for line in seen:
        found = re.search(r"bootstrap\.py --run \S+ \S+ (\S+) ;.* pid=(\d+) ; code=(\S+) ; status=(\S+) ", line)
        if found and found[2] != "0":
            ran.append((int(found[2]), found[1], found[4].split("/")[0]))
    return [(name, status) for _pid, name, status in sorted(ran)]


def lines_since(host: testinfra.host.Host, unit: str, since: str) -> list[str]:
    return str(host.check_output(f"journalctl --sync; journalctl --unit={unit} --since=@{since} --output=cat --no-pager")).splitlines()


@pytest.fixture
def clock(host: testinfra.host.Host) -> str:
    return str(host.check_output("date +%s.%N"))


@pytest.fixture
def start_play(tmp_path: Path) -> Callable[[], subprocess.CompletedProcess[str]]:
    """What site.yml and deploy.yml start the processes of a host by."""
    path = tmp_path / "start.yml"
    path.write_text(START)
    return lambda: subprocess.run(
        ["ansible-playbook", "-i", str(INVENTORY), str(path)], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture
def without_two_variables(host: testinfra.host.Host, start_play: Callable[[], subprocess.CompletedProcess[str]]) -> Iterator[None]:
    """The secrets without those that the steps 10-web and 20-demo need; put back afterwards."""
    file = "/etc/drydock/secrets.env"
    host.check_output(f"cp -p {file} /root/secrets.env && sed -i /^DRYDOCK_DEMO_PASSWORD=/d {file}")
    try:
        yield
    finally:
        host.check_output(f"cp -p /root/secrets.env {file} && rm /root/secrets.env && systemctl reset-failed 'drydock-*'")
        assert start_play().returncode == 0
        host.check_output(f"evenkeel-health wait --timeout 180 {PROCESSES}")


def test_s1_s2_a_step_without_its_variable_stops_the_start_with_one_line(
    host: testinfra.host.Host, clock: str, without_two_variables: None, start_play: Callable[[], subprocess.CompletedProcess[str]]
) -> None:
    run = start_play()
    sentence = (
        "drydock web: step 20-demo: variable DRYDOCK_DEMO_PASSWORD is not set: "
        "it is the demo user's password; set app.secrets.DRYDOCK_DEMO_PASSWORD"
    )
    assert run.returncode != 0
    assert sentence in " ".join(run.stdout.replace("\\n", "\n").split()), run.stdout[-3000:]
    starts = lines_since(host, "drydock-web", clock)
    told = [line for line in starts if "DRYDOCK_DEMO_PASSWORD" in line]
    assert set(told) == {sentence}, "the same line, and nothing else about it"
    begun = [number for number, line in enumerate(starts) if line.startswith("Starting drydock-web.service")]
    last = len(starts) - 1 - starts[::-1].index(sentence)
    assert len(told) == len([number for number in begun if number < last]), "one line for each start"
    assert len([number for number in begun if number > last]) <= 1, "but for one that is under way"

    assert "Started drydock-web.service" not in "".join(starts), "the process itself was not started"
    ran = steps_of_a_failed_start(host, "drydock-web")
    assert ran == [("10-web", "0"), ("20-demo", "1")]

    # the dry run tells all that is missing, not only the first
    host.check_output("sed -i /^DRYDOCK_SECRET_KEY=/d /etc/drydock/secrets.env")
    check = "drydock-web-bootstrap-check"
    before = host.check_output("find /etc/drydock /run/drydock /var/lib/drydock -printf '%p %m %u %T@ %s\\n' | sort | sha256sum")
    assert host.run(f"systemctl start {check}").rc != 0
    listed = [line for line in lines_since(host, check, clock) if line.startswith("drydock web:")]
    assert [line.split()[5] for line in listed] == ["DRYDOCK_SECRET_KEY", "DRYDOCK_DEMO_PASSWORD"], listed
    host.check_output(f"systemctl reset-failed {check}")
    now = host.check_output("find /etc/drydock /run/drydock /var/lib/drydock -printf '%p %m %u %T@ %s\\n' | sort | sha256sum")
    assert now == before, "it changes nothing"


def test_s2_the_dry_run_finds_nothing_missing_on_a_well_host(host: testinfra.host.Host) -> None:
    units = host.check_output("systemctl list-unit-files --no-legend 'drydock-*-bootstrap-check.service' | cut -d' ' -f1").split()
    assert len(units) >= 9, "one for each process"
    host.check_output(f"systemctl start {' '.join(units)}")


def test_s2_the_dry_run_of_a_playbook_lists_all_that_the_start_would_miss() -> None:
    app = yaml.safe_load((ROOT / "inventories/demo/group_vars/all/app.yml").read_text())["app"]
    app["bootstrap"]["web"][0]["writable"] += ["/srv/one", "/srv/two"]
    app["bootstrap"]["worker-latex"][0]["writable"] += ["/srv/three"]
    run = playbook("site", "--check", "-e", json.dumps({"app": app}))
    assert run.code != 0
    text = " ".join(run.output.replace("\\n", "\n").split())
    for process, step, path in (("web", "10-web", "/srv/one"), ("web", "10-web", "/srv/two"), ("worker-latex", "10-fonts", "/srv/three")):
        assert f"drydock {process}: step {step}: directory {path} does not exist" in text, text[-3000:]


def test_s4_the_web_start_puts_its_directory_right_and_refuses_an_unwritable_log(host: testinfra.host.Host, clock: str) -> None:
    host.check_output("chown root:root /run/drydock && chmod 0711 /run/drydock && mount --bind /var/log/drydock /var/log/drydock")
    try:
        host.check_output("mount -o remount,bind,ro /var/log/drydock")
        assert host.run("systemctl restart drydock-web").rc != 0
        told = [line for line in lines_since(host, "drydock-web", clock) if "directory /var/log/drydock" in line]
        assert told, "it did not say why"
        assert told[0].startswith("drydock web: step 10-web: directory /var/log/drydock is not writable by drydock (read-only file system)")
        assert host.check_output("stat -c '%U:%G %a' /run/drydock") == "drydock:drydock 750", "00-directories came before"
        assert steps_of_a_failed_start(host, "drydock-web") == [("10-web", "1")], "nothing was started after it"
    finally:
        # lazily, for whoever is just being started has opened it
        host.check_output("umount --lazy /var/log/drydock; systemctl reset-failed drydock-web; systemctl restart drydock-web")
    host.check_output("evenkeel-health wait --timeout 120 drydock-web")


TREE = r"""
find /etc/drydock /run/drydock /var/lib/drydock /var/log/drydock -path /var/lib/drydock/metrics -prune -o -printf '%p %y %m %U:%G\n' | sort
find /etc/drydock /run/drydock /var/lib/drydock -path /var/lib/drydock/metrics -prune -o -type f -exec sha256sum {} + | sort -k 2
ls -l /var/lib/drydock/metrics | wc -l
for port in 5432 5433; do
  runuser -u postgres -- pg_dump -p $port --data-only --inserts -T 'jobs_*' -T django_session -T processor_processor \
    -T learning_availability drydock | grep ^INSERT | sort
done
getent passwd drydock; find /var/lib/object-storage/data/drydock | sort
"""


def test_s5_a_second_start_of_every_process_leaves_the_same(host: testinfra.host.Host) -> None:
    """Files byte for byte, owners and modes, accounts and registrations row for row. Not what processes count and log while they run."""
    occasional = "drydock-recompute-availability drydock-prune-uploads drydock-job-service-account drydock-register-scripts"
    host.check_output(f"systemctl start {occasional}")
    before = host.check_output(TREE).splitlines()
    assert len([line for line in before if line.startswith("INSERT INTO public.accounts_user ")]) >= 3
    assert [line for line in before if line.startswith("INSERT INTO public.processor_script ")]
    host.check_output(f"systemctl restart {PROCESSES}")
    host.check_output(f"systemctl start {occasional}")
    host.check_output(f"evenkeel-health wait --timeout 180 {PROCESSES}")
    after = host.check_output(TREE).splitlines()
    assert sorted(set(after) ^ set(before)) == []
    assert after == before


FAST = "/run/systemd/system/drydock-relay.service.d/test.conf"


def test_p1_a_process_that_dies_at_once_is_given_up_and_the_operator_told(host: testinfra.host.Host, clock: str) -> None:
    """With the limits of the suite; only the pause between two starts is shortened."""
    limit = int(show(host, "drydock-relay", "StartLimitBurst"))
    note = host.file("/var/lib/evenkeel/failures/drydock-relay.service")
    drop_in = "[Service]\nExecStartPre=\nExecStart=\nExecStart=/bin/sh -c 'echo my last words; exit 7'\nRestartSec=50ms\n"
    host.check_output("mkdir -p %s && printf '%%s' %s > %s && systemctl daemon-reload", FAST.rpartition("/")[0], drop_in, FAST)
    try:
        host.run("systemctl restart drydock-relay")
        wait_for(lambda: show(host, "drydock-relay", "ActiveState") == "failed", "it is started for ever")
        wait_for(lambda: note.exists, "nobody told the operator")
        said = note.content_string
        assert "drydock-relay.service has failed" in said
        assert "my last words" in said
        assert "Next: journalctl -u drydock-relay.service" in said
        assert said.count("\n") == 1
        lines = lines_since(host, "drydock-relay", clock)
        # the start that came before it may count, too
        assert limit - 1 <= lines.count("my last words") <= limit, "each start within the limit, and no more"
        # one line in the journal, too
        told = lines_since(host, "evenkeel-failure@drydock-relay.service.service", clock)
        assert len([line for line in told if line.startswith("drydock-relay.service has failed")]) == 1
    finally:
        host.check_output(f"rm -r {FAST.rpartition('/')[0]}; systemctl daemon-reload; systemctl reset-failed drydock-relay")
        host.check_output("systemctl start drydock-relay; systemctl reset-failed 'evenkeel-failure@*'")
    wait_for(lambda: not note.exists, "it runs again, and its note is still there")
    host.check_output("evenkeel-health wait --timeout 120 drydock-relay drydock-worker-latex drydock-worker-export")


@pytest.mark.parametrize("unit", ["drydock-web", "drydock-worker-latex"])
def test_p1_a_process_that_was_killed_comes_back_by_itself(host: testinfra.host.Host, unit: str) -> None:
    before, restarts = show(host, unit, "InvocationID"), int(show(host, unit, "NRestarts"))
    host.check_output(f"systemctl kill --kill-who=main --signal=KILL {unit}")
    wait_for(lambda: show(host, unit, "InvocationID") != before and show(host, unit, "ActiveState") == "active", f"{unit} stays down")
    assert int(show(host, unit, "NRestarts")) > restarts, "by systemd, not by a person"
    host.check_output(f"evenkeel-health wait --timeout 180 {unit}")


def test_a_web_process_keeps_its_address_over_a_restart_and_gives_it_up_when_it_is_stopped(host: testinfra.host.Host) -> None:
    ask = f"curl -s -o /dev/null -w '%{{http_code}} %{{exitcode}}\\n' --max-time 60 http://{ADDRESS}:8000/webgateway/"
    host.check_output("systemd-run --quiet --unit=test-asker bash -c %s", f"while :; do {ask}; sleep 0.02; done >/run/asked")

    def answers() -> list[str]:
        return str(host.check_output("cat /run/asked")).splitlines()

    try:
        wait_for(answers, "nobody asks")
        before = len(answers())
        host.check_output("systemctl restart drydock-web")
        after = len(answers())
        wait_for(lambda: len(answers()) > after + 5, "no answer after the restart")
        assert len(answers()) > before
        assert set(answers()) == {"200 0"}, "whoever comes while it restarts waits, and is not refused"
        host.check_output("systemctl stop drydock-web")
        assert host.run(ask).stdout.split() == ["000", "7"], "refused at once: the proxy asks another host"
    finally:
        host.check_output("systemctl stop test-asker; rm -f /run/asked; systemctl start drydock-web")
    host.check_output("evenkeel-health wait --timeout 180 drydock-web")

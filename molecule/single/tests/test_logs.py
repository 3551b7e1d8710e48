"""Each process has its own log, rotated at 20 MB with 3 backups, and nothing is lost or doubled (P2); its journal has the same lines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
import testinfra

UNIT, LOG = "drydock-prune-uploads", "/var/log/drydock/prune-uploads.log"
DROP_IN = f"/run/systemd/system/{UNIT}.service.d/test.conf"
LINES = 126_000  # of 200 bytes: 25 MB

# A line is one write, as Python's logging does it. It rests in the middle until it is told to go on.
WRITER = """
import os, sys, time
run, count = sys.argv[1], int(sys.argv[2])
for number in range(count):
    os.write(1, f"{run} {number:08} {'x' * (189 - len(run))}\\n".encode())
    while number == count // 2 and not os.path.exists("/run/evenkeel-test-go"):
        time.sleep(0.1)
os.write(1, f"{run} long {'y' * 120_000}\\n".encode())
"""

# The numbers of each run that are not in the files exactly once, the sizes, and what has no newline at its end.
COUNT = """
import collections, glob, json, os, sys
log, counts, odd = sys.argv[1], collections.defaultdict(collections.Counter), []
files = sorted(glob.glob(log + "*"))
for file in files:
    with open(file, "rb") as lines:
        for line in lines:
            words = line.split()
            if not line.endswith(b"\\n"):
                odd.append(file)
            if len(words) == 3 and words[0].startswith(b"run-"):
                whole = len(words[2]) == (120_000 if words[1] == b"long" else 189 - len(words[0]))
                counts[words[0].decode()][words[1] if whole else b"cut"] += 1
print(json.dumps({
    "sizes": {os.path.basename(file): os.path.getsize(file) for file in files},
    "lines": {run: sum(seen.values()) for run, seen in counts.items()},
    "not once": {run: [str(n) for n, times in seen.items() if times != 1][:9] for run, seen in counts.items()},
    "cut": {run: seen[b"cut"] for run, seen in counts.items()},
    "odd": odd,
}))
"""


@pytest.fixture(autouse=True)
def _once(host: testinfra.host.Host) -> None:
    """None of it depends on the reboot, after which the tests run again."""
    if not host.file("/run/converged").exists:
        pytest.skip("tested before the reboot")


def wait_for(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


@pytest.fixture
def write(host: testinfra.host.Host) -> Iterator[Callable[[str, int], None]]:
    """Lets a process of the contract say numbered lines instead of doing its work: its own unit, user, walls and files."""
    program = "/run/evenkeel-test-lines.py"
    drop_in = f"[Service]\nExecStart=\nExecStart=/usr/bin/python3 {program} $RUN $COUNT\nEnvironmentFile=/run/evenkeel-test-lines.env\n"
    host.check_output("printf %%s %s > %s; printf %%s %s > /run/evenkeel-test-count.py", WRITER, program, COUNT)
    host.check_output("mkdir -p %s; printf %%s %s > %s; systemctl daemon-reload", DROP_IN.rpartition("/")[0], drop_in, DROP_IN)

    def start(run: str, count: int) -> None:
        setting = f"RUN={run}\nCOUNT={count}\n"
        host.check_output("rm -f /run/evenkeel-test-go; printf %%s %s > /run/evenkeel-test-lines.env", setting)
        host.check_output(f"systemctl start --no-block {UNIT}")

    yield start
    host.check_output(f"systemctl stop {UNIT}; rm -r {DROP_IN.rpartition('/')[0]} /run/evenkeel-test-*; systemctl daemon-reload")
    host.check_output(f"systemctl stop drydock-logs; rm -f {LOG}*; systemctl start drydock-logs")


def counted(host: testinfra.host.Host) -> dict[str, dict[str, int]]:
    answer: dict[str, dict[str, int]] = json.loads(host.check_output(f"python3 /run/evenkeel-test-count.py {LOG}"))
    return answer


def test_p2_every_line_is_there_once_through_rotations_kills_and_restarts_of_the_journal(
    host: testinfra.host.Host, write: Callable[[str, int], None]
) -> None:
    tag = host.check_output("date +%s")
    runs = [f"run-{tag}-{number}" for number in (1, 2, 3)]
    for run in runs[:2]:
        size = host.file(LOG).size if host.file(LOG).exists else 0
        write(run, LINES)
        # Killed while it works; then, in the pause, the journal is restarted under both.
        wait_for(lambda size=size: abs(host.file(LOG).size - size) > 1_000_000, "no line arrives in the file")  # type: ignore[misc]
        host.check_output("systemctl kill --signal=KILL drydock-logs")
        last = f"journalctl --unit={UNIT} --output=cat --no-pager --lines=1"
        wait_for(lambda last=last, run=run: f"{run} {LINES // 2:08} " in host.check_output(last), "the journal lags")  # type: ignore[misc]
        host.check_output("systemctl restart systemd-journald; touch /run/evenkeel-test-go")
        wait_for(lambda: host.check_output(f"systemctl show -p ActiveState --value {UNIT}") == "inactive", "the writer does not end")
    wait_for(lambda: counted(host)["lines"].get(runs[1]) == LINES + 1, "lines are missing at the end of the file")

    found = counted(host)
    assert found["lines"] == dict.fromkeys(runs[:2], LINES + 1), found
    assert found["not once"] == {run: [] for run in runs[:2]}
    assert found["cut"] == dict.fromkeys(runs[:2], 0), "a line of 120 kB is cut by the journal, and whole in the file"
    assert not found["odd"]
    assert set(found["sizes"]) == {"prune-uploads.log", "prune-uploads.log.1", "prune-uploads.log.2"}
    assert all(19_000_000 < size <= 20_000_000 for name, size in found["sizes"].items() if name != "prune-uploads.log"), found["sizes"]

    in_journal = f"journalctl --unit={UNIT} --output=cat --no-pager --grep='^{runs[1]} [0-9]' | awk '{{print $2}}' | sort -u | wc -l"
    assert int(host.check_output(in_journal)) == LINES, "the journal keeps what the file has"

    # a third one, so that the oldest backup goes
    write(runs[2], LINES * 2)
    host.check_output("touch /run/evenkeel-test-go")
    wait_for(lambda: counted(host)["lines"].get(runs[2]) == LINES * 2 + 1, "lines are missing at the end of the file")
    found = counted(host)
    assert set(found["sizes"]) == {"prune-uploads.log", *(f"prune-uploads.log.{number}" for number in (1, 2, 3))}, "3 backups"
    assert found["not once"][runs[2]] == []
    assert max(found["sizes"].values()) <= 20_000_000
    files = host.check_output(f"stat -c '%U:%G %a' {LOG}*").splitlines()
    assert set(files) == {"drydock:drydock 640"}


def test_p2_a_full_disk_that_is_freed_costs_no_line(host: testinfra.host.Host, write: Callable[[str, int], None]) -> None:
    folder = LOG.rpartition("/")[0]
    run = f"run-{host.check_output('date +%s')}"
    since = host.check_output("date +%s")
    host.check_output(f"mount -t tmpfs -o size=2m,mode=0750,uid=drydock,gid=drydock tmpfs {folder} && systemctl restart drydock-logs")
    try:
        write(run, 20_000)  # 4 MB
        host.check_output("touch /run/evenkeel-test-go")
        behind = f"journalctl --unit=drydock-logs --since=@{since} --output=cat --no-pager"
        wait_for(lambda: "the log files are behind" in host.check_output(behind), "it does not say that the disk is full")
        assert "No space left on device" in host.check_output(behind)
        host.check_output(f"mount -o remount,size=20m {folder}")
        wait_for(lambda: counted(host)["lines"].get(run) == 20_001, "it does not go on")
        found = counted(host)
        assert (found["not once"], found["cut"], found["odd"]) == ({run: []}, {run: 0}, [])
    finally:
        host.check_output(f"systemctl stop drydock-logs; umount {folder}; systemctl start drydock-logs")
    host.check_output("evenkeel-health wait --timeout 60 drydock-logs")

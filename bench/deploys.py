#!/usr/bin/env python3
"""What a deploy with nothing to migrate and a rollback cost, and how that grows with the hosts: `bin/bench deploy`.

On lab hosts of its own, which are removed at the end: one that carries the data, and beside it web hosts that do jobs, too. In turns on the
same hosts: the suite's deploy of a new release, its rollback, and what is usually written instead (plain.yml), which installs the same
wheels and restarts the same services, a quarter of the hosts at a time like the deploy, and half like the rollback. Read the ratios:
all hosts share one machine here. After each run the platform must be well again before the next begins, which is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "molecule"))

import suite  # noqa: E402

NAME = "bench"
FOLDER = suite.STATE / "bench"
INVENTORY = FOLDER / "inventory"
LOGS = FOLDER / "logs"
LAB = suite.STATE / "labs" / NAME
KEPT = suite.STATE / "inventories" / NAME  # what the controller keeps of the platform
NETWORK = "10.87.7"
DATA_GROUPS = ("etcd", "postgresql_core", "postgresql_plugins", "redis", "object_storage", "proxy", "backup")
LIMIT_SECONDS = 3600
#: What is measured, as the tables call it; each of the suite's with what is compared with it.
PAIRS = {"deploy": "plain, a quarter at a time", "rollback": "plain, half at a time"}
VERSION = Path("drydock/src/drydock/__init__.py")

LAB_VARIABLES = f"""---
lab_name: {NAME}
lab_subnet: {NETWORK}.0/24
lab_hosts: "{{{{ host_addresses }}}}"
lab_state_dir: "{{{{ state_dir }}}}"
ansible_ssh_common_args: -F "{{{{ state_dir }}}}/labs/{{{{ lab_name }}}}/ssh_config"
"""
PLATFORM_VARIABLES = f"""---
platform_name: {NAME}
platform_url: "https://{{{{ topology.platform.address }}}}"
# lab hosts all report the whole memory of this machine
postgresql_memory_mb: 512
release_advisories: "{{{{ playbook_dir | dirname }}}}/inventories/common/advisories"
# so many unpacked releases on eight hosts fill a disk
releases_kept: 3
"""


class RunError(Exception):
    """A playbook that failed, with its last words."""


@dataclass(frozen=True)
class Cost:
    """Of one run: seconds, and processor seconds of the controller alone (ansible-playbook and what it starts)."""

    seconds: float
    controller: float


Costs = dict[str, list[Cost]]


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)


def hosts(count: int) -> dict[str, Any]:
    """The inventory of so many web hosts."""
    webs = {f"web-{number}": {"ansible_host": f"{NETWORK}.{20 + number}"} for number in range(1, count + 1)}
    groups = {**dict.fromkeys(DATA_GROUPS, ("data-1",)), "web": tuple(webs), "worker": tuple(webs)}
    children = {name: {"hosts": dict.fromkeys(members)} for name, members in groups.items()}
    return {"all": {"hosts": {"data-1": {"ansible_host": f"{NETWORK}.11"}, **webs}, "children": children}}


def write_inventory(count: int) -> None:
    """The demo's settings, linked, on hosts of our own."""
    variables = INVENTORY / "group_vars/all"
    variables.mkdir(parents=True, exist_ok=True)
    for name in ("app", "delivery", "secrets", "state", "topology"):
        link = variables / f"{name}.yml"
        link.unlink(missing_ok=True)
        link.symlink_to((ROOT / "inventories/demo/group_vars/all" / link.name).resolve())
    (variables / "lab.yml").write_text(LAB_VARIABLES)
    (variables / "platform.yml").write_text(PLATFORM_VARIABLES)
    (INVENTORY / "hosts.yml").write_text(json.dumps(hosts(count), indent=2) + "\n")  # JSON is YAML


def processor_seconds() -> float:
    """Of all children so far that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(what: str, playbook: str, *arguments: str) -> Cost:
    """Run a playbook, its output in a log; `what` is shown. Raises RunError."""
    log = LOGS / (re.sub(r"\W+", "-", what) + ".log")
    say(f"{time.strftime('%H:%M:%S')}  {what} …", end="")
    began, used = time.monotonic(), processor_seconds()
    with log.open("w") as out:
        command = ["ansible-playbook", "-i", str(INVENTORY), str(ROOT / playbook), *arguments]
        with subprocess.Popen(command, cwd=ROOT, env=suite.environment(), stdout=out, stderr=subprocess.STDOUT) as child:
            try:
                code = child.wait(LIMIT_SECONDS)
            except BaseException:
                child.send_signal(signal.SIGINT)
                child.wait()
                raise
    cost = Cost(time.monotonic() - began, processor_seconds() - used)
    say(f" {cost.seconds:.1f} s")
    if code:
        last = "\n".join(log.read_text().splitlines()[-40:])
        raise RunError(f"{last}\n\n{what}: {playbook} ended with {code}, see {log}")
    return cost


class Releases:
    """Releases of this checkout's commit, each with a version of its own, and their wheels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[str] = []

    def build(self) -> str:
        """Build one more; returns its id."""
        say(f"{time.strftime('%H:%M:%S')}  building a release …", end="")
        began = time.monotonic()
        text = f'"""Made for the bench."""\n\n__version__ = "0.0.{len(self.made) + 1}"\n'
        self.made.append(suite.build_release(self.folder, INVENTORY, **{str(VERSION): text}))
        say(f" {self.made[-1]}, {time.monotonic() - began:.1f} s")
        return self.made[-1]

    def wheel(self, release: str) -> Path:
        """The application's own wheel out of a release's archive."""
        with tarfile.open(suite.RELEASES / f"{release}.tar") as archive:
            name = next(each for each in archive.getnames() if Path(each).name.startswith("drydock-") and each.endswith(".whl"))
            archive.extract(name, self.folder, filter="data")
        return self.folder / name

    def remove(self) -> None:
        for release in self.made:
            suite.remove_release(release)


def plain(wheel: Path, batch: str, *arguments: str) -> tuple[str, ...]:
    """The usual playbook and its arguments."""
    return "bench/plain.yml", "-e", f"plain_wheel={wheel}", "-e", f"plain_batch={batch}", *arguments


def title(count: int, what: str) -> str:
    return f"{count} host{'' if count == 1 else 's'}, {what}"


def measure(count: int, rounds: int, releases: Releases, first: str) -> Costs:
    """Deploy, go back, and do the same plainly, so often; leaves the hosts with release `first`."""
    rolling, halves = PAIRS.values()
    costs: Costs = {name: [] for pair in PAIRS.items() for name in pair}
    for number in range(1, rounds + 1):
        release = releases.build()
        ways = {
            "deploy": ("playbooks/deploy.yml", "-e", f"release={release}"),
            rolling: plain(releases.wheel(release), "25%"),
            "rollback": ("playbooks/rollback.yml",),
            halves: plain(releases.wheel(first), "50%"),
        }
        for name, command in ways.items():
            costs[name].append(run(title(count, f"round {number}: {name}"), *command))
            run(title(count, f"round {number}: well again after {name}"), "playbooks/verify.yml")
    return costs


def converge(count: int) -> None:
    """Boot the hosts of the inventory, remove others, and make them what it says."""
    write_inventory(count)
    run(title(count, "boot"), "playbooks/lab.yml")
    run(title(count, "converge, which takes minutes"), "playbooks/site.yml")


def deploy_first(releases: Releases) -> str:
    """Deploy a first release with its migrations approved, and give the plain way its environment; returns the release's id."""
    first = releases.build()
    run("first release: plan", "playbooks/deploy.yml", "-e", f"release={first}", "-e", "gate=plan")
    fingerprint = json.loads((KEPT / "migration-plan.json").read_text())["fingerprint"]
    run("first release: deploy", "playbooks/deploy.yml", "-e", f"release={first}", "-e", f"migrations_approved={fingerprint}")
    run("first release: the plain way's environment", *plain(releases.wheel(first), "100%", "--tags", "all,prepare"))
    return first


def measure_all(counts: Sequence[int], rounds: int) -> dict[int, Costs]:
    """From the most hosts down to the fewest: hosts leave a platform sooner than they join it."""
    found: dict[int, Costs] = {}
    with tempfile.TemporaryDirectory() as folder:
        releases = Releases(Path(folder))
        try:
            first = ""
            for count in sorted(set(counts), reverse=True):
                converge(count)
                first = first or deploy_first(releases)
                run(title(count, "well before all"), "playbooks/verify.yml")
                found[count] = measure(count, rounds, releases, first)
        finally:
            releases.remove()
    return dict(sorted(found.items()))


def medians(found: Mapping[int, Costs]) -> dict[int, dict[str, Cost]]:
    return {
        count: {
            name: Cost(statistics.median(each.seconds for each in many), statistics.median(each.controller for each in many))
            for name, many in costs.items()
        }
        for count, costs in found.items()
    }


def table(figures: Mapping[int, Mapping[str, Cost]]) -> str:
    """Markdown of the medians: seconds and ratios by number of hosts, then how each grows from the fewest hosts on."""
    head = ["hosts"]
    for ours, usual in PAIRS.items():
        head += [f"{ours} s", f"{usual} s", "ratio"]
    head += [f"{ours}: controller's CPU s" for ours in PAIRS]
    lines = [head, ["--:"] * len(head)]
    for count, costs in figures.items():
        line = [str(count)]
        for ours, usual in PAIRS.items():
            mine, other = costs[ours].seconds, costs[usual].seconds
            line += [f"{mine:.0f}", f"{other:.0f}", f"{mine / other:.1f}"]
        lines.append(line + [f"{costs[ours].controller:.0f}" for ours in PAIRS])
    fewest, *more = figures
    for count in more:
        line = [f"{count} ÷ {fewest}"]
        for pair in PAIRS.items():
            line += [*(f"{figures[count][name].seconds / figures[fewest][name].seconds:.1f}" for name in pair), ""]
        lines.append(line + [f"{figures[count][ours].controller / figures[fewest][ours].controller:.1f}" for ours in PAIRS])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpus": os.cpu_count(), "memory_gib": round(memory), "python": platform.python_version(), "load_before": os.getloadavg()[0]}


def remove_lab() -> None:
    """The hosts, and what the controller keeps of their platform: its ledger and secrets are theirs."""
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    subprocess.run([*sudo, "python3", str(ROOT / "roles/lab/files/lab.py"), "down", str(LAB)], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(KEPT, ignore_errors=True)


@contextmanager
def lab() -> Iterator[None]:
    """No hosts before, none after, whatever happens."""
    remove_lab()
    try:
        yield
    finally:
        say("removing the lab's hosts …")
        remove_lab()


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench deploy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 4, 8], metavar="N", help="numbers of web hosts (default: 1 4 8)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured; medians count (default: 3)")
    chosen = parser.parse_args()
    if min(chosen.hosts) < 1 or max(chosen.hosts) > 200 or chosen.rounds < 1:
        parser.error("at least one round, and 1 to 200 hosts")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or its hosts would stay
    # each log ends with the tasks that took longest
    os.environ["ANSIBLE_CALLBACKS_ENABLED"] = "ansible.posix.profile_tasks"
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    where = machine()
    say(f"{max(chosen.hosts) + 1} lab hosts on this machine ({where['cpus']} cores, {where['memory_gib']} GiB); logs are in {LOGS}")
    if where["load_before"] > 0.5:
        say(f"this machine is not idle (load {where['load_before']:.1f}): trust the ratios only, or run it again later")
    try:
        with lab():
            found = measure_all(chosen.hosts, chosen.rounds)
    except (RunError, AssertionError, subprocess.SubprocessError) as error:
        say(f"\n{error}")
        return 1
    except KeyboardInterrupt:
        return 130
    text = table(medians(found))
    (FOLDER / "deploys.md").write_text(text)
    raw = {count: {name: [asdict(each) for each in many] for name, many in costs.items()} for count, costs in found.items()}
    (FOLDER / "deploys.json").write_text(json.dumps({"machine": where, "rounds": chosen.rounds, "hosts": raw}, indent=2) + "\n")
    say(f"\n{text}\nwritten to {FOLDER}/deploys.md and deploys.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())

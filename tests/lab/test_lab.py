"""The lab's own promises, on real hosts: idempotent, side by side, finished after a kill, removed without a trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "roles/lab/files/lab.py"
STATE = Path(os.environ.get("EVENKEEL_STATE") or Path.home() / ".local/state/evenkeel")
SUDO = [] if os.geteuid() == 0 else ["sudo"]


def run(*argv: str, check: bool = True) -> str:
    done = subprocess.run([*SUDO, *argv], capture_output=True, text=True, timeout=300, check=False)
    assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@dataclass
class Lab:
    """A lab of the tests' own, below the usual state folder so that the base image is shared."""

    name: str
    subnet: str

    @property
    def hosts(self) -> dict[str, str]:
        return {f"{self.name}-{n}": self.subnet.replace("0/24", str(10 + n)) for n in (1, 2)}

    @property
    def directory(self) -> Path:
        return STATE / "labs" / self.name

    @property
    def config(self) -> Path:
        packages = yaml.safe_load((ROOT / "roles/lab/defaults/main.yml").read_text())
        description = {
            "name": self.name,
            "subnet": self.subnet,
            "state": str(STATE),
            "hosts": self.hosts,
            "suite": packages["lab_suite"],
            "packages": packages["lab_packages"],
        }
        path = STATE / "labs" / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(description))
        return path

    def up(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(run(sys.executable, str(PROGRAM), "up", str(self.config)))
        return answer

    def down(self) -> None:
        run(sys.executable, str(PROGRAM), "down", str(self.directory))

    def ssh(self, host: str, command: str) -> str:
        return run("ssh", "-F", str(self.directory / "ssh_config"), host, command)

    def fault(self, command: str, *words: str) -> list[str]:
        """Do a fault to hosts; returns what the program says it did, nothing when all was so already."""
        answer: dict[str, Any] = json.loads(run(sys.executable, str(PROGRAM), command, str(self.directory), *words))
        assert answer["changed"] == bool(answer["did"])
        return list(answer["did"])

    def hears(self, host: str, other: str) -> bool:
        """Whether an answer of `other` reaches `host`."""
        return "1 received" in run(
            "ssh", "-F", str(self.directory / "ssh_config"), host, f"ping -c 1 -W 1 {self.hosts[other]}", check=False
        )

    def reachable(self, host: str) -> bool:
        command = ["ssh", "-F", str(self.directory / "ssh_config"), "-o", "ConnectTimeout=2", host, "true"]
        return subprocess.run([*SUDO, *command], capture_output=True, check=False).returncode == 0

    def traces(self, bridge: str) -> dict[str, str]:
        """What is left of the lab on this machine, by kind."""
        commands = run("ps", "axww", "-o", "args").splitlines()
        found = {
            "mounts": "\n".join(line for line in Path("/proc/self/mounts").read_text().splitlines() if str(self.directory) in line),
            "bridge": bridge if Path(f"/sys/class/net/{bridge}").exists() else "",
            "nft table": bridge if bridge in run("nft", "list", "tables") else "",
            "processes": "\n".join(line for line in commands if bridge in line or str(self.directory) in line),
            "cgroups": "\n".join(str(path) for path in Path("/sys/fs/cgroup").glob(f"*/evenkeel/{bridge}*")),
            "files": str(self.directory) if self.directory.exists() else "",
        }
        return {kind: text for kind, text in found.items() if text}

    def bridge(self) -> str:
        """The name of the lab's interface, from the route to its first host."""
        route = json.loads(run("ip", "-json", "route", "get", next(iter(self.hosts.values()))))
        return str(route[0]["dev"])


@pytest.fixture
def lab() -> Iterator[Lab]:
    lab = Lab("testa", "10.87.30.0/24")
    yield lab
    lab.down()


@pytest.fixture
def other() -> Iterator[Lab]:
    lab = Lab("testb", "10.87.31.0/24")
    yield lab
    lab.down()


def test_up_is_idempotent_and_hosts_are_real(lab: Lab) -> None:
    assert lab.up()["changed"]
    assert lab.up() == {"changed": False, "did": []}
    first, second = lab.hosts
    assert lab.ssh(first, "cat /proc/1/comm").strip() == "systemd"
    assert lab.ssh(first, "systemctl is-system-running").strip() == "running"
    assert "1 received" in lab.ssh(first, f"ping -c 1 -W 2 {lab.hosts[second]}")
    # a unit of the same name on the other host is another unit
    lab.ssh(first, "systemctl stop cron ssh.socket 2>/dev/null; systemctl restart systemd-journald")
    assert lab.ssh(second, "systemctl is-active systemd-journald").strip() == "active"


def test_hosts_bring_no_addresses_to_this_machine(lab: Lab) -> None:
    lab.up()
    ours = lab.bridge()[:8]  # of which the names of the hosts' links begin with as much as fits
    links = [link for link in json.loads(run("ip", "-json", "-6", "address")) if ours in link["ifname"]]
    assert [link["ifname"] for link in links if link["addr_info"]] == []
    assert len([link for link in json.loads(run("ip", "-json", "link")) if ours in link["ifname"]]) == 3, "a bridge and two hosts"


def test_reboot_and_power_cut(lab: Lab) -> None:
    lab.up()
    host = next(iter(lab.hosts))
    before = lab.ssh(host, "cat /proc/sys/kernel/random/boot_id; stat -c %Y /run/systemd/system").split()
    subprocess.run([*SUDO, "ssh", "-F", str(lab.directory / "ssh_config"), host, "systemctl reboot"], check=False, capture_output=True)
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            [*SUDO, "ssh", "-F", str(lab.directory / "ssh_config"), "-o", "ConnectTimeout=2", host, "stat -c %Y /run/systemd/system"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0 and done.stdout.strip() != before[1]:
            break
        assert time.monotonic() < deadline, done
        time.sleep(0.2)
    assert lab.up()["changed"] is False


def test_a_host_that_lost_power_comes_back_with_its_disk(lab: Lab) -> None:
    lab.up()
    host, other = lab.hosts
    written = "echo 192.0.2.1 elsewhere >> /etc/hosts; echo kept > /root/kept; systemctl mask --quiet cron.service"
    before = lab.ssh(host, f"{written}; touch /run/lost; cat /etc/machine-id /proc/sys/kernel/random/boot_id")
    listen = "import socket; s = socket.create_connection(('{}', 22)); s.recv(99); print('up', flush=True); s.settimeout(5); s.recv(9)"
    command = f'python3 -c "{listen.format(lab.hosts[host])}"'
    connected = subprocess.Popen(
        [*SUDO, "ssh", "-F", str(lab.directory / "ssh_config"), other, command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert connected.stdout is not None
    assert connected.stdout.readline() == "up\n"
    assert lab.fault("power-off", host) == [f"switched {host} off"]
    assert lab.fault("power-off", host) == []
    assert "TimeoutError" in connected.communicate(timeout=60)[1], "its connections were closed politely"
    assert not lab.reachable(host)
    assert lab.reachable(other)
    assert lab.fault("power-on", host) == [f"booted {host}"]
    assert lab.fault("power-on", host) == []
    now = lab.ssh(host, "cat /etc/machine-id; grep -c elsewhere /etc/hosts; cat /root/kept; ls /run/lost 2>/dev/null || true")
    assert now.split() == [before.split()[0], "1", "kept"]
    assert lab.ssh(host, "systemctl is-system-running").strip() == "running"
    lab.fault("power-off", host)
    refused = run(sys.executable, str(PROGRAM), "cut", str(lab.directory), host, check=False)
    assert f"{host} is off: `lab.py power-on {lab.directory} {host}` boots it" in refused
    refused = run(sys.executable, str(PROGRAM), "cut", str(lab.directory), "nobody", check=False)
    assert f"lab {lab.name} has no host nobody; it has {host}, {other}" in refused
    assert "there is no lab in /nowhere" in run(sys.executable, str(PROGRAM), "cut", "/nowhere", host, check=False)
    assert lab.up()["did"] == [f"booted {host}"]


def test_a_renewed_host_is_empty_and_trusted_as_before(lab: Lab) -> None:
    lab.up()
    host, other = lab.hosts
    before = lab.ssh(host, "touch /root/old; cat /etc/machine-id").strip()
    lab.ssh(other, "touch /root/old")
    assert lab.fault("renew", host) == [f"emptied {host}", f"booted {host}"]
    assert lab.ssh(host, "ls /root; hostname").split() == [host]
    assert lab.ssh(host, "cat /etc/machine-id").strip() not in {"", before}
    assert lab.ssh(other, "ls /root").split() == ["old"]


def test_cut_links_and_lost_packets(lab: Lab) -> None:
    lab.up()
    host, other = lab.hosts
    assert lab.fault("cut", host) == [f"cut {host}"]
    assert lab.fault("cut", host) == []
    assert not lab.reachable(host)
    assert lab.reachable(other)
    assert lab.fault("join", host) == [f"joined {host}"]
    assert lab.fault("join", host) == []
    assert lab.hears(host, other)
    # one way only: the controller still reaches the host, which no longer hears the other
    assert lab.fault("drop", host, "--from", other) == [f"{host} loses what comes from {other}"]
    assert lab.fault("drop", host, "--from", other) == []
    assert lab.reachable(host)
    assert not lab.hears(host, other)
    count = 'ip -s -json link show host0 | python3 -c \'import json, sys; print(json.load(sys.stdin)[0]["stats64"]["rx"]["packets"])\''
    before = int(lab.ssh(other, count))
    lab.ssh(host, f"ping -q -c 50 -i 0.002 -W 1 {lab.hosts[other]} || true")
    assert int(lab.ssh(other, count)) - before >= 50, "what the host sends still arrives"
    assert lab.fault("heal", host) == [f"healed {host}"]
    assert lab.fault("heal", host) == []
    assert lab.hears(host, other)
    lab.fault("drop", host, "--from", other)
    lab.fault("cut", other)
    assert lab.up()["did"] == [f"healed {host}", f"joined {other}"]
    assert lab.hears(host, other)


def test_labs_live_side_by_side(lab: Lab, other: Lab) -> None:
    lab.up()
    other.up()
    lab.down()
    host = next(iter(other.hosts))
    assert other.ssh(host, "hostname").strip() == host
    assert other.up()["changed"] is False


def test_subnet_in_use_is_refused_and_nothing_is_made(lab: Lab) -> None:
    lab.up()
    thief = Lab("testc", "10.87.30.0/24")
    output = run(sys.executable, str(PROGRAM), "up", str(thief.config), check=False)
    assert "overlaps 10.87.30.0/24" in output
    assert "set another `lab_subnet`" in output
    thief.down()
    assert lab.up()["changed"] is False


def test_network_that_a_killed_lab_left_is_taken_away(lab: Lab) -> None:
    lab.up()
    bridge = lab.bridge()
    for host in lab.hosts:
        lab.fault("power-off", host)
    heir = Lab("testc", lab.subnet)
    heir.up()
    assert all(heir.reachable(host) for host in heir.hosts)
    assert not Path(f"/sys/class/net/{bridge}").exists()
    assert bridge not in run("nft", "list", "tables")
    heir.down()


def test_wrong_addresses_are_refused(lab: Lab) -> None:
    description = json.loads(lab.config.read_text())
    for hosts, words in (
        ({"a": "10.87.99.1"}, "is not a host address of 10.87.30.0/24"),
        ({"a": "10.87.30.1"}, "is not a host address"),
        ({"a": "10.87.30.5", "b": "10.87.30.5"}, "a and b both have address 10.87.30.5"),
    ):
        lab.config.write_text(json.dumps({**description, "hosts": hosts}))
        path = STATE / "labs" / f"{lab.name}.json"
        path.write_text(json.dumps({**description, "hosts": hosts}))
        assert words in run(sys.executable, str(PROGRAM), "up", str(path), check=False)


@pytest.mark.parametrize("seconds", [0.2, 0.6, 1.2])
def test_killed_up_is_finished_by_the_next_and_removed_without_a_trace(lab: Lab, seconds: float) -> None:
    started = subprocess.Popen([*SUDO, sys.executable, str(PROGRAM), "up", str(lab.config)], stdout=subprocess.DEVNULL)
    time.sleep(seconds)
    started.send_signal(signal.SIGKILL)
    started.wait()
    lab.up()
    bridge = lab.bridge()
    assert set(lab.traces(bridge)) >= {"mounts", "bridge", "nft table", "processes", "files"}, "traces() must see a running lab"
    lab.down()
    assert lab.traces(bridge) == {}


def test_up_killed_right_after_it_made_the_bridge_is_finished_by_the_next(lab: Lab) -> None:
    lab.up()
    bridge = lab.bridge()
    assert Path(f"/sys/class/net/{bridge}/bridge").exists(), f"{bridge} is no bridge, so not this lab's"
    run("ip", "address", "flush", "dev", bridge)
    run("ip", "link", "set", bridge, "down")
    lab.up()
    assert lab.ssh(next(iter(lab.hosts)), "hostname").strip() in lab.hosts


def test_second_host_downloads_nothing(lab: Lab) -> None:
    lab.up()
    log = STATE / "apt-cache/log/apt-cacher.log"
    first, second = lab.hosts
    install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends tree >/dev/null 2>&1; tree --version"
    assert "tree" in lab.ssh(first, install)
    time.sleep(1)
    seen = len(run("cat", str(log)).splitlines())
    assert "tree" in lab.ssh(second, install)
    deadline = time.monotonic() + 60
    # of this package alone: other labs fetch theirs meanwhile
    while not (lines := [line for line in run("cat", str(log)).splitlines()[seen:] if "/tree_" in line and line.endswith(".deb")]):
        assert time.monotonic() < deadline, "the package cache logged no package for the second host"
        time.sleep(0.5)
    assert not [line for line in lines if "|I|" in line], f"downloaded again: {lines}"

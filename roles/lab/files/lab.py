#!/usr/bin/env python3
"""Real systemd hosts on one machine: boot and remove the hosts of a lab, and do to them what happens to real ones.

    lab.py up CONFIG.json      boot what CONFIG describes, without faults; prints {"changed": bool, "did": [...]}
    lab.py down LAB_DIR...     remove these labs: processes, mounts, bridge, nftables table, cgroups, files
    lab.py down --all STATE    remove every lab recorded below STATE

    lab.py power-off LAB_DIR HOST...             cut the power; the disk stays
    lab.py power-on LAB_DIR HOST...              boot again, and wait until ssh answers
    lab.py renew LAB_DIR HOST...                 a new, empty machine of the same name, address and ssh host key
    lab.py cut LAB_DIR HOST...                   take the link down; join takes it up again
    lab.py drop LAB_DIR HOST... --from OTHER...  lose every packet that comes from OTHER, one way; heal ends it

Faults print what `up` prints, and one that is there already changes nothing. Cut links and lost packets end when
their host is switched off or reboots, because they live in its network namespace.

Each host is `systemd-nspawn --boot` on an overlay over one shared base image. Everything that a lab creates is
recorded below its folder (`STATE/labs/NAME`) before it is created, so `down` works after any interruption.

CONFIG: {"name": str, "subnet": "10.87.1.0/24", "state": path, "hosts": {name: address}, "suite": str,
         "packages": [str]}. The first address of the subnet is the bridge's. Must run as root.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REBOOT_EXIT_STATUS = 133  # systemd-nspawn under --keep-unit asks its caller to start it again
BOOT_LIMIT_SECONDS = 120
CACHE_PORT_IN_LAB = 3142
IMAGE_VERSION = "3"
DROP_TABLE = "evenkeel_lab"
BRIDGE_NAME = re.compile("ek[0-9a-f]{8}")
FAULTS = {
    "power-off": "cut the power of hosts",
    "power-on": "boot hosts that are off",
    "renew": "replace hosts by new, empty ones",
    "cut": "take hosts' links down",
    "join": "take hosts' links up",
    "drop": "lose what comes from other hosts",
    "heal": "lose nothing any more",
}
SYSCTLS = {"net.ipv4.ip_forward": 1, "fs.inotify.max_user_instances": 1024, "fs.inotify.max_user_watches": 524288}
# Links of lab hosts get no IPv6 address by themselves (1): at each one, browsers on this machine break off what they load.
ADDRESS_MODE = "net.ipv6.conf.default.addr_gen_mode"


class LabError(Exception):
    """What went wrong, in one sentence for the person who typed the command."""


@dataclass(frozen=True)
class Lab:
    """A lab's description, as recorded in `lab.json`."""

    name: str
    subnet: str
    state: str
    hosts: dict[str, str]
    suite: str
    packages: list[str]

    @property
    def directory(self) -> Path:
        return Path(self.state) / "labs" / self.name

    @property
    def network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(self.subnet)

    @property
    def gateway(self) -> str:
        return str(next(self.network.hosts()))

    @property
    def bridge(self) -> str:
        """The bridge's interface name (at most 15 bytes), the same for the same lab in the same state folder."""
        return "ek" + hashlib.sha256(f"{self.state}/{self.name}".encode()).hexdigest()[:8]

    @property
    def table(self) -> str:
        return f"evenkeel_{self.bridge}"

    def host_dir(self, host: str) -> Path:
        return self.directory / "hosts" / host

    def machine(self, host: str) -> str:
        return f"{self.bridge}-{host}"


# --- small helpers -----------------------------------------------------------------------------------------------


def run(*argv: str, stdin: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command; a failure becomes a LabError with the command's own last words."""
    done = subprocess.run(argv, input=stdin, text=True, capture_output=True, check=False)
    if check and done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise LabError(f"`{' '.join(argv)}` failed ({done.returncode}): {' / '.join(words)}")
    return done


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.chmod(mode)
    temporary.rename(path)


def poll(limit_seconds: float, what: str, probe: Callable[[], bool]) -> None:
    """Wait until `probe` is true; a LabError that names `what` when the limit passes."""
    deadline = time.monotonic() + limit_seconds
    while not probe():
        if time.monotonic() > deadline:
            raise LabError(f"waited {limit_seconds:.0f} s for {what}")
        time.sleep(0.1)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, so that two runs never build the same image or start the same daemon."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def process_start(pid: int) -> str | None:
    """The start time of a process in clock ticks, which tells it from a later one with the same id; None when gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def record_process(path: Path, pid: int) -> None:
    write(path, json.dumps({"pid": pid, "start": process_start(pid)}))


def recorded_process(path: Path) -> int | None:
    """The id of the process recorded at `path`, if that very process still runs."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    alive = process_start(record["pid"])
    return int(record["pid"]) if alive is not None and alive == record["start"] else None


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def kill(pid: int | None, number: signal.Signals) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def mounted(path: Path) -> bool:
    return str(path) in {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def systemd_is_init() -> bool:
    return Path("/run/systemd/system").is_dir()


def own_scope(description: str) -> list[str]:
    """Put before a daemon's command (it stays the same process), so that it does not end with its caller's unit."""
    if not systemd_is_init():
        return []
    return ["systemd-run", "--scope", "--quiet", "--collect", f"--description={description}"]


# --- the machine's package settings, and the cache of downloaded packages ---------------------------------------------


def apt_settings() -> dict[str, str]:
    """The controller's own apt settings that its hosts need too (validity checks, proxies)."""
    wanted = ("Acquire::Check-Valid-Until", "Acquire::Check-Date", "Acquire::http::Proxy", "Acquire::https::Proxy")
    settings = {}
    for line in run("apt-config", "dump").stdout.splitlines():
        name, _, value = line.rstrip(";").partition(" ")
        if name in wanted and value.strip('"'):
            settings[name] = value.strip('"')
    return settings


def apt_sources() -> dict[Path, str]:
    """The controller's package sources, by path."""
    folder = Path("/etc/apt")
    files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    sources = {f: f.read_text() for f in files if f.suffix in {".list", ".sources"} and f.is_file()}
    return {path: text for path, text in sources.items() if text.strip()}


def package_cache_file(state: Path) -> Path:
    return state / "apt-cache" / "daemon.json"


def free_port(preferred: int | None) -> int:
    """A free loopback port below 32768 (apt-cacher-ng cannot bind a higher one), the preferred one if it can be had."""
    candidates: list[int] = [*([preferred] if preferred else []), *range(31420, 32768)]
    for port in candidates:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise LabError("no free port between 31420 and 32767 for the package cache")


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def start_package_cache(state: Path) -> tuple[int, bool]:
    """Run apt-cacher-ng for all labs of this state folder on a loopback port; returns (port, started now)."""
    folder = state / "apt-cache"
    port_file = folder / "port"
    with locked(folder / "lock"):
        preferred = int(port_file.read_text()) if port_file.exists() else None
        daemon_id = recorded_process(package_cache_file(state))
        if daemon_id is not None and preferred and listens(preferred):
            return preferred, False
        kill(daemon_id, signal.SIGKILL)
        port = free_port(preferred)
        upstream = apt_settings().get("Acquire::http::Proxy")
        configuration = [
            f"CacheDir: {folder}/packages",
            f"LogDir: {folder}/log",
            "SupportDir: /usr/lib/apt-cacher-ng",
            "ReportPage:",
            "BindAddress: 127.0.0.1",
            f"Port: {port}",
            f"SocketPath: {folder}/socket",
            "ForeGround: 1",
            "PassThroughPattern: .*",
            "ExThreshold: 30",
        ] + ([f"Proxy: {upstream}"] if upstream else [])
        write(folder / "conf" / "acng.conf", "\n".join(configuration) + "\n")
        for name in ("packages", "log"):
            (folder / name).mkdir(exist_ok=True)
        with (folder / "daemon.log").open("a") as log:
            daemon = subprocess.Popen(
                [*own_scope("evenkeel package cache"), "/usr/sbin/apt-cacher-ng", "-c", str(folder / "conf")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
            )  # fmt: skip
        record_process(package_cache_file(state), daemon.pid)
        poll(20, f"the package cache on port {port} (see {folder}/daemon.log)", lambda: listens(port))
        write(port_file, str(port))
        return port, True


# --- the base image ------------------------------------------------------------------------------------------------


def ca_certificates() -> list[Path]:
    """Certificates that the controller trusts besides Debian's: its hosts must trust them too."""
    return sorted(Path("/usr/local/share/ca-certificates").glob("**/*.crt"))


def image_key(lab: Lab) -> str:
    parts = [IMAGE_VERSION, lab.suite, *sorted(lab.packages), *apt_sources().values(), json.dumps(apt_settings())]
    parts += [path.read_text() for path in ca_certificates()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def build_image(lab: Lab, cache_port: int) -> tuple[Path, bool]:
    """Make the base image with mmdebstrap unless the one for these inputs is there; returns (root, built now)."""
    images = Path(lab.state) / "images"
    root = images / image_key(lab)
    with locked(images / "lock"):
        if root.is_dir():
            return root, False
        mounts = Path("/proc/self/mountinfo").read_text()
        for old in (path for path in images.glob("*") if path.is_dir() and f"{path}," not in mounts):
            shutil.rmtree(old)
        partial = root.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        options = [f'{name} "{value}"' for name, value in apt_settings().items() if "Proxy" not in name]
        options += [f'Acquire::http::Proxy "http://127.0.0.1:{cache_port}"', 'Acquire::Languages "none"']
        sources = [str(path) for path in apt_sources()]
        if not sources:
            raise LabError("this machine has no package sources in /etc/apt: the lab installs its hosts from them")
        run(
            # a process namespace that ends with this program: a SIGKILL leaves no build behind
            "setpriv", "--pdeathsig=KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
            # a server knows its package lists, and `--check` on a fresh host needs them
            "mmdebstrap", "--variant=minbase", "--format=directory", "--quiet", "--skip=cleanup/apt/lists",
            f"--include={','.join(lab.packages)}", *[f"--aptopt={option}" for option in options],
            f"--customize-hook={hook()} \"$1\"", lab.suite, str(partial), *sources,
        )  # fmt: skip
        partial.rename(root)
        return root, True


def hook() -> str:
    """The command that mmdebstrap runs on the unpacked root: this program."""
    return f"{sys.executable} {Path(__file__).resolve()} image-hook"


def finish_image(root: Path) -> None:
    """Make an unpacked Debian a host: trust, network by systemd-networkd, empty identity, package settings."""
    for path in ca_certificates():
        shutil.copy(path, root / "usr/local/share/ca-certificates" / path.name)
    run("chroot", str(root), "update-ca-certificates")
    settings = [f'{name} "{value}";' for name, value in apt_settings().items() if "Proxy" not in name]
    (root / "etc/apt/apt.conf.d/90lab").write_text("\n".join([*settings, 'Acquire::Languages "none";', ""]))
    (root / "etc/apt/apt.conf.d/99mmdebstrap").unlink(missing_ok=True)  # names the cache's address during the build
    (root / "etc/machine-id").write_text("")
    (root / "var/lib/dbus/machine-id").unlink(missing_ok=True)
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    (root / "etc/systemd/system/multi-user.target.wants").mkdir(parents=True, exist_ok=True)
    run("chroot", str(root), "systemctl", "enable", "systemd-networkd.service", "ssh.service")
    run("chroot", str(root), "systemctl", "mask", "systemd-networkd-wait-online.service", "getty.target",
        "console-getty.service", "apt-daily.timer", "apt-daily-upgrade.timer")  # fmt: skip


# --- network ---------------------------------------------------------------------------------------------------------


def has_hosts(bridge: str) -> bool:
    """Whether a host of the lab with this bridge runs, whoever started it and from which state folder."""
    words = f"--machine={bridge}-".encode()
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words in command.read_bytes():
                return True
    return False


def claim_subnet(lab: Lab) -> None:
    """Two labs, or a lab and the machine's own network, must not share addresses.

    The bridge of a lab of which no host is left (its processes were killed, its folder perhaps deleted) is taken away.
    """
    for link in json.loads(run("ip", "-json", "-4", "address").stdout):
        name = link["ifname"]
        for address in link.get("addr_info", []):
            used = ipaddress.IPv4Interface(f"{address['local']}/{address['prefixlen']}").network
            if name == lab.bridge or not used.overlaps(lab.network):
                continue
            if BRIDGE_NAME.fullmatch(name) and not has_hosts(name):
                run("ip", "link", "delete", name)
                run("nft", "delete", "table", "ip", f"evenkeel_{name}", check=False)
                continue
            raise LabError(
                f"lab {lab.name}: subnet {lab.subnet} overlaps {used} of interface {name}; another lab "
                f"or network uses it. Remove that lab (`make clean` in its checkout) or set another `lab_subnet`"
            )


def sysctl_path(name: str) -> Path:
    return Path("/proc/sys") / name.replace(".", "/")


def raise_sysctls(state: Path) -> None:
    """Raise the kernel's settings to what many hosts need, and keep what was there before for the last `down`."""
    file = state / "labs" / "sysctls.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    modes = {ADDRESS_MODE: 1} if sysctl_path(ADDRESS_MODE).exists() else {}  # not in a kernel without IPv6
    for name, wanted in (SYSCTLS | modes).items():
        now = int(sysctl_path(name).read_text())
        if now < wanted or (name in modes and now != wanted):
            before.setdefault(name, now)
            write(file, json.dumps(before))
            sysctl_path(name).write_text(str(wanted))


def restore_sysctls(state: Path) -> None:
    file = state / "labs" / "sysctls.json"
    others = list(Path("/sys/class/net").glob("ek????????"))  # labs of another state folder, which need them too
    if file.exists() and not others:
        for name, value in json.loads(file.read_text()).items():
            sysctl_path(name).write_text(str(value))
        file.unlink()


def raise_network(lab: Lab, cache_port: int) -> bool:
    """Bridge, address, masquerade, and the package cache at the bridge's address; returns whether the bridge is new."""
    created = not Path(f"/sys/class/net/{lab.bridge}").exists()
    if created:
        claim_subnet(lab)
        run("ip", "link", "add", lab.bridge, "type", "bridge")
    # whoever made the bridge may have been killed before it did this
    run("ip", "address", "replace", f"{lab.gateway}/{lab.network.prefixlen}", "dev", lab.bridge)
    run("ip", "link", "set", lab.bridge, "up")
    # lets the DNAT below reach a daemon that listens on loopback only
    sysctl_path(f"net.ipv4.conf.{lab.bridge}.route_localnet").write_text("1")
    rules = f"""
        table ip {lab.table} {{}}
        delete table ip {lab.table}
        table ip {lab.table} {{
            chain prerouting {{
                type nat hook prerouting priority dstnat;
                iifname "{lab.bridge}" ip daddr {lab.gateway} tcp dport {CACHE_PORT_IN_LAB} dnat to 127.0.0.1:{cache_port}
            }}
            chain postrouting {{
                type nat hook postrouting priority srcnat;
                ip saddr {lab.subnet} oifname != "{lab.bridge}" masquerade
            }}
            chain forward {{
                type filter hook forward priority filter;
                iifname "{lab.bridge}" accept
                oifname "{lab.bridge}" accept
            }}
        }}"""
    run("nft", "-f", "-", stdin=rules)
    return created


# --- hosts ---------------------------------------------------------------------------------------------------------


def cgroup_dirs(machine: str) -> list[Path]:
    """Where this host's control groups go when nobody (no systemd as PID 1) makes them for us."""
    top = Path("/sys/fs/cgroup")
    hierarchies = [top / "systemd", top / "unified"] if (top / "systemd").is_dir() else [top]
    return [hierarchy / "evenkeel" / machine for hierarchy in hierarchies if hierarchy.is_dir()]


def unit_name(machine: str) -> str:
    return f"evenkeel-{machine}.service"


def leader(lab: Lab, host: str) -> int | None:
    """The host's PID 1 as the controller sees it."""
    if systemd_is_init():
        shown = run("systemctl", "show", "--property=MainPID", "--value", unit_name(lab.machine(host)), check=False)
        nspawn = int(shown.stdout.strip() or 0) or None
    else:
        supervisor = recorded_process(lab.host_dir(host) / "supervisor.json")
        nspawn = next(iter(children(supervisor)), None) if supervisor else None
    return next(iter(children(nspawn)), None) if nspawn else None


def prepare_root(lab: Lab, host: str, image: Path) -> Path:
    """Mount the host's overlay and write its identity: address, host key, authorized key, package cache.

    What the host has had since its first boot is its own, but for the address: roles and people may have changed it.
    """
    folder = lab.host_dir(host)
    root = folder / "root"
    for name in ("root", "upper", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if not mounted(root):
        options = f"lowerdir={image},upperdir={folder}/upper,workdir={folder}/work"
        run("mount", "-t", "overlay", "overlay", "-o", options, str(root))
    key = folder / "ssh_host_ed25519_key"
    network = ["[Match]", "Name=host0", "[Network]", f"Address={lab.hosts[host]}/{lab.network.prefixlen}",
               f"Gateway={lab.gateway}", "LinkLocalAddressing=no", ""]  # fmt: skip
    identity = {
        "etc/systemd/network/10-lab.network": "\n".join(network),
        "etc/hostname": f"{host}\n",
        "etc/hosts": f"127.0.0.1 localhost\n::1 localhost\n{lab.hosts[host]} {host}\n",
        "etc/apt/apt.conf.d/91lab-cache": f'Acquire::http::Proxy "http://{lab.gateway}:{CACHE_PORT_IN_LAB}";\n',
        f"etc/ssh/{key.name}.pub": key.with_suffix(".pub").read_text(),
    }
    secret = {
        f"etc/ssh/{key.name}": key.read_text(),
        "root/.ssh/authorized_keys": (lab.directory / "id_ed25519.pub").read_text(),
    }
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    for path, text in {**identity, **secret}.items():
        if path.startswith("etc/systemd/network") or not (folder / "upper" / path).exists():
            write(root / path, text, 0o600 if path in secret else 0o644)
    return root


def nspawn_command(lab: Lab, host: str) -> list[str]:
    return [
        "systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--console=pipe",
        f"--directory={lab.host_dir(host) / 'root'}", f"--machine={lab.machine(host)}", f"--hostname={host}",
        # as on a host of its own: programs may put themselves into a Landlock sandbox
        "--system-call-filter=landlock_create_ruleset landlock_add_rule landlock_restrict_self",
        f"--network-bridge={lab.bridge}", "--resolv-conf=copy-host", "--link-journal=no", "--timezone=off",
    ]  # fmt: skip


def boot(lab: Lab, host: str) -> None:
    """Start the host's supervisor; it outlives this program."""
    console = lab.host_dir(host) / "console.log"
    if systemd_is_init():
        run(
            "systemd-run", "--quiet", "--collect", f"--unit={unit_name(lab.machine(host))}", "-p", "Delegate=yes",
            "-p", "KillMode=mixed", "-p", "Restart=no", "-p", f"RestartForceExitStatus={REBOOT_EXIT_STATUS}",
            "-p", f"SuccessExitStatus={REBOOT_EXIT_STATUS}", "-p", "StartLimitIntervalSec=0", "-p", "TasksMax=infinity",
            "-p", f"StandardOutput=append:{console}", "-p", f"StandardError=append:{console}",
            *nspawn_command(lab, host),
        )  # fmt: skip
        return
    with console.open("a") as log:
        supervisor = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "supervise", str(lab.directory), host],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
        )  # fmt: skip
    record_process(lab.host_dir(host) / "supervisor.json", supervisor.pid)


def supervise(directory: Path, host: str) -> int:
    """Keep one host running: its own control groups, and a new start after each reboot. Runs until the host is off."""
    lab = load(directory)
    record_process(lab.host_dir(host) / "supervisor.json", os.getpid())
    for group in cgroup_dirs(lab.machine(host)):
        group.mkdir(parents=True, exist_ok=True)

    def enter_groups() -> None:
        for group in cgroup_dirs(lab.machine(host)):
            (group / "cgroup.procs").write_text(str(os.getpid()))

    status = REBOOT_EXIT_STATUS
    while status == REBOOT_EXIT_STATUS:
        # preexec_fn is safe here: this process has one thread
        status = subprocess.run(nspawn_command(lab, host), check=False, preexec_fn=enter_groups).returncode
    return status


def answers_ssh(address: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, 22), timeout=1) as connection:
        connection.settimeout(2)
        return connection.recv(4) == b"SSH-"
    return False


def settled(lab: Lab, host: str) -> bool:
    """Whether the host's systemd has finished booting (`running` or `degraded`), asked inside the host."""
    pid = leader(lab, host)
    if pid is None:
        return False
    asked = run("nsenter", f"--target={pid}", "--mount", "--uts", "--ipc", "--net", "--pid", "--",
                "systemctl", "is-system-running", check=False)  # fmt: skip
    return asked.stdout.strip() in {"running", "degraded"}


def ready_image(lab: Lab) -> tuple[Path, int, list[str]]:
    """What booting needs: the base image and the package cache; returns (image, the cache's port, what was done)."""
    port, started = start_package_cache(Path(lab.state))
    image, built = build_image(lab, port)
    did = [f"started the package cache on port {port}"] if started else []
    return image, port, did + ([f"built base image {image.name}"] if built else [])


def start(lab: Lab, hosts: Iterable[str], image: Path) -> list[str]:
    """Boot those of the hosts that are off, side by side; returns which."""
    booted = []
    for host in hosts:
        if leader(lab, host) is None:
            power_off(lab, host)
            prepare_root(lab, host, image)
            boot(lab, host)
            booted.append(host)
    return booted


def await_hosts(lab: Lab, hosts: Iterable[str]) -> None:
    """Wait until the hosts have booted and answer ssh."""
    for host in hosts:
        address, log = lab.hosts[host], lab.host_dir(host) / "console.log"
        poll(BOOT_LIMIT_SECONDS, f"{host} to boot (see {log})", lambda h=host: settled(lab, h))  # type: ignore[misc]
        poll(BOOT_LIMIT_SECONDS, f"ssh on {host} ({address})", lambda a=address: answers_ssh(a))  # type: ignore[misc]


def power_off(lab: Lab, host: str) -> None:
    """Cut a host's power (SIGKILL of its PID 1) and release what it held: process, overlay, control groups."""
    machine = lab.machine(host)
    supervisor = recorded_process(lab.host_dir(host) / "supervisor.json")
    kill(leader(lab, host), signal.SIGKILL)
    if systemd_is_init():
        run("systemctl", "stop", unit_name(machine), check=False)
    elif supervisor is not None:
        deadline = time.monotonic() + 10
        while process_start(supervisor) is not None and time.monotonic() < deadline:
            kill(leader(lab, host), signal.SIGKILL)  # a host that was just rebooting has a new PID 1
            time.sleep(0.1)
        for pid in [*children(supervisor), supervisor]:
            kill(pid, signal.SIGKILL)
    root = lab.host_dir(host) / "root"
    deadline = time.monotonic() + 20
    while mounted(root) and run("umount", "--recursive", str(root), check=False).returncode:
        if time.monotonic() > deadline:
            raise LabError(f"cannot unmount {root}: something on this machine still uses it (`fuser -vm {root}`)")
        time.sleep(0.2)
    for group in cgroup_dirs(machine):
        for folder in sorted((p for p in group.rglob("*") if p.is_dir()), reverse=True) if group.exists() else []:
            with contextlib.suppress(OSError):
                folder.rmdir()
        for folder in (group, group.parent):
            with contextlib.suppress(OSError):
                folder.rmdir()


# --- faults ----------------------------------------------------------------------------------------------------------


def in_network(lab: Lab, host: str, *argv: str, stdin: str | None = None, check: bool = True) -> str:
    """Run a command of this machine in the host's network namespace."""
    pid = leader(lab, host)
    if pid is None:
        raise LabError(f"{host} is off: `lab.py power-on {lab.directory} {host}` boots it")
    return run("nsenter", f"--target={pid}", "--net", "--", *argv, stdin=stdin, check=check).stdout


def set_link(lab: Lab, host: str, up: bool) -> bool:
    """Take the host's link up or down; returns whether that changed it."""
    if ("UP" in json.loads(in_network(lab, host, "ip", "-json", "link", "show", "host0"))[0]["flags"]) == up:
        return False
    in_network(lab, host, "ip", "link", "set", "host0", "up" if up else "down")
    if up:
        poll(BOOT_LIMIT_SECONDS, f"ssh on {host} ({lab.hosts[host]})", lambda: answers_ssh(lab.hosts[host]))
    return True


def dropped(lab: Lab, host: str) -> set[str]:
    """The addresses whose packets the host loses."""
    listed = in_network(lab, host, "nft", "-json", "list", "set", "ip", DROP_TABLE, "dropped", check=False)
    objects = json.loads(listed)["nftables"] if listed else []
    return {address for entry in objects for address in entry.get("set", {}).get("elem", [])}


def set_dropped(lab: Lab, host: str, addresses: set[str]) -> bool:
    """Lose what comes from these addresses and nothing else, before any other rule sees it; returns whether that changed it."""
    if dropped(lab, host) == addresses:
        return False
    rules = f"""
        table ip {DROP_TABLE} {{}}
        delete table ip {DROP_TABLE}
        """
    if addresses:
        rules += f"""table ip {DROP_TABLE} {{
            set dropped {{
                type ipv4_addr
                elements = {{ {", ".join(sorted(addresses))} }}
            }}
            chain prerouting {{
                type filter hook prerouting priority -500
                ip saddr @dropped drop
            }}
        }}"""
    in_network(lab, host, "nft", "-f", "-", stdin=rules)
    return True


def heal(lab: Lab, host: str) -> list[str]:
    """End what `cut` and `drop` did to a host that runs; returns what was done."""
    did = [f"joined {host}"] if set_link(lab, host, up=True) else []
    return did + ([f"healed {host}"] if set_dropped(lab, host, set()) else [])


def fault(lab: Lab, command: str, hosts: list[str], others: list[str]) -> list[str]:
    """Do one of the commands to hosts of the lab; returns what was done."""
    for host in [*hosts, *others]:
        if host not in lab.hosts:
            raise LabError(f"lab {lab.name} has no host {host}; it has {', '.join(lab.hosts)}")
    match command:
        case "power-off":
            running = [host for host in hosts if leader(lab, host) is not None]
            for host in running:
                set_link(lab, host, up=False)  # without power nobody says goodbye: no connection is closed
            for host in hosts:
                power_off(lab, host)
            return [f"switched {host} off" for host in running]
        case "power-on" | "renew":
            image, _, did = ready_image(lab)
            for host in hosts if command == "renew" else []:
                power_off(lab, host)
                for name in ("upper", "work"):
                    shutil.rmtree(lab.host_dir(host) / name, ignore_errors=True)
                did.append(f"emptied {host}")
            did += [f"booted {host}" for host in start(lab, hosts, image)]
            await_hosts(lab, hosts)
            return did
        case "cut":
            return [f"cut {host}" for host in hosts if set_link(lab, host, up=False)]
        case "join":
            return [f"joined {host}" for host in hosts if set_link(lab, host, up=True)]
        case "drop":
            lost = {host: {lab.hosts[other] for other in others if other != host} for host in hosts}
            done = [host for host in hosts if set_dropped(lab, host, dropped(lab, host) | lost[host])]
            return [f"{host} loses what comes from {', '.join(others)}" for host in done]
        case "heal":
            return [f"healed {host}" for host in hosts if set_dropped(lab, host, set())]
        case _:
            raise LabError(f"{command} is no fault")


# --- keys and the operator's ssh configuration ---------------------------------------------------------------------


def make_key(path: Path, comment: str) -> None:
    if not path.exists() or not path.with_suffix(".pub").exists():
        path.unlink(missing_ok=True)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path))


def write_ssh_files(lab: Lab) -> None:
    """Keys, known hosts and an ssh configuration of the lab's own: `ssh -F STATE/labs/NAME/ssh_config HOST`."""
    make_key(lab.directory / "id_ed25519", f"lab-{lab.name}")
    known, config = [], []
    for host, address in lab.hosts.items():
        lab.host_dir(host).mkdir(parents=True, exist_ok=True)
        make_key(lab.host_dir(host) / "ssh_host_ed25519_key", host)
        public = (lab.host_dir(host) / "ssh_host_ed25519_key.pub").read_text().split()
        known.append(f"{host},{address} {public[0]} {public[1]}\n")
        config.append(f"Host {host} {address}\n  HostName {address}\n")
    config.append("\n".join([
        "Host *", "  User root", f'  IdentityFile "{lab.directory}/id_ed25519"', "  IdentitiesOnly yes",
        f'  UserKnownHostsFile "{lab.directory}/known_hosts"', "  StrictHostKeyChecking yes",
                # connections that Ansible keeps open end soon after their host is gone
                "  ServerAliveInterval 10",
                "  ServerAliveCountMax 3", "  LogLevel ERROR", "",
    ]))  # fmt: skip
    write(lab.directory / "known_hosts", "".join(known))
    write(lab.directory / "ssh_config", "".join(config))
    owner = Path(lab.state).stat()
    for path in [lab.directory, *lab.directory.glob("*")]:
        os.chown(path, owner.st_uid, owner.st_gid)


# --- commands --------------------------------------------------------------------------------------------------------


def load(directory: Path) -> Lab:
    if not (directory / "lab.json").exists():
        raise LabError(f"there is no lab in {directory}")
    return Lab(**json.loads((directory / "lab.json").read_text()))


def check(lab: Lab) -> None:
    """Refuse a description that cannot work, before anything is made."""
    taken: dict[str, str] = {}
    for host, address in lab.hosts.items():
        if ipaddress.IPv4Address(address) not in lab.network or address == lab.gateway:
            raise LabError(f"lab {lab.name}: address {address} of {host} is not a host address of {lab.subnet} "
                           f"({lab.gateway} is the bridge's)")  # fmt: skip
        if address in taken:
            raise LabError(f"lab {lab.name}: {taken[address]} and {host} both have address {address}")
        taken[address] = host
    if not lab.hosts:
        raise LabError(f"lab {lab.name}: no hosts")
    if len(str(lab.directory)) > 200:
        raise LabError(f"the state folder's path is too long: {lab.state}")


def up(lab: Lab) -> list[str]:
    """Bring the lab to what its description says; returns what was done."""
    check(lab)
    did: list[str] = []
    state = Path(lab.state)
    known = load(lab.directory) if (lab.directory / "lab.json").exists() else None
    if known is not None and known.subnet != lab.subnet:
        down(lab.directory)
        did.append(f"removed the lab on {known.subnet}")
        known = None
    write(lab.directory / "lab.json", json.dumps(asdict(lab), indent=2))
    for host in set(known.hosts if known else {}) - set(lab.hosts):
        power_off(known or lab, host)
        shutil.rmtree(lab.host_dir(host), ignore_errors=True)
        did.append(f"removed {host}")
    raise_sysctls(state)
    image, port, made = ready_image(lab)
    did += made
    did += [f"created bridge {lab.bridge}"] if raise_network(lab, port) else []
    write_ssh_files(lab)
    booted = start(lab, lab.hosts, image)
    did += [line for host in lab.hosts if host not in booted for line in heal(lab, host)]
    await_hosts(lab, lab.hosts)
    return did + [f"booted {host}" for host in booted]


def down(directory: Path) -> list[str]:
    """Remove a lab by what it recorded."""
    if not (directory / "lab.json").exists():
        return []
    lab = load(directory)
    folders = [path.name for path in (directory / "hosts").glob("*")]
    for host in sorted({*lab.hosts, *folders}):
        power_off(lab, host)
    if Path(f"/sys/class/net/{lab.bridge}").exists():
        run("ip", "link", "delete", lab.bridge)
    run("nft", "delete", "table", "ip", lab.table, check=False)
    shutil.rmtree(directory)
    directory.with_suffix(".json").unlink(missing_ok=True)
    state = Path(lab.state)
    if not list((state / "labs").glob("*/lab.json")):
        with locked(state / "apt-cache" / "lock"):
            kill(recorded_process(package_cache_file(state)), signal.SIGTERM)
            package_cache_file(state).unlink(missing_ok=True)
        restore_sysctls(state)
    return [f"removed lab {lab.name}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="boot a lab").add_argument("config", type=Path)
    removal = commands.add_parser("down", help="remove labs")
    removal.add_argument("--all", type=Path, metavar="STATE", help="every lab recorded below STATE")
    removal.add_argument("directories", type=Path, nargs="*")
    for name, purpose in FAULTS.items():
        command = commands.add_parser(name, help=purpose)
        command.add_argument("directory", type=Path, metavar="LAB_DIR")
        command.add_argument("hosts", nargs="+", metavar="HOST")
        if name == "drop":
            command.add_argument("--from", dest="others", nargs="+", required=True, metavar="OTHER")
    commands.add_parser("image-hook").add_argument("root", type=Path)
    supervision = commands.add_parser("supervise")
    supervision.add_argument("directory", type=Path)
    supervision.add_argument("host")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    try:
        if os.geteuid() != 0:
            raise LabError("the lab boots hosts, so it must run as root: use sudo")
        if options.command == "supervise":
            return supervise(options.directory, options.host)
        if options.command == "image-hook":
            finish_image(options.root)
            return 0
        if options.command == "up":
            did = up(Lab(**json.loads(options.config.read_text())))
        elif options.command in FAULTS:
            did = fault(load(options.directory), options.command, options.hosts, getattr(options, "others", []))
        else:
            recorded = sorted(path.parent for path in (options.all / "labs").glob("*/lab.json")) if options.all else []
            did = [line for folder in [*options.directories, *recorded] for line in down(folder)]
        result = {"changed": bool(did), "did": did}
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

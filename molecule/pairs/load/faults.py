"""What is done to the platform. Each fault proves that it is real, names whom it hit, and is undone whatever happens.

The body of a `with` runs while the fault lasts; kills last no time, because what was killed comes back by itself.
"""

from __future__ import annotations

import functools
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from .places import CLUSTERS, NotInTimeError, Platform, until

#: A new leader must be there by then; how soon it was is measured, not asserted.
TAKEOVER_LIMIT_SECONDS = 90
#: For units whose clock is ahead: read by their Python programs, but not by the suite's, which are isolated and run before them. Debian's
#: libfaketime breaks either Python's locks or, told to leave the monotonic clock alone, its `sleep`, which is mended here.
CLOCK_FOLDER = "/run/evenkeel-clock"
CLOCK_SETTING = f"[Service]\nEnvironment=PYTHONPATH={CLOCK_FOLDER} PYTHONDONTWRITEBYTECODE=1\n"
CLOCK_PROGRAM = """import os, select, sys, time
if "FAKETIME" in os.environ:
    time.sleep = lambda seconds: select.select([], [], [], seconds) and None
else:
    os.environ |= {"LD_PRELOAD": "/usr/$LIB/faketime/libfaketime.so.1", "FAKETIME": "+120s",
                   "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
"""


@dataclass(frozen=True)
class Fault:
    """One thing that happens to the platform."""

    title: str
    inflict: Callable[[Platform], AbstractContextManager[str]]
    #: Whose writes it may interrupt: clusters, `redis`. All others must go on without one failed write.
    interrupts: frozenset[str]
    #: How long it lasts at least; 0 for what heals by itself.
    lasts_seconds: float = 0
    #: Whose interruption is promised to be at most so many seconds.
    promise: tuple[str, float] | None = None


def kill(platform: Platform, host: str, unit: str, signal: str = "KILL", whom: str = "all") -> None:
    """Send a signal to processes of a unit (`main` or `all`); its main process is gone or another afterwards, or stopped."""
    show = f"systemctl show --property MainPID --value {unit}"
    test = '[ "$after" != "$before" ]' if signal == "KILL" else "grep -q '^State:.*T' /proc/$before/status"
    platform.ssh(
        host,
        f"before=$({show}); [ $before -gt 1 ] && systemctl kill --signal={signal} --kill-whom={whom} {unit} && "
        f"for i in $(seq 100); do sleep 0.1; after=$({show}); {test} && exit; done; echo {unit} did not notice >&2; exit 1",
    )


@contextmanager
def off(platform: Platform, *hosts: str) -> Iterator[str]:
    """Cut the power of hosts; it comes back at the end."""
    platform.machine("power-off", *hosts)
    try:
        for host in hosts:
            if platform.reachable(host):
                raise NotInTimeError(f"{host} was switched off and still answers")
        yield ", ".join(hosts)
    finally:
        platform.machine("power-on", *hosts)


@contextmanager
def unplugged(platform: Platform, host: str) -> Iterator[str]:
    """Take a host's link down; it runs on alone."""
    platform.machine("cut", host)
    try:
        if platform.reachable(host):
            raise NotInTimeError(f"the link of {host} is down and it still answers")
        yield host
    finally:
        platform.machine("join", host)


def taken_over(platform: Platform, cluster: str, from_host: str) -> None:
    def led_by_another() -> bool:
        return any(
            platform.member(cluster, host).get("role") in ("primary", "master") for host in platform.hosts_of(cluster) if host != from_host
        )

    until(f"another primary of {cluster} than {from_host}", led_by_another, TAKEOVER_LIMIT_SECONDS)


# --- PostgreSQL --------------------------------------------------------------------------------------------------------


@contextmanager
def postmaster_killed(cluster: str, platform: Platform) -> Iterator[str]:
    host = platform.primary(cluster)
    port = platform.topology["postgresql"][cluster]["port"]
    asked = f"runuser -u postgres -- psql -p {port} -Atc"
    platform.ssh(
        host,
        f"""file=$({asked} 'show data_directory')/postmaster.pid; pid=$(head -n 1 $file); kill -KILL $pid;
        for i in $(seq 50); do sleep 0.1; kill -0 $pid 2>/dev/null || exit 0; done; echo the postmaster lives >&2; exit 1""",
    )
    yield host


@contextmanager
def patroni_killed(cluster: str, platform: Platform) -> Iterator[str]:
    host = platform.primary(cluster)
    kill(platform, host, f"patroni@{cluster}", whom="main")
    yield host


@contextmanager
def primary_off(cluster: str, platform: Platform) -> Iterator[str]:
    with off(platform, platform.primary(cluster)) as host:
        taken_over(platform, cluster, host)
        yield host


@contextmanager
def standby_off(cluster: str, platform: Platform) -> Iterator[str]:
    with off(platform, platform.standby(cluster)) as host:
        yield host


@contextmanager
def primary_unplugged(cluster: str, platform: Platform) -> Iterator[str]:
    with unplugged(platform, platform.primary(cluster)) as host:
        taken_over(platform, cluster, host)
        yield host


@contextmanager
def primary_deaf(cluster: str, platform: Platform) -> Iterator[str]:
    """The primary loses what comes from the voters and from its standby; they hear it, and so do its clients."""
    host = platform.primary(cluster)
    others = [*platform.hosts_of("etcd"), *(other for other in platform.hosts_of(cluster) if other != host)]
    platform.machine("drop", host, others=others)
    try:
        port, address = platform.topology["etcd"]["port"], platform.address(others[0])
        platform.ssh(host, f"! timeout 2 bash -c '</dev/tcp/{address}/{port}' 2>/dev/null")
        taken_over(platform, cluster, host)
        yield host
    finally:
        platform.machine("heal", host)


@contextmanager
def switched_over(cluster: str, platform: Platform) -> Iterator[str]:
    lead = platform.redis_master if cluster == "redis" else functools.partial(platform.primary, cluster)
    before = lead()
    platform.playbook("switchover", "-e", f"cluster={cluster}")
    until(f"{cluster} to be led by another than {before}", lambda: lead() != before, 20)
    yield f"{before} to {lead()}"


def clock_ahead_of(platform: Platform, host: str, units: list[str]) -> None:
    """Start units again with a clock two minutes ahead."""
    folders = [f"/run/systemd/system/{unit}.service.d" for unit in units]
    for command in (
        "dpkg-query --show libfaketime >/dev/null 2>&1 || "
        "DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libfaketime >/dev/null",
        f"mkdir -p {CLOCK_FOLDER} {' '.join(folders)}",
        f"printf %s {shlex.quote(CLOCK_PROGRAM)} > {CLOCK_FOLDER}/sitecustomize.py",
        *(f"printf %s {shlex.quote(CLOCK_SETTING)} > {folder}/clock.conf" for folder in folders),
        f"systemctl daemon-reload && systemctl restart {' '.join(units)}",
        *(
            f"for second in $(seq 120); do grep -qsz FAKETIME=+120s /proc/$(systemctl show -p MainPID --value {unit})/environ && exit; "
            "sleep 1; done; exit 1"
            for unit in units
        ),
    ):
        platform.ssh(host, command, limit_seconds=240)


def clock_right(platform: Platform, host: str, units: list[str]) -> None:
    """Start them again with the host's clock."""
    folders = " ".join(f"/run/systemd/system/{unit}.service.d" for unit in units)
    platform.ssh(
        host,
        f"rm -rf {CLOCK_FOLDER}; for folder in {folders}; do rm -f $folder/clock.conf; rmdir --ignore-fail-on-non-empty $folder; done; "
        f"systemctl daemon-reload; systemctl restart {' '.join(units)}",
        limit_seconds=240,
    )


@contextmanager
def clock_ahead(cluster: str, platform: Platform) -> Iterator[str]:
    """A member's clock is two minutes ahead, and then this member leads; and so is a worker's."""
    member, worker = platform.standby(cluster), platform.hosts_of("worker")[-1]
    workers = [f"{platform.app['name']}-{name}" for name, each in platform.app["processes"].items() if each["kind"] == "worker"]
    places = {member: [f"patroni@{cluster}"], worker: workers}
    try:
        for host, units in places.items():
            clock_ahead_of(platform, host, units)
        try:
            until("everything to be well with a clock ahead", lambda: not platform.unwell(), 180)
        except NotInTimeError as error:
            raise NotInTimeError(f"{error}: {', '.join(platform.unwell())}") from None
        platform.playbook("switchover", "-e", f"cluster={cluster}")
        port = platform.topology["postgresql"][cluster]["port"]
        now = float(platform.ssh(member, f"runuser -u postgres -- psql -p {port} -Atc 'select extract(epoch from clock_timestamp())'"))
        if platform.primary(cluster) != member or not 100 < now - time.time() < 140:
            raise NotInTimeError(f"the clock of {member} is {now - time.time():.0f} s ahead, and {platform.primary(cluster)} leads")
        yield ", ".join(places)
    finally:
        for host, units in places.items():
            clock_right(platform, host, units)


# --- etcd and Redis ----------------------------------------------------------------------------------------------------


@contextmanager
def voters_stopped(number: int, platform: Platform) -> Iterator[str]:
    """The leader among the voters is stopped, and as many more as make up the number."""
    leader = platform.etcd_leader()
    voters = sorted(platform.hosts_of("etcd"), key=lambda host: host != leader)
    hosts, witness = voters[:number], voters[-1]
    try:
        for host in hosts:
            kill(platform, host, "etcd")
            platform.ssh(host, "systemctl stop etcd", limit_seconds=120)
        majority = number * 2 < len(voters)
        until(f"etcd on {witness} to notice", lambda: platform.etcd_healthy(witness) == majority, 30)
        yield ", ".join(hosts)
    finally:
        for host in hosts:
            platform.ssh(host, "systemctl start --no-block etcd")


@contextmanager
def master_killed(platform: Platform) -> Iterator[str]:
    host = platform.redis_master()
    kill(platform, host, "redis-server")
    yield host


def _another_master(platform: Platform, than: str) -> None:
    until(f"the Sentinels to name another master than {than}", lambda: platform.named_master() != than, TAKEOVER_LIMIT_SECONDS)


@contextmanager
def master_frozen(platform: Platform) -> Iterator[str]:
    host = platform.redis_master()
    kill(platform, host, "redis-server", "STOP")
    try:
        _another_master(platform, host)
        yield host
    finally:
        platform.ssh(host, "systemctl kill --signal=CONT redis-server")


@contextmanager
def master_unplugged(platform: Platform) -> Iterator[str]:
    with unplugged(platform, platform.redis_master()) as host:
        _another_master(platform, host)
        yield host


# --- the application and its front door ----------------------------------------------------------------------------------


@contextmanager
def web_and_worker_off(platform: Platform) -> Iterator[str]:
    with off(platform, platform.hosts_of("web")[0], platform.hosts_of("worker")[0]) as hosts:
        yield hosts


@contextmanager
def nginx_killed(platform: Platform) -> Iterator[str]:
    host = platform.address_holder()
    kill(platform, host, "nginx")
    yield host


@contextmanager
def proxy_off(platform: Platform) -> Iterator[str]:
    with off(platform, platform.address_holder()) as host:
        yield host


NOBODY: frozenset[str] = frozenset()
REDIS = frozenset({"redis"})
CORE, PLUGINS = CLUSTERS
#: A host of the Redis nodes carries a voter, too; faults of hosts are told from faults of programs.
FAULTS: tuple[Fault, ...] = (
    Fault("the primary's postmaster killed", functools.partial(postmaster_killed, CORE), frozenset({CORE}), promise=(CORE, 10)),
    Fault("Patroni killed on the primary", functools.partial(patroni_killed, PLUGINS), frozenset({PLUGINS})),
    Fault("the primary's host off", functools.partial(primary_off, CORE), frozenset({CORE}), 3, (CORE, 22)),
    Fault("the primary's link down", functools.partial(primary_unplugged, PLUGINS), frozenset({PLUGINS}), 3),
    Fault("the primary hears neither voters nor standby", functools.partial(primary_deaf, CORE), frozenset({CORE}), 3),
    Fault("the standby's host off", functools.partial(standby_off, PLUGINS), frozenset({PLUGINS}), 3),
    Fault("one voter of etcd gone", functools.partial(voters_stopped, 1), NOBODY, 8),
    Fault("etcd without quorum", functools.partial(voters_stopped, 2), NOBODY, 30),
    Fault("the Redis master killed", master_killed, REDIS, promise=("redis", 5)),
    Fault("the Redis master frozen", master_frozen, REDIS, 3, ("redis", 5)),
    Fault("the link of the Redis master's host down", master_unplugged, REDIS, 3, ("redis", 5)),
    Fault("a web host and a worker host off", web_and_worker_off, NOBODY, 10),
    Fault("nginx killed where the address is", nginx_killed, NOBODY),
    Fault("the proxy's host off that holds the address", proxy_off, NOBODY, 5),
    Fault("clock 2 minutes ahead on a worker and on a member that leads", functools.partial(clock_ahead, PLUGINS), frozenset({PLUGINS}), 3),
    Fault("planned switchover of core", functools.partial(switched_over, CORE), frozenset({CORE}), promise=(CORE, 3)),
    Fault("planned switchover of plugins", functools.partial(switched_over, PLUGINS), frozenset({PLUGINS}), promise=(PLUGINS, 3)),
    Fault("planned switchover of Redis", functools.partial(switched_over, "redis"), REDIS, promise=("redis", 1.5)),
)  # fmt: skip

"""A platform on lab hosts: who is where, who leads at the moment, what is not well, and commands on its hosts."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import requests
import yaml

from .broker import Connection

ROOT = Path(__file__).resolve().parents[3]
STATE = Path(os.environ.get("EVENKEEL_STATE") or Path.home() / ".local/state/evenkeel")
CLUSTERS = ("core", "plugins")
MASTER = "main"
#: Of each unit's journal, when something did not become well.
EVIDENCE_LINES, EVIDENCE_COLUMNS = 25, 180

sys.path.append(str(ROOT / "filter_plugins"))
from topology import libpq_url, topology  # noqa: E402


class NotInTimeError(Exception):
    """Something that should have happened has not."""


def until(what: str, probe: Callable[[], bool], limit_seconds: float, pause_seconds: float = 0.3) -> None:
    """Wait until a probe is true; what it raises of the network counts as "not yet"."""
    deadline = time.monotonic() + limit_seconds
    last: Exception | None = None
    while True:
        try:
            if probe():
                return
        except (OSError, subprocess.SubprocessError, LookupError, ValueError) as error:
            last = error
        if time.monotonic() > deadline:
            raise NotInTimeError(f"{what}: not within {limit_seconds:.0f} s{f' ({last!r})' if last else ''}")
        time.sleep(pause_seconds)


@dataclass(frozen=True)
class Platform:
    """What an inventory of lab hosts describes."""

    inventory: Path
    name: str
    lab: Path
    app: dict[str, Any]
    topology: dict[str, Any]

    @staticmethod
    def of(inventory: Path) -> Platform:
        """Read an inventory whose hosts `playbooks/lab.yml` makes."""
        common = inventory / "group_vars/all"
        values = {**yaml.safe_load((common / "lab.yml").read_text()), **yaml.safe_load((common / "platform.yml").read_text())}
        described = yaml.safe_load((inventory / "hosts.yml").read_text())["all"]
        addresses = {name: host["ansible_host"] for name, host in described["hosts"].items()}
        groups = {"all": list(addresses), **{name: list(group["hosts"]) for name, group in described["children"].items()}}
        return Platform(
            inventory=inventory,
            name=values["platform_name"],
            lab=STATE / "labs" / values["lab_name"],
            app=yaml.safe_load((common / "app.yml").read_text())["app"],
            topology=topology(groups, addresses, values.get("platform_ports"), values.get("platform_address", "")),
        )

    # --- what clients need ---

    @property
    def url(self) -> str:
        return f"https://{self.topology['platform']['address']}"

    @property
    def ca(self) -> Path:
        return STATE / "inventories" / self.name / "pki/ca.crt"

    def secret(self, name: str) -> str:
        return (STATE / "inventories" / self.name / "secrets" / name).read_text().split()[0]

    def libpq(self, cluster: str) -> str:
        """The application's own connection URL, as its contract renders it."""
        url: str = libpq_url(self.topology["postgresql"][cluster], self.app["name"], self.app["databases"][cluster]["name"], str(self.ca))
        return url

    @cached_property
    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca))

    @cached_property
    def _session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False
        session.verify = str(self.ca)
        session.headers["Connection"] = "close"  # the next probe may find another process there
        return session

    def hosts_of(self, group: str) -> list[str]:
        place = self.topology["postgresql"].get(group) or self.topology[group]
        return [member["name"] for member in place["members"]]

    def address(self, host: str) -> str:
        return str(self.topology["addresses"][host])

    # --- hosts ---

    def ssh(self, host: str, command: str, *, limit_seconds: float = 60) -> str:
        """Run a command as root; a CalledProcessError carries what it said."""
        argv = ["ssh", "-F", str(self.lab / "ssh_config"), "-o", "ConnectTimeout=5", host, command]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=limit_seconds, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise OSError(f"`{command}` on {host} failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-500:]}")
        return done.stdout.strip()

    def machine(self, command: str, *hosts: str, others: Iterable[str] = ()) -> None:
        """Do to lab hosts what happens to real ones: power-off, power-on, cut, join, drop, heal."""
        sudo = [] if os.geteuid() == 0 else ["sudo"]
        argv = [*sudo, sys.executable, str(ROOT / "roles/lab/files/lab.py"), command, str(self.lab), *hosts]
        others = list(others)
        done = subprocess.run([*argv, *(["--from", *others] if others else [])], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"lab.py {command} {' '.join(hosts)}: {done.stderr.strip()[-500:]}")

    def reachable(self, host: str) -> bool:
        try:
            socket.create_connection((self.address(host), 22), timeout=1).close()
        except OSError:
            return False
        return True

    def playbook(self, name: str, *arguments: str) -> str:
        """Run a playbook of the suite as its users do; what it printed. An OSError when it fails."""
        done = subprocess.run(
            ["ansible-playbook", "-i", str(self.inventory), f"playbooks/{name}.yml", *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False,
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"},
        )  # fmt: skip
        if done.returncode:
            raise OSError(f"playbooks/{name}.yml {shlex.join(arguments)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    # --- who leads ---

    def ask(self, url: str, bearer: str = "") -> requests.Response:
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        return self._session.get(url, headers=headers, timeout=(2, 8), allow_redirects=False)

    def member(self, cluster: str, host: str) -> dict[str, Any]:
        """What a cluster's member says of itself at this moment."""
        said = self.ask(f"https://{self.address(host)}:{self.topology['postgresql'][cluster]['rest_port']}/patroni").json()
        return said if isinstance(said, dict) else {}

    def primary(self, cluster: str) -> str:
        """Who is the running primary; a LookupError when it is not exactly one."""
        found = []
        for host in self.hosts_of(cluster):
            try:
                said = self.member(cluster, host)
            except (OSError, ValueError):
                continue
            if said.get("role") in ("primary", "master") and said.get("state") == "running":
                found.append(host)
        if len(found) != 1:
            raise LookupError(f"cluster {cluster} has {len(found)} primaries: {found}")
        return found[0]

    def standby(self, cluster: str) -> str:
        return next(host for host in self.hosts_of(cluster) if host != self.primary(cluster))

    def redis_role(self, host: str) -> list[Any]:
        """Redis' own answer to ROLE."""
        return list(self._redis(host, self.topology["redis"]["port"], "health", self.secret("redis_health"), "ROLE"))

    def redis_master(self) -> str:
        """Which member is master; a LookupError when it is not exactly one."""
        found = []
        for host in self.hosts_of("redis"):
            try:
                if self.redis_role(host)[0] == "master":
                    found.append(host)
            except OSError:
                continue
        if len(found) != 1:
            raise LookupError(f"Redis has {len(found)} masters: {found}")
        return found[0]

    def named_master(self) -> str:
        """Which member the Sentinels name as master; an OSError when none of them answers."""
        error: OSError = OSError("Redis has no Sentinels")
        for host in self.hosts_of("redis"):
            try:
                port = self.topology["redis"]["sentinel_port"]
                said = self._redis(host, port, self.app["name"], self.secret("redis_app"), "SENTINEL", "get-master-addr-by-name", MASTER)
                return str(said[0])
            except OSError as raised:
                error = raised
        raise error

    def _redis(self, host: str, port: int, user: str, password: str, *words: str) -> Any:
        connection = Connection(self.address(host), port, self.tls, user, password)
        try:
            return connection.ask(*words)
        finally:
            connection.close()

    def leaders(self) -> dict[str, str]:
        """Who leads each cluster and Redis."""
        return {**{cluster: self.primary(cluster) for cluster in CLUSTERS}, "redis": self.redis_master()}

    def address_holder(self) -> str:
        """Which proxy holds the platform's address."""
        address = re.escape(str(self.topology["platform"]["address"]))
        hosts = self.hosts_of("proxy")
        found = [host for host in hosts if re.search(rf"\b{address}/", self.ssh(host, "ip -4 -oneline address show"))]
        if len(found) != 1:
            raise LookupError(f"{len(found)} proxies hold the platform's address: {found}")
        return found[0]

    # --- what is not well ---

    def unwell(self) -> list[str]:
        """What is missing to full redundancy, asked of every member directly; empty when all is well."""
        probes: list[Callable[[], list[str]]] = [lambda c=cluster: self._cluster_problems(c) for cluster in CLUSTERS]  # type: ignore[misc]
        probes.append(self._redis_problems)
        probes += [lambda h=host: self._sentinel_problems(h) for host in self.hosts_of("redis")]  # type: ignore[misc]
        for host in self.hosts_of("proxy"):
            url = f"https://{self.address(host)}:{self.topology['proxy']['port']}/nginx-health"
            probes.append(lambda w=f"proxy on {host}", u=url: self._http_problems(w, u))  # type: ignore[misc]
        for name, process in self.app["processes"].items():
            if check := process.get("health", {}).get("http"):
                for host in self.hosts_of(process["hosts"]):
                    url = f"http://{self.address(host)}:{check.get('port', process.get('port'))}{check['path']}"
                    bearer = self._bearer(check["bearer"]) if "bearer" in check else ""
                    probes.append(lambda w=f"{name} on {host}", u=url, b=bearer: self._http_problems(w, u, b))  # type: ignore[misc]
        with ThreadPoolExecutor(len(probes)) as pool:
            found = [problem for problems in pool.map(lambda probe: probe(), probes) for problem in problems]
        return found or self._etcd_problems()

    def evidence(self, problems: Iterable[str]) -> str:
        """What the hosts that the problems name say of themselves, for whoever reads of a failure when the hosts are gone.

        Lines are cut and the problems come last: a report of a failed run is often its end only.
        """
        problems = list(problems)
        log = f"journalctl --no-pager -o short -n {EVIDENCE_LINES} -u"
        asked = {f"Redis on {host}": f"{log} redis-server -u redis-sentinel" for host in self.hosts_of("redis")}
        for what, host in re.findall(r"(\S+) on ([\w-]+)", "\n".join(problems)):
            process = self.app["processes"].get(what)
            beside = [name for name, each in self.app["processes"].items() if host in self.hosts_of(each["hosts"])] if process else []
            units = [f"{self.app['name']}-{name}" for name in dict.fromkeys([what, *beside])] if process else [what]
            asked.setdefault(f"{what} on {host}", "; ".join(["evenkeel-health status", *(f"{log} {shlex.quote(unit)}" for unit in units)]))
        told = []
        for title, command in asked.items():
            host = title.rpartition(" ")[2]
            try:
                said = self.ssh(host, f"({command}) | cut -c1-{EVIDENCE_COLUMNS}", limit_seconds=30)
            except (OSError, subprocess.SubprocessError) as error:
                said = str(error)
            told.append(f"--- {title}\n{said}")
        return "\n".join([*told, *problems])

    def _bearer(self, variable: str) -> str:
        named = re.search(r"secrets\.(\w+)", self.app["secrets"][variable])
        return self.secret(named.group(1)) if named else ""

    def _cluster_problems(self, cluster: str) -> list[str]:
        try:
            primary = self.primary(cluster)
            streams = {each["application_name"]: each for each in self.member(cluster, primary).get("replication") or []}
        except (OSError, LookupError, ValueError) as error:
            return [str(error)]
        problems = []
        for host in self.hosts_of(cluster):
            stream = streams.get(host, {})
            if host != primary and (stream.get("state"), stream.get("sync_state")) not in (("streaming", "sync"), ("streaming", "quorum")):
                seen = " ".join(str(stream.get(key)) for key in ("state", "sync_state")) if stream else "not connected"
                problems.append(f"cluster {cluster}: {host} is no synchronous standby ({seen})")
        return problems

    def _redis_problems(self) -> list[str]:
        try:
            master = self.redis_master()
        except LookupError as error:
            return [str(error)]
        problems = []
        for host in self.hosts_of("redis"):
            try:
                role = self.redis_role(host)
            except OSError as error:
                problems.append(f"Redis on {host}: {error}")
                continue
            if host != master and (role[0], role[1], role[3]) != ("slave", master, "connected"):
                problems.append(f"Redis on {host}: no replica of {master} ({role[:4]})")
        return problems

    def _sentinel_problems(self, host: str) -> list[str]:
        try:
            self._redis(host, self.topology["redis"]["sentinel_port"], "health", self.secret("redis_health"), "PING")
        except OSError as error:
            return [f"Sentinel on {host}: {error}"]
        return []

    def _http_problems(self, what: str, url: str, bearer: str = "") -> list[str]:
        try:
            status = self.ask(url, bearer).status_code
        except OSError as error:
            return [f"{what}: {type(error).__name__}"]
        return [] if status < 400 else [f"{what}: status {status}"]

    def etcd_healthy(self, host: str) -> bool:
        """Whether this voter is there and has a quorum; its port for that is on loopback alone."""
        try:
            said = self.ssh(host, f"curl -s -m 3 http://127.0.0.1:{self.topology['ports']['etcd-metrics']}/health", limit_seconds=15)
            return bool(json.loads(said)["health"] == "true")
        except (OSError, subprocess.SubprocessError, ValueError, LookupError):
            return False

    def etcd_leader(self) -> str:
        """Which voter leads the others."""
        url = f"http://127.0.0.1:{self.topology['ports']['etcd-metrics']}/metrics"
        question = f"curl -s -m 3 {url} | grep -q '^etcd_server_is_leader 1' && echo yes || true"
        for host in self.hosts_of("etcd"):
            if self.ssh(host, question) == "yes":
                return host
        raise LookupError("etcd has no leader")

    def _etcd_problems(self) -> list[str]:
        hosts = self.hosts_of("etcd")
        with ThreadPoolExecutor(len(hosts)) as pool:
            return [
                f"etcd on {host} is not healthy" for host, well in zip(hosts, pool.map(self.etcd_healthy, hosts), strict=True) if not well
            ]

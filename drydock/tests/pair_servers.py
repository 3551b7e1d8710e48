"""A platform on which everything is there more than once, on this machine: any one may die.

Two PostgreSQL (a primary and a synchronous standby) for `plugins`, where the proof's jobs are; three Redis with a
Sentinel beside each, with the rights that the suite's role gives; two web tiers; and two workers and relays, as on two
worker hosts. `core` has one server: sessions survive what happens to the others.
"""

import http.client
import json
import os
import signal
import subprocess
from contextlib import closing
from typing import Any

import redis

from browser import Browser
from platform_servers import PASSWORD, TOKEN, free_port, wait_for
from proof.faults import ProofServers, children

NODES = ("redis-1", "redis-2", "redis-3")
SENTINELS = ("sentinel-1", "sentinel-2", "sentinel-3")
RELAYS = ("relay", "relay-2")
HOME = "/usr/lib/postgresql/15/bin"
USERS = f"""user default off
user replica on >{PASSWORD} +psync +replconf +ping
user sentinel on >{PASSWORD} allchannels +multi +exec +slaveof +ping +subscribe +publish +info +role +config|rewrite \
+client|setname +client|kill +script|kill
user drydock on >{PASSWORD} ~* &* +@all -@admin -@dangerous +info
"""
SENTINEL_USERS = f"""user default off
user sentinel on >{PASSWORD} ~* &* +@all
user drydock on >{PASSWORD} &* -@all +auth +hello +ping +role +info +client|setname +client|getname +client|id \
+subscribe +psubscribe +sentinel|get-master-addr-by-name +sentinel|master +sentinel|masters +sentinel|replicas \
+sentinel|slaves +sentinel|sentinels
"""


class PairServers(ProofServers):
    """The platform, all in pairs; Redis in threes."""

    def __init__(self) -> None:
        super().__init__(lease_seconds=5, workers=("proof-1", "proof-2"))
        self.ports |= {name: free_port() for name in (*NODES, *SENTINELS, "standby")}
        sentinels = ",".join(f"localhost:{self.ports[name]}" for name in SENTINELS)
        both = f"localhost:{self.ports['plugins']},localhost:{self.ports['standby']}"
        self.environment |= {
            "REDIS_URL": f"rediss+sentinel://drydock@{sentinels}/main/0",
            "DATABASE_PLUGINS_URL": f"postgresql://drydock@{both}/drydock?sslmode=verify-full&sslrootcert={self.ca}"
            "&target_session_attrs=read-write&connect_timeout=2&tcp_user_timeout=3000&keepalives_idle=5",
        }

    def _start_all(self) -> None:
        super()._start_all()
        self.start_web("web-2")
        self.start_relay(name="relay-2")
        self.start_standby()
        wait_for("the second web answering", lambda: self.browser("web-2").get("/health"), 60)
        wait_for("both workers answering", self.consuming, 60)

    def stop_all(self) -> None:
        """End everything at once: nothing of it is needed any more."""
        for name in list(self.processes):
            self.kill(name)
        super().stop_all()

    # --- Redis --------------------------------------------------------------------------------------------------------

    def start_redis(self, *, persistent: bool = True) -> None:  # noqa: ARG002
        """Start three nodes, of which the first is the master, and three Sentinels."""
        for name in NODES:
            self.start_node(name)
        for name in SENTINELS:
            self.start_sentinel(name)
        wait_for("the Sentinels knowing each other", lambda: all(self.complete(name) for name in SENTINELS), 60)

    def start_node(self, name: str) -> None:
        """Start a Redis."""
        file, directory = self.root / f"{name}.conf", self.root / name
        if not file.exists():
            directory.mkdir()
            lines = {
                "save": '""', "dir": str(directory), "appendonly": "yes", "repl-diskless-sync-delay": "0",
                "maxmemory-policy": "noeviction", "min-replicas-to-write": "1", "min-replicas-max-lag": "3",
                "replica-announce-ip": "localhost", "masteruser": "replica", "masterauth": PASSWORD,
            }  # fmt: skip
            file.write_text(self.redis_lines(name, **lines) + USERS)
            master = NODES[0]
        else:
            # Which comes back asks whom to follow, as the suite's role lets it.
            master = self.master(SENTINELS[1])
        follow = [] if name == master else ["--replicaof", f"localhost {self.ports[master]}"]
        self.start(name, ["redis-server", str(file), *follow])

    def start_sentinel(self, name: str) -> None:
        """Start a Sentinel."""
        file = self.root / f"{name}.conf"
        if not file.exists():
            lines = (
                "resolve-hostnames yes", "announce-hostnames yes", "announce-ip localhost",
                f"announce-port {self.ports[name]}", "sentinel-user sentinel", f"sentinel-pass {PASSWORD}",
                f"monitor main localhost {self.ports[NODES[0]]} 2",
                "auth-user main sentinel", f"auth-pass main {PASSWORD}", "down-after-milliseconds main 3000",
                "failover-timeout main 10000", "parallel-syncs main 1",
            )  # fmt: skip
            own = "".join(f"sentinel {line}\n" for line in lines)
            file.write_text(self.redis_lines(name, dir=str(self.root)) + own + SENTINEL_USERS)
        self.start(name, ["redis-server", str(file), "--sentinel"])

    def sentinel(self, name: str = SENTINELS[0]) -> Any:
        """Return a client of a Sentinel that may do everything."""
        return redis.Redis(
            port=self.ports[name], username="sentinel", password=PASSWORD, ssl=True, ssl_ca_certs=str(self.ca),
            socket_timeout=5,
        )  # fmt: skip

    def complete(self, name: str) -> bool:
        """Say whether a Sentinel sees a master, two replicas that follow it, and two other Sentinels."""
        sentinel = self.sentinel(name)
        master = sentinel.sentinel_master("main")
        replicas = [one for one in sentinel.sentinel_slaves("main") if one["flags"] == "slave"]
        following = [one for one in replicas if one["master-link-status"] == "ok"]
        return master["flags"] == "master" and len(following) == 2 and master["num-other-sentinels"] == 2

    def master(self, sentinel: str = SENTINELS[0]) -> str:
        """Return which node is the master."""
        _, port = self.sentinel(sentinel).sentinel_get_master_addr_by_name("main")
        return next(name for name in NODES if self.ports[name] == port)

    # --- PostgreSQL ---------------------------------------------------------------------------------------------------

    def start_standby(self) -> None:
        """Clone `plugins`, follow it, and let its commits wait for the clone."""
        account, become = self._postgres()
        directory = self.root / "postgresql" / "standby"
        source = f"host=localhost port={self.ports['plugins']} user=drydock"
        command = [f"{HOME}/pg_basebackup", "-d", source, "-D", str(directory), "-R", "--no-sync", "--checkpoint=fast"]
        environment = {"PATH": os.environ["PATH"], "PGPASSWORD": PASSWORD}
        subprocess.run(command, check=True, capture_output=True, cwd="/", env=environment, **become)
        assert directory.stat().st_uid == account.pw_uid
        self.start_database("standby")
        streams = "SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'"
        wait_for("the standby following", lambda: self.sql("plugins", streams), 60)
        self.sql("plugins", "ALTER SYSTEM SET synchronous_standby_names = '*'")
        self.sql("plugins", "SELECT pg_reload_conf()")

    def fail_over(self) -> None:
        """Lose the primary as with its host, and promote the standby; from now on it is who is called `plugins`."""
        server = self.processes.pop("plugins")
        backends = children(server.pid)
        for pid in (server.pid, *backends):
            os.kill(pid, signal.SIGKILL)
        server.wait()
        self.ports["plugins"], self.ports["standby"] = self.ports["standby"], self.ports["plugins"]
        self.processes["plugins"] = self.processes.pop("standby")
        self.sql("plugins", "SELECT pg_promote()", database="postgres")

    # --- Questions ----------------------------------------------------------------------------------------------------

    def browser(self, name: str) -> Browser:
        """Return a browser that asks one of the web tiers."""
        return Browser(f"https://localhost:{self.ports[name]}", self.tls)

    def relay(self, path: str, name: str = RELAYS[0], token: str = TOKEN) -> tuple[int, dict[str, Any]]:
        """Ask a relay; return the status and what it said."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[name], timeout=20)
        with closing(connection):
            connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def consuming(self) -> bool:
        """Say whether every worker takes what is sent to it."""
        return all(self.relay(f"/ping/{name}")[0] == 200 for name in self.workers)

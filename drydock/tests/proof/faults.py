"""The platform on this machine for the proof, and what is done to it on purpose."""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import redis

from platform_servers import PASSWORD, SOURCES, Servers, wait_for
from proof.ledger import Person

TESTS = Path(__file__).resolve().parents[1]
WORKERS = ("proof-1", "proof-2", "proof-3")
HELD = "SELECT uuid, attempt FROM jobs_job WHERE kind = 'proof' AND state = 'running' AND worker LIKE %s"
# Past the lease by as much as a relay's pass may take.
STILL_LEASED = (
    "SELECT 1 FROM jobs_job WHERE uuid = %s AND attempt = %s AND state = 'running'"
    " AND lease_until > now() - interval '2 seconds'"
)


class ProofServers(Servers):
    """Two databases, the broker, the web tier, a relay and workers for the proof's own queue."""

    def __init__(self, *, lease_seconds: float | None = None, workers: tuple[str, ...] = WORKERS) -> None:
        super().__init__()
        self.workers = workers
        self.environment |= {"DJANGO_SETTINGS_MODULE": "proof.settings", "PYTHONPATH": f"{SOURCES}:{TESTS}"}
        if lease_seconds is not None:
            self.environment["PROOF_LEASE_SECONDS"] = str(lease_seconds)

    def _start_all(self) -> None:
        """Start what the proof needs."""
        self._start_databases()
        self.start_redis()
        for name in ("core", "plugins"):
            wait_for(f"{name} answering", lambda name=name: self.sql(name, "SELECT 1", database="postgres"))
            self.sql(name, "CREATE DATABASE drydock", database="postgres")
            migrated = self.drydock("migrate", "--no-input", "--verbosity=0", "--database", name)
            assert migrated.returncode == 0, migrated.stderr
        self.start_web()
        for name in self.workers:
            self.start_worker("proof", name=name)
        self.start_relay()
        wait_for("web answering", lambda: self.get("/health"))

    def person(self, name: str = "prover") -> Person:
        """Return somebody who is signed in."""
        arguments = ["ensure_user", "--username", name, "--password-env", "PERSON"]
        assert self.drydock(*arguments, PERSON=PASSWORD).returncode == 0
        person = Person(self.url, str(self.ca), name, PASSWORD)
        person.sign_in()
        return person

    def broker(self) -> Any:
        """Return a client of Redis."""
        return redis.Redis.from_url(
            self.environment["REDIS_URL"], password=PASSWORD, ssl_ca_certs=str(self.ca), socket_timeout=5
        )

    def holds(self, worker: str) -> tuple[Any, int] | None:
        """Return the job (and its attempt) that a worker has in hand, as far as the database knows."""
        held = self.sql("plugins", HELD, f"{worker}@%")
        return (held[0][0], held[0][1]) if held else None


class Faults:
    """What goes wrong. Each method is one fault: it happens at once; its victim is started again, as systemd would."""

    def __init__(self, servers: ProofServers, seed: int = 1) -> None:
        self.servers = servers
        self.rng = random.Random(seed)  # noqa: S311 - the same seed makes the same choices
        self.counts: Counter[str] = Counter()
        self.sigkilled = 0
        self.frozen: set[str] = set()
        self._thawing: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(8, "thaw")
        self._lock = threading.Lock()

    def inject(self, name: str) -> None:
        """Let the fault of this name happen."""
        fault: Callable[[], None] = getattr(self, name)
        fault()
        self.counts[name] += 1

    def heal(self) -> None:
        """Wait until nothing is frozen any more."""
        for future in self._thawing:
            future.result()
        self._pool.shutdown()

    # --- Workers ------------------------------------------------------------------------------------------------------

    def kill_worker(self) -> None:
        """SIGKILL a worker with all its processes."""
        self._replace(self._pick())

    def kill_busy_worker(self) -> None:
        """SIGKILL a worker that has a job in hand."""
        name = self._pick()
        if self.catch(name):
            self.counts["of them with a job in hand"] += 1
        self._replace(name)

    def kill_worker_child(self) -> None:
        """SIGKILL the process that works, and leave its parent, which starts another."""
        name = self._pick()
        processes = children(self.servers.processes[name].pid)
        if processes:
            os.kill(processes[0], signal.SIGKILL)
            self.sigkilled += 1

    def kill_worker_parent(self) -> None:
        """SIGKILL the parent, and leave the process that works to itself."""
        name = self._pick()
        self.servers.processes[name].send_signal(signal.SIGKILL)
        self.servers.processes.pop(name).wait()
        self.sigkilled += 1
        self.servers.start_worker("proof", name=name)

    def freeze_busy_worker(self) -> None:
        """SIGSTOP a worker that has a job in hand, for longer than its lease."""
        name = self._pick()
        held = self.catch(name)
        if not held:
            self.counts["frozen without a job in hand"] += 1
            self.servers.signal_all(name, signal.SIGCONT)
            return
        with self._lock:
            self.frozen.add(name)
        self._thawing.append(self._pool.submit(self.thaw, name, held))

    def thaw(self, name: str, held: tuple[Any, int]) -> None:
        """SIGCONT a worker as soon as its lease is over."""
        try:
            wait_for("the end of a lease", lambda: not self.servers.sql("plugins", STILL_LEASED, *held), 180)
        finally:
            self.servers.signal_all(name, signal.SIGCONT)
            with self._lock:
                self.frozen.discard(name)

    def catch(self, name: str, seconds: float = 5) -> tuple[Any, int] | None:
        """Stop a worker at a moment when it has a job in hand; it is stopped in any case when this returns."""
        deadline = time.monotonic() + seconds
        while True:
            self.servers.signal_all(name, signal.SIGSTOP)
            held = self.servers.holds(name)
            if held or time.monotonic() > deadline:
                return held
            self.servers.signal_all(name, signal.SIGCONT)
            time.sleep(self.rng.uniform(0.001, 0.03))

    def _pick(self) -> str:
        with self._lock:
            return self.rng.choice([name for name in self.servers.workers if name not in self.frozen])

    def _replace(self, name: str) -> None:
        self.servers.kill(name)
        self.sigkilled += 1
        self.servers.start_worker("proof", name=name)

    # --- The broker ---------------------------------------------------------------------------------------------------

    def kill_redis(self) -> None:
        """SIGKILL the broker; it comes back with nothing."""
        self.servers.kill("redis")
        self.servers.start_redis()

    def kill_persistent_redis(self) -> None:
        """SIGKILL the broker; it comes back with what its file has, which may be old."""
        self.servers.kill("redis")
        self.servers.start_redis(persistent=True)

    def flush_redis(self) -> None:
        """Remove everything from the broker."""
        wait_for("FLUSHALL", self.servers.broker().flushall)

    # --- The rest -----------------------------------------------------------------------------------------------------

    def restart_plugins_fast(self) -> None:
        """Restart the jobs' database as an operator would."""
        self._restart_database("plugins", signal.SIGINT)

    def restart_plugins_at_once(self) -> None:
        """Let the jobs' database crash; it recovers from its log."""
        self._restart_database("plugins", signal.SIGQUIT)

    def restart_core_at_once(self) -> None:
        """Let the database of accounts and sessions crash."""
        self._restart_database("core", signal.SIGQUIT)

    def kill_relay(self) -> None:
        """SIGKILL the relay."""
        self.servers.kill("relay")
        self.servers.start_relay()

    def kill_web(self) -> None:
        """SIGKILL the web tier with every request in it."""
        self.servers.kill("web")
        self.servers.start_web()

    def restart_web(self) -> None:
        """Restart the web tier as a deploy would."""
        self.servers.stop("web")
        self.servers.start_web()

    def _restart_database(self, name: str, number: signal.Signals) -> None:
        self.servers.stop(name, number)
        self.servers.start_database(name)
        wait_for(f"{name} answering", lambda: self.servers.sql(name, "SELECT 1"))


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

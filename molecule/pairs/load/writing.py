"""Writers that note what they were told: single rows into each cluster, a key into Redis, at a steady rate, for as long as a run lasts."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from .broker import Connection
from .figures import Comparison, compare
from .places import Platform

TABLE = "evenkeel_proof"
RECONNECT_SECONDS = 0.1


class Writer(ABC):
    """Writes number after number, each once; connects again when that fails, and never repeats a number."""

    def __init__(self, name: str, per_second: float) -> None:
        self.name = name
        self.period_seconds = 1 / per_second
        #: When each write was acknowledged, and its number.
        self.times: list[float] = []
        self.acknowledged: list[int] = []
        self.tried = 0
        self.errors: list[tuple[float, str]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"writer {name}", daemon=True)

    @abstractmethod
    def connect(self) -> Any:
        """Return a connection to who takes writes now."""

    @abstractmethod
    def write(self, connection: Any, number: int) -> None:
        """Return once the number is acknowledged."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    def _run(self) -> None:
        connection = None
        due = time.monotonic()
        while not self._stop.is_set():
            try:
                if connection is None:
                    connection = self.connect()
                self.tried += 1
                self.write(connection, self.tried)
                self.acknowledged.append(self.tried)
                self.times.append(time.monotonic())
            except (OSError, psycopg.Error) as error:
                self.errors.append((time.monotonic(), " ".join(str(error).split())[:300]))
                if connection is not None:
                    connection.close()
                connection = None
                self._stop.wait(RECONNECT_SECONDS)
            due = max(due + self.period_seconds, time.monotonic() - self.period_seconds)
            self._stop.wait(max(0.0, due - time.monotonic()))
        if connection is not None:
            connection.close()


class ClusterWriter(Writer):
    """Commits single rows through the application's own connection URL; names are resolved by the lab, not by this machine."""

    def __init__(self, platform: Platform, cluster: str, per_second: float) -> None:
        super().__init__(cluster, per_second)
        addresses = [platform.address(host) for host in platform.hosts_of(cluster)]
        self.parameters: dict[str, Any] = {
            **conninfo_to_dict(platform.libpq(cluster)),
            "hostaddr": ",".join(addresses),
            "password": platform.secret("postgresql_app"),
            "application_name": "evenkeel-proof",
        }

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(**self.parameters, autocommit=True)

    def write(self, connection: psycopg.Connection[Any], number: int) -> None:
        connection.execute(f"INSERT INTO {TABLE} (number) VALUES (%s)", (number,))

    def prepare(self) -> None:
        """Make the table; a number may stand in it twice, so that it would be seen."""
        self.ask(f"DROP TABLE IF EXISTS {TABLE}")
        self.ask(f"CREATE TABLE {TABLE} (number bigint NOT NULL)")

    def drop(self) -> None:
        """Remove the table."""
        self.ask(f"DROP TABLE IF EXISTS {TABLE}")

    def ask(self, question: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run one statement on the primary over a connection of its own."""
        with self.connect() as connection:
            cursor = connection.execute(question, values)
            return cursor.fetchall() if cursor.description else []

    def findings(self) -> Comparison:
        """Compare what was acknowledged up to now with what the primary has. What is under way is left out."""
        acknowledged = list(self.acknowledged)
        last = acknowledged[-1] if acknowledged else 0
        present = [row[0] for row in self.ask(f"SELECT number FROM {TABLE} WHERE number <= %s", last)]
        return compare(acknowledged, range(1, last + 1), present)


class BrokerWriter(Writer):
    """Sets a key in the Redis that the Sentinels name as master. What Redis holds are bells: only its silence is measured."""

    def __init__(self, platform: Platform, per_second: float) -> None:
        super().__init__("redis", per_second)
        self.platform = platform

    def connect(self) -> Connection:
        address = self.platform.address(self.platform.named_master())
        port = self.platform.topology["redis"]["port"]
        return Connection(address, port, self.platform.tls, self.platform.app["name"], self.platform.secret("redis_app"))

    def write(self, connection: Connection, number: int) -> None:
        connection.ask("SET", TABLE, str(number), "EX", "600")

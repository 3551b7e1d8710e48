"""The relay: rings for jobs that are due, returns those whose worker was lost, and removes finished ones.

One thread for each database, woken by its notifications and at least once a second. Several relays may run: they skip
each other's rows.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from celery import current_app
from django.conf import settings
from django.db import Error as DatabaseClientError
from django.db import connections, transaction
from django.db.models.functions import Now
from kombu.exceptions import OperationalError as BrokerError

from drydock.jobs import engine, kinds
from drydock.jobs.models import Job

logger = logging.getLogger(__name__)

TASK = "drydock.jobs.run"
PASS_SECONDS = 1.0
PRUNE_SECONDS = 30.0
# A bell that nobody heard is rung again after 5, 10, 20, 20 … seconds.
FIRST_BELL_SECONDS, MOST_BELL_SECONDS = 5, 20
# So many bells wait in the broker at most: without workers they must not pile up.
WINDOW = 500
STALLED_SECONDS = 30.0
HEARTBEAT = "relay"
HEARTBEAT_SECONDS = 5.0

DUE = """
UPDATE jobs_job SET bells = least(bells + 1, 1000),
  bell_after = now() + least(%s, %s * 2 ^ least(bells, 10)) * interval '1 second'
WHERE uuid IN (
  SELECT uuid FROM jobs_job WHERE state = 'queued' AND queue = %s AND kind = ANY(%s) AND bell_after <= now()
  ORDER BY bell_after LIMIT %s FOR UPDATE SKIP LOCKED
) RETURNING kind, uuid, created
"""


def ring(database: str) -> int:
    """Ring for the jobs that are due, the oldest first; return how many bells were rung.

    The rows stay locked until the broker has all bells: if it fails, the jobs are due as before. A relay that dies
    between the two has rung for nothing, which a worker's claim finds out.
    """
    # Of kinds that this release knows: while a deploy is under way there may be others.
    names = [kind.name for kind in kinds.every()]
    due = Job.objects.using(database).filter(state=Job.State.QUEUED, kind__in=names, bell_after__lte=Now())
    queues = list(due.order_by().values_list("queue", flat=True).distinct())
    if not queues:
        return 0
    with current_app.producer_or_acquire() as producer:
        try:
            return sum(_ring_queue(database, queue, names, producer) for queue in queues)
        except (*producer.connection.connection_errors, *producer.connection.channel_errors) as error:
            raise BrokerError(str(error)) from error


def _ring_queue(database: str, queue: str, names: list[str], producer: Any) -> int:
    rung = 0
    room = WINDOW - producer.channel.queue_declare(queue=queue).message_count
    while room > 0:
        with transaction.atomic(using=database), connections[database].cursor() as cursor:
            cursor.execute(DUE, [MOST_BELL_SECONDS, FIRST_BELL_SECONDS, queue, names, min(room, engine.BATCH)])
            due = sorted(cursor.fetchall(), key=lambda row: row[2])
            for kind_name, uuid, _ in due:
                limit = kinds.get(kind_name).time_limit_seconds
                current_app.send_task(
                    TASK,
                    args=[kind_name, str(uuid)],
                    queue=queue,
                    priority=settings.CELERY_TASK_DEFAULT_PRIORITY,
                    soft_time_limit=limit,
                    time_limit=limit + 2 * engine.GRACE_SECONDS,
                    producer=producer,
                    retry=False,
                )
        rung += len(due)
        room -= engine.BATCH
        if len(due) < engine.BATCH:
            break
    return rung


@dataclass
class Relay:
    """Runs the duties for every database until it is stopped."""

    databases: Iterable[str] = field(default_factory=kinds.databases)
    # Tests leave one out, to see what it is good for.
    duties: tuple[Callable[[str], int], ...] = (engine.reap, ring)

    def __post_init__(self) -> None:
        self.stopping = threading.Event()
        self.listening: dict[str, Any] = {}
        self.passed = {database: time.monotonic() for database in self.databases}

    def run(self) -> None:
        """Work until `stop` is called."""
        threads = [threading.Thread(target=self._work, args=[name], name=f"relay-{name}") for name in self.passed]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def stop(self) -> None:
        """End after the pass in hand."""
        self.stopping.set()

    def stalled(self) -> list[str]:
        """Return the databases for which no pass has succeeded for a while."""
        now = time.monotonic()
        return [name for name, last in self.passed.items() if now - last > STALLED_SECONDS]

    def _work(self, database: str) -> None:
        pruned = beaten = 0.0
        while not self.stopping.is_set():
            try:
                self._listen(database)
                for duty in self.duties:
                    duty(database)
                if time.monotonic() - pruned > PRUNE_SECONDS:
                    engine.prune(database)
                    pruned = time.monotonic()
                self.passed[database] = time.monotonic()
                if self.passed[database] - beaten > HEARTBEAT_SECONDS:
                    engine.beat(database, HEARTBEAT)
                    beaten = self.passed[database]
                for _ in connections[database].connection.notifies(timeout=PASS_SECONDS, stop_after=1):
                    pass
            except BrokerError as error:
                logger.warning("the broker does not take bells for %s: %s", database, error)
                self._count_broker_error(database)
                self.stopping.wait(PASS_SECONDS)
            except DatabaseClientError as error:
                logger.warning("database %s does not answer: %s", database, error)
                connections[database].close()
                self.stopping.wait(PASS_SECONDS)
            except Exception:
                logger.exception("a pass over %s failed", database)
                self.stopping.wait(PASS_SECONDS)
        connections.close_all()

    def _listen(self, database: str) -> None:
        """Subscribe to acceptances, once for each connection."""
        wrapper = connections[database]
        wrapper.ensure_connection()
        if self.listening.get(database) is not wrapper.connection:
            with wrapper.cursor() as cursor:
                cursor.execute(f"LISTEN {engine.CHANNEL}")
            self.listening[database] = wrapper.connection

    def _count_broker_error(self, database: str) -> None:
        try:
            engine.tally(database, "broker", "error")
        except DatabaseClientError as error:
            logger.warning("database %s does not answer: %s", database, error)
            connections[database].close()

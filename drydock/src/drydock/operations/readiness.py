"""Is everything there that the platform needs? Each part is asked at the same time, within a few seconds."""

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any

import redis
from botocore.exceptions import BotoCoreError, ClientError
from django.db import DatabaseError, connections
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder

from drydock import config, redis_client, storage
from drydock.jobs import kinds
from drydock.jobs.metrics import relay_age
from drydock.jobs.relay import STALLED_SECONDS

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_SECONDS = 5.0
STATEMENT_TIMEOUT_MS = 2000


class MissingError(Exception):
    """Something is not there; the message says what. It may be another part than the one that was asked."""

    def __init__(self, message: str, part: str = "") -> None:
        super().__init__(message)
        self.part = part


def check() -> dict[str, str]:
    """Return what is missing, by part; empty when the platform is ready. The log has the details."""
    probes: dict[str, Callable[[], None]] = {
        "database core": lambda: _database("core"),
        "database plugins": lambda: _database("plugins"),
        "redis": _redis,
        "s3": _s3,
    }
    executor = ThreadPoolExecutor(max_workers=len(probes), thread_name_prefix="ready")
    futures = {executor.submit(probe): part for part, probe in probes.items()}
    started = time.monotonic()
    finished, _ = wait(futures, timeout=PROBE_TIMEOUT_SECONDS)
    # A probe that hangs ends by its own socket's time limit; nobody waits for it here.
    executor.shutdown(wait=False, cancel_futures=True)
    missing = {}
    for future, part in futures.items():
        if future not in finished:
            missing[part] = f"no answer within {PROBE_TIMEOUT_SECONDS:g} s"
        elif error := future.exception():
            if isinstance(error, MissingError):
                missing[error.part or part] = str(error)
            else:
                missing[part] = "the check itself failed; see the log"
                logger.error("readiness check of %s failed", part, exc_info=error)
    if missing:
        logger.warning("not ready after %.2f s: %s", time.monotonic() - started, missing)
    return missing


@lru_cache(maxsize=1)
def known_migrations() -> frozenset[tuple[str, str]]:
    """Return the migrations that this release brings; they do not change while it runs."""
    return frozenset(MigrationLoader(None).graph.nodes)


def _database(alias: str) -> None:
    database = connections[alias]
    try:
        with database.cursor() as cursor:
            cursor.execute("SELECT set_config('statement_timeout', %s, false)", [str(STATEMENT_TIMEOUT_MS)])
            cursor.execute("SELECT pg_is_in_recovery()")
            if cursor.fetchone()[0]:
                raise MissingError("it is a standby and takes no writes")
        pending = sorted(known_migrations() - set(MigrationRecorder(database).applied_migrations()))
        if pending:
            names = ", ".join(f"{app}.{name}" for app, name in pending)
            raise MissingError(f"{len(pending)} migrations are pending: {names}")
        _relay(alias)
    except DatabaseError as error:
        logger.warning("database %s: %s", alias, error)
        raise MissingError(f"it does not answer ({type(error).__name__}); the log has the details") from error
    finally:
        # This thread's own connection; the requests' connections are others.
        database.close()


def _relay(alias: str) -> None:
    """Without a relay jobs are accepted and none is started, which nothing else would show here."""
    if alias not in kinds.databases():
        return
    age = relay_age(alias)
    if age > STALLED_SECONDS:
        since = f"has for {age:.0f} s" if math.isfinite(age) else "ever has"
        raise MissingError(
            f"no relay {since} made a pass over {alias}: accepted jobs wait. Start `drydock relay`, or read its log",
            f"relay {alias}",
        )


def _redis() -> None:
    try:
        redis_client.client().ping()
    except redis.RedisError as error:
        logger.warning("redis: %s", error)
        raise MissingError(f"it does not answer ({type(error).__name__}); the log has the details") from error


def _s3() -> None:
    try:
        s3: Any = storage.client(timeout_seconds=2, attempts=1)
        if not storage.bucket_exists(s3):
            raise MissingError(f"bucket {config.load().s3_bucket} does not exist; create it: drydock ensure_bucket")
    except (BotoCoreError, ClientError) as error:
        logger.warning("s3: %s", error)
        raise MissingError(f"it does not answer ({type(error).__name__}); the log has the details") from error

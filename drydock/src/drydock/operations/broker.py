"""The enqueue ping: a task through the broker to a worker of each kind, and its answer back.

The answer travels by a Redis list of its own, because tasks keep no results here. It proves what an `inspect ping`
does not: that somebody takes tasks off that queue.
"""

import json
import secrets
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import redis
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from drydock import config
from drydock.celery import app

PING_PRIORITY = 0  # overtakes every waiting job
ANSWER_KEPT_SECONDS = 60
MAX_TIMEOUT_SECONDS = 30.0


@lru_cache(maxsize=1)
def connection() -> Any:
    """Return this process's Redis client, safe to share between threads.

    Untyped: redis-py's own types mix its synchronous and its asynchronous answers.
    """
    settings = config.load()
    tls: dict[str, Any] = {"ssl_ca_certs": settings.redis_ca_file or None} if settings.redis_tls else {}
    return redis.Redis.from_url(
        settings.redis_url,
        socket_connect_timeout=2,
        socket_timeout=2,
        health_check_interval=10,
        # Our callers have a time limit and say what is missing; silent retries would only hide it.
        retry=Retry(NoBackoff(), 0),
        **tls,
    )


@app.task(bind=True)
def ping(self: Any, answer_key: str, queue: str) -> None:
    """Answer on the list that the asker watches."""
    answer = json.dumps({"queue": queue, "worker": self.request.hostname})
    with connection().pipeline() as pipeline:
        pipeline.rpush(answer_key, answer)
        pipeline.expire(answer_key, ANSWER_KEPT_SECONDS)
        pipeline.execute()


def ping_queues(queues: Iterable[str], timeout_seconds: float) -> dict[str, dict[str, Any]]:
    """Send one ping to each queue, and say for each who answered, and after how long."""
    answer_key = f"drydock:ping:{secrets.token_hex(16)}"
    results: dict[str, dict[str, Any]] = {}
    waiting = list(queues)
    started = time.monotonic()
    try:
        for queue in waiting:
            ping.apply_async(
                args=[answer_key, queue], queue=queue, priority=PING_PRIORITY, expires=timeout_seconds, retry=False
            )
        while waiting and (left := timeout_seconds - (time.monotonic() - started)) > 0:
            # Slices shorter than the socket's own time limit.
            popped = connection().blpop([answer_key], timeout=min(left, 1.0))
            if popped:
                answer = json.loads(popped[1])
                waiting.remove(answer["queue"])
                seconds = round(time.monotonic() - started, 3)
                results[answer["queue"]] = {"ok": True, "seconds": seconds, "worker": answer["worker"]}
    except (redis.RedisError, OperationalError) as error:
        silence = f"the broker does not answer ({type(error).__name__})"
    else:
        silence = f"no worker answered on this queue within {timeout_seconds:g} s"
    for queue in waiting:
        results[queue] = {"ok": False, "error": silence}
    return results

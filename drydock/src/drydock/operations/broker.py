"""The enqueue ping: a task through the broker to a worker of each kind, and its answer back.

The answer travels by a Redis list of its own, because tasks keep no results here. It proves what an `inspect ping`
does not: that somebody takes tasks off that queue.
"""

import json
import secrets
import time
from collections.abc import Iterable
from typing import Any

import redis
from celery.utils.nodenames import worker_direct
from django.db import DatabaseError
from kombu.exceptions import OperationalError

from drydock import redis_client
from drydock.celery import app
from drydock.jobs import engine

PING_PRIORITY = 0  # overtakes every waiting job
ANSWER_KEPT_SECONDS = 60
# A ping that nobody waits for any more is dropped by the worker's clock, which may be ahead of ours.
CLOCK_PATIENCE_SECONDS = 300
PINGS_KEPT = 10
MAX_TIMEOUT_SECONDS = 30.0


@app.task(bind=True)
def ping(self: Any, answer_key: str, queue: str) -> None:
    """Answer on the list that the asker watches."""
    answer = json.dumps({"queue": queue, "worker": self.request.hostname})
    try:
        _tell(answer_key, answer)
    except (redis.ConnectionError, redis.TimeoutError):
        # This process's connection may be one to a master that is gone; a new one is not.
        _tell(answer_key, answer)


def _tell(answer_key: str, answer: str) -> None:
    with redis_client.client().pipeline() as pipeline:
        pipeline.rpush(answer_key, answer)
        pipeline.expire(answer_key, ANSWER_KEPT_SECONDS)
        pipeline.execute()


def ping_queues(queues: Iterable[str], timeout_seconds: float) -> dict[str, dict[str, Any]]:
    """Send one ping to each queue, and say for each who answered, and after how long."""
    return _ping({queue: queue for queue in queues}, timeout_seconds)


def ping_worker(name: str, timeout_seconds: float) -> dict[str, Any]:
    """Send a ping to one worker, by the queue that it alone reads, and say after how long it answered.

    A worker whose processes are all busy answers late. It is as well as the leases of its jobs are kept.
    """
    queue = worker_direct(name)
    result = _ping({name: queue}, timeout_seconds)[name]
    if result["ok"]:
        return result
    try:
        # Of pings that nobody has taken a few are left, for a while.
        with redis_client.client().pipeline() as pipeline:
            pipeline.ltrim(queue.name, 0, PINGS_KEPT - 1)
            pipeline.expire(queue.name, ANSWER_KEPT_SECONDS)
            pipeline.execute()
        if jobs := engine.in_hand(name):
            return {"ok": True, "worker": name, "jobs": jobs}
    except (redis.RedisError, DatabaseError) as error:
        result["error"] += f"; nor is it known whether it is at work ({type(error).__name__})"
    return result


def _ping(queues: dict[str, Any], timeout_seconds: float) -> dict[str, dict[str, Any]]:
    answer_key = f"drydock:ping:{secrets.token_hex(16)}"
    results: dict[str, dict[str, Any]] = {}
    waiting = list(queues)
    started = time.monotonic()
    try:
        for name, queue in queues.items():
            ping.apply_async(
                args=[answer_key, name],
                queue=queue,
                priority=PING_PRIORITY,
                expires=timeout_seconds + CLOCK_PATIENCE_SECONDS,
                retry=False,
            )
        while waiting and (left := timeout_seconds - (time.monotonic() - started)) > 0:
            # Slices shorter than the socket's own time limit.
            popped = redis_client.client().blpop([answer_key], timeout=min(left, 1.0))
            if popped:
                answer = json.loads(popped[1])
                waiting.remove(answer["queue"])
                seconds = round(time.monotonic() - started, 3)
                results[answer["queue"]] = {"ok": True, "seconds": seconds, "worker": answer["worker"]}
    except (redis.RedisError, OperationalError) as error:
        silence = f"the broker does not answer ({type(error).__name__})"
    else:
        silence = f"no worker answered on this queue within {timeout_seconds:g} s"
    for name in waiting:
        results[name] = {"ok": False, "error": silence}
    return results

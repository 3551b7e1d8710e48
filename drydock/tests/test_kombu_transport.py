"""A worker's way to Redis, against a real one."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.worker import state
from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub
from redis.exceptions import TimeoutError as RedisTimeoutError

from drydock.celery import app
from drydock.kombu_transport import SILENCE_SECONDS
from platform_servers import Servers

NAME = "test-kombu-transport"


@pytest.fixture
def consuming(servers: Servers) -> Iterator[tuple[Hub, Connection, list[Any]]]:
    """Give an event loop that takes from a queue, with one free hand, and what it has taken."""
    assert servers.processes
    taken: list[Any] = []
    hub = Hub()
    connection: Connection = app.connection_for_read()
    connection.transport.register_with_event_loop(connection.connection, hub)
    hub.propagate_errors = connection.connection_errors  # as Celery's own loop does
    consumer = Consumer(connection, [Queue(NAME)], on_message=taken.append)
    consumer.purge()
    consumer.qos(prefetch_count=1)
    consumer.consume()
    yield hub, connection, taken
    consumer.purge()
    connection.release()
    hub.close()


def turns(hub: Hub, seconds: float, done: Callable[[], bool] = lambda: False) -> None:
    """Let the event loop run."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not done():
        next(hub.loop)


def ring(connection: Connection) -> None:
    with connection.clone() as other:
        other.Producer().publish({}, routing_key=NAME)


def test_a_worker_that_waits_does_not_give_up(consuming: tuple[Hub, Connection, list[Any]]) -> None:
    hub, connection, taken = consuming
    turns(hub, SILENCE_SECONDS * 2)
    ring(connection)
    turns(hub, 10, lambda: bool(taken))
    assert taken


def test_a_worker_with_full_hands_does_not_give_up(consuming: tuple[Hub, Connection, list[Any]]) -> None:
    hub, connection, taken = consuming
    in_hand = {"a request"}
    ring(connection)
    turns(hub, 10, lambda: bool(taken))
    assert taken
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "reserved_requests", in_hand)
        turns(hub, SILENCE_SECONDS * 2)
        taken[0].ack()
        ring(connection)
        turns(hub, 10, lambda: len(taken) > 1)
    assert len(taken) == 2


def test_a_worker_whose_loop_has_forgotten_to_ask_gives_up(consuming: tuple[Hub, Connection, list[Any]]) -> None:
    hub = consuming[0]
    turns(hub, 2)
    hub.on_tick.clear()
    with pytest.raises(RedisTimeoutError, match="has not been asked"):
        turns(hub, SILENCE_SECONDS * 5)


def test_a_worker_that_believes_to_hold_what_nobody_does_gives_up(consuming: tuple[Hub, Connection, list[Any]]) -> None:
    hub, connection, taken = consuming
    assert not state.reserved_requests
    ring(connection)
    turns(hub, 10, lambda: bool(taken))
    with pytest.raises(RedisTimeoutError, match="has not been asked"):
        turns(hub, SILENCE_SECONDS * 5)

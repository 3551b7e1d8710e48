"""Celery's way to Redis, for workers that outlive a master that has fallen silent. In kombu 5.6 they do not, for:

- A worker waits for bells with a BRPOP of one second, and reads when there is something to read. From a master that is
  frozen or cut off there never is, and it waits for ever. Here it gives up and connects anew, to whom the Sentinels
  name then.
- A bell whose acknowledgement failed stays in the worker's hands, which are full with it, and it never asks for another
  one. Here it lets go. (Redis has kept the bell, and rings it again after the visibility timeout, which does no harm.)
- Losing any connection takes the asking for bells out of the event loop. The worker is expected to connect anew
  then, and does not if the loss concerned nobody else. And what it believes to have in hand may be lost on the way.
  Here a worker that has nothing to do and does not ask gives up, too.
"""

import select
import time
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis, virtual
from redis.exceptions import TimeoutError as RedisTimeoutError

# An answer is due after a second.
SILENCE_SECONDS = 3.0


class _QoS(redis.QoS):
    def ack(self, delivery_tag: str) -> None:
        try:
            super().ack(delivery_tag)
        except Exception:
            virtual.QoS.ack(self, delivery_tag)
            raise

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        try:
            super().reject(delivery_tag, requeue)
        except Exception:
            virtual.QoS.ack(self, delivery_tag)
            raise


class _AttentiveChannel:
    QoS = _QoS
    _asked = 0.0
    _idle_since = float("inf")

    def _brpop_start(self, timeout: float | None = None) -> None:
        super()._brpop_start(timeout)  # type: ignore[misc]
        self._asked = time.monotonic()

    def look_after(self) -> None:
        """Raise what makes the worker connect anew, when an answer is overdue or nobody asks."""
        if getattr(self, "_in_poll", None):
            self._idle_since = float("inf")
            self._give_up_silent()
        else:
            self._give_up_idle()

    def _give_up_idle(self) -> None:
        from celery.worker import state  # only workers come here, and nobody else wants what it imports

        channel: Any = self
        if not channel.active_queues or (state.reserved_requests and not channel.qos.can_consume()):
            self._idle_since = float("inf")
            return
        now = time.monotonic()
        self._idle_since = min(self._idle_since, now)
        if now - self._idle_since >= SILENCE_SECONDS:
            raise RedisTimeoutError(f"Redis has not been asked for {now - self._asked:.0f} s")

    def _give_up_silent(self) -> None:
        connection: Any = self._in_poll  # type: ignore[attr-defined]
        silence = time.monotonic() - self._asked
        if silence < SILENCE_SECONDS:
            return
        # After a pause of our own the answer may be there, and unread. The connection's own `can_read` would read it.
        if connection._sock is None or not select.select([connection._sock], [], [], 0)[0]:
            connection.disconnect()
            raise RedisTimeoutError(f"Redis has been silent for {silence:.0f} s")


class _AttentiveTransport:
    cycle: Any

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Look after the channels once a second."""
        super().register_with_event_loop(connection, loop)  # type: ignore[misc]
        loop.call_repeatedly(1, self._look_after_channels)

    def _look_after_channels(self) -> None:
        for channel in self.cycle._channels:
            channel.look_after()


class Channel(_AttentiveChannel, redis.Channel):
    """A channel to one server."""


class Transport(_AttentiveTransport, redis.Transport):
    """One server: redis://, rediss://."""

    Channel = Channel


class SentinelChannel(_AttentiveChannel, redis.SentinelChannel):
    """A channel to the master that the Sentinels name."""


class SentinelTransport(_AttentiveTransport, redis.SentinelTransport):
    """Sentinels: sentinel://."""

    Channel = SentinelChannel


def install() -> None:
    """Let every connection of this process be made so."""
    here = {"redis": Transport, "rediss": Transport, "sentinel": SentinelTransport}
    TRANSPORT_ALIASES.update({scheme: f"{__name__}:{made.__name__}" for scheme, made in here.items()})

"""Counting the object storage's errors, where all hosts see them: in the tally of the core database.

The counts are written by a thread of their own, outside the transaction in hand, so that counting neither delays nor
fails what is being done. While the database is away they wait in memory for the next error.
"""

import contextlib
import logging
import threading
from collections import Counter
from typing import Any

from botocore.response import StreamingBody
from django.db import Error as DatabaseClientError
from django.db import connections

logger = logging.getLogger(__name__)

SUBJECT = "s3"
DATABASE = "core"
STATEMENT_TIMEOUT_MS = 2000
READ = "ReadBody"
# What is used here: present as zero before the first error, so that the first one shows.
OPERATIONS = ("DeleteObject", "GetObject", "HeadBucket", "PutObject", READ)

_pending: Counter[str] = Counter()
_lock = threading.Lock()
_writer: threading.Thread | None = None


def watch(client: Any) -> None:
    """Count every call of this client that fails after its retries."""
    client.meta.events.register("after-call-error.s3", _no_answer)
    client.meta.events.register("after-call.s3", _answer)


def watch_body(body: Any) -> Any:
    """Count, too, when an object's bytes stop coming."""
    # Not wrapped: a wrapper would keep the connection from being closed as soon as nobody reads any more.
    body.__class__ = _WatchedBody
    return body


class _WatchedBody(StreamingBody):
    def read(self, amt: int | None = None) -> bytes:
        try:
            return bytes(super().read(amt))
        except Exception:
            count(READ)
            raise


def _no_answer(event_name: str, **_: Any) -> None:
    count(event_name.rpartition(".")[2])


def _answer(event_name: str, http_response: Any, **_: Any) -> None:
    operation = event_name.rpartition(".")[2]
    asked_whether = operation.startswith("Head") and http_response.status_code == 404
    if http_response.status_code >= 300 and not asked_whether:
        count(operation)


def count(operation: str) -> None:
    """Count one error, soon; never raises."""
    global _writer
    with _lock:
        _pending[operation] += 1
        if _writer is None:
            _writer = threading.Thread(target=_write, name="s3-errors")
            with contextlib.suppress(RuntimeError):  # no thread is to be had: the next error tries again
                _writer.start()
                return
            _writer = None


def _write() -> None:
    """Write what is pending until nothing is, or the database does not take it."""
    global _writer
    while True:
        with _lock:
            taken = Counter(_pending)
            _pending.clear()
            if not taken:
                _writer = None
                return
        if not _written(taken):
            with _lock:
                _pending.update(taken)
                _writer = None
            return


def _written(counts: Counter[str]) -> bool:
    # Models are not there yet when this module is imported.
    from django.db import transaction

    from drydock.jobs import engine

    try:
        with transaction.atomic(using=DATABASE):
            with connections[DATABASE].cursor() as cursor:
                cursor.execute("SELECT set_config('statement_timeout', %s, true)", [str(STATEMENT_TIMEOUT_MS)])
            for operation, number in sorted(counts.items()):
                engine.tally(DATABASE, SUBJECT, operation, number)
    except DatabaseClientError as error:
        logger.debug("errors of the object storage are not counted yet: %s", error)
        return False
    finally:
        connections.close_all()
    return True

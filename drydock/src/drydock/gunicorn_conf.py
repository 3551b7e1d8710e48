"""Gunicorn's settings: `gunicorn -c python:drydock.gunicorn_conf drydock.wsgi:application`.

It binds to the sockets that systemd passes (LISTEN_FDS), else to --bind. The module is read before anything starts, so
an incomplete environment ends here with one line for each missing variable.
"""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from drydock.config import VARIABLES, ConfigurationError, load

load()

worker_class = "gthread"
workers = 2
threads = 8
timeout = 60
# Longer than the proxy's, so that the proxy never sends a request into a closing connection.
keepalive = 65
graceful_timeout = 30
control_socket_disable = True
# Recycle a worker now and then, not all at once.
max_requests = 10000
max_requests_jitter = 1000

accesslog = "-"
# Without the query string; the address is the one that the proxy saw. The request's id is a field (`logs.py`).
access_log_format = "%(m)s %(U)s status=%(s)s seconds=%(L)s bytes=%(B)s client=%({x-forwarded-for}i)s"
logconfig_dict = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": "drydock.logs.LineFormatter"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"level": "INFO", "handlers": ["stderr"]},
    "loggers": {
        "gunicorn.error": {"level": "INFO", "handlers": [], "propagate": True},
        "gunicorn.access": {"level": "INFO", "handlers": [], "propagate": True},
    },
}


# --- Metrics: the workers count into files that all of them share, one set for each worker's slot ---------------------


def on_starting(_server: Any) -> None:
    """Make a directory for the counts of this run, and remove those of runs that have ended."""
    base = load().data_dir / "metrics"
    try:
        base.mkdir(parents=True, exist_ok=True)
        # One server at a time: until it is locked, the new directory looks like one that nobody uses.
        starting = _lock(base)
        for old in base.iterdir():
            _remove_unless_in_use(old)
        directory = Path(tempfile.mkdtemp(dir=base))
        # Held by this process and its workers for as long as one of them lives.
        _lock(directory)
        os.close(starting)
    except OSError as error:
        raise ConfigurationError(
            "drydock: " + VARIABLES["DRYDOCK_DATA_DIR"].problem(f"cannot be used ({error})")
        ) from error
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)


def pre_fork(server: Any, worker: Any) -> None:
    """Give the worker the lowest slot that is free: recycled workers go on counting where others stopped."""
    taken = {other.slot for other in server.WORKERS.values()}
    worker.slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)


def post_fork(_server: Any, worker: Any) -> None:
    """Count under the slot, not under the process id, of which there is a new one after every recycling."""
    from prometheus_client import values

    values.ValueClass = values.MultiProcessValue(process_identifier=lambda: worker.slot)


def _lock(directory: Path, flags: int = fcntl.LOCK_EX) -> int:
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, flags)
    return descriptor


def _remove_unless_in_use(directory: Path) -> None:
    try:
        descriptor = _lock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    shutil.rmtree(directory, ignore_errors=True)
    os.close(descriptor)

"""One JSON line for each event: the journal keeps them, `journalctl -o cat | jq` reads them."""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime

from drydock.jobs import context

REQUEST_ID = "{x-request-id}o"  # gunicorn's name for the response header


class LineFormatter(logging.Formatter):
    """Write a record as one line of JSON; a traceback is a field of it, and what is known of its cause are others."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **context.fields(),
            **_request_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _request_fields(record: logging.LogRecord) -> dict[str, str]:
    """Return what is known of the request for lines that are written after it: Django's about errors, gunicorn's."""
    if request := getattr(record, "request", None):
        return getattr(request, "log_fields", {})
    if record.name != "gunicorn.access" or not isinstance(record.args, Mapping):
        return {}
    request_id = str(record.args[REQUEST_ID])
    return {} if request_id == "-" else {"request": request_id}


class QuietPings(logging.Filter):
    """Drop Celery's lines about pings that went well: health checks send one every few seconds."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is kept."""
        routine = record.levelno <= logging.INFO and record.name.startswith("celery.")
        return not (routine and "drydock.operations.broker.ping[" in record.getMessage())

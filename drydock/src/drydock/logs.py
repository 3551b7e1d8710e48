"""One JSON line for each event: the journal keeps them, `journalctl -o cat | jq` reads them."""

import json
import logging
from datetime import UTC, datetime


class LineFormatter(logging.Formatter):
    """Write a record as one line of JSON; a traceback is a field of it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class QuietPings(logging.Filter):
    """Drop Celery's lines about pings that went well: health checks send one every few seconds."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is kept."""
        routine = record.levelno <= logging.INFO and record.name.startswith("celery.")
        return not (routine and "drydock.operations.broker.ping[" in record.getMessage())

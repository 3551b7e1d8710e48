"""What the logs keep."""

import logging

from drydock.logs import QuietPings


def record(level: int, message: str, name: str = "celery.app.trace") -> logging.LogRecord:
    return logging.LogRecord(name, level, __file__, 1, message, None, None)


def test_only_pings_that_went_well_are_dropped() -> None:
    keep = QuietPings().filter
    assert not keep(record(logging.INFO, "Task drydock.operations.broker.ping[1] succeeded in 0.001s"))
    assert keep(record(logging.ERROR, "Task drydock.operations.broker.ping[1] raised unexpected: OSError()"))
    assert keep(record(logging.INFO, "Task drydock.exports.tasks.export[1] succeeded in 2s"))
    assert keep(record(logging.INFO, "drydock.operations.broker.ping[1]", "drydock.web"))

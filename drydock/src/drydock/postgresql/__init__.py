"""PostgreSQL of several hosts, for Django: `ENGINE = "drydock.postgresql"`."""

from django.db import InterfaceError, OperationalError
from psycopg.errors import ReadOnlySqlTransaction


def is_away(error: BaseException | None) -> bool:
    """Say whether this error means that there is no primary (any more) at the other end, as during a failover."""
    read_only = isinstance(getattr(error, "__cause__", None), ReadOnlySqlTransaction)
    return read_only or isinstance(error, OperationalError | InterfaceError)

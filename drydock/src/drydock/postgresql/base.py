"""Django's backend for PostgreSQL, for a database whose primary moves from host to host."""

import psycopg
from django.db.backends.postgresql import base

# Where a connection was last made, by the hosts that there are. All threads share it.
_last: dict[tuple[str, str], tuple[str, str]] = {}


class DatabaseWrapper(base.DatabaseWrapper):
    """As Django's, with two additions for failovers."""

    def get_new_connection(self, conn_params: dict[str, str]) -> "psycopg.Connection":
        """Ask the host first that was the right one last time: one that is gone costs its time limit but once."""
        hosts = str(conn_params.get("host", "")).split(",")
        ports = str(conn_params.get("port", "")).split(",")
        places = list(zip(hosts, ports if len(ports) > 1 else ports * len(hosts), strict=False))
        if len(places) < 2:
            return super().get_new_connection(conn_params)
        key = (conn_params["host"], str(conn_params["port"]))
        places.sort(key=lambda place: place != _last.get(key))
        ordered = {"host": ",".join(host for host, _ in places), "port": ",".join(port for _, port in places)}
        connection = super().get_new_connection({**conn_params, **ordered})
        _last[key] = (connection.info.host, str(connection.info.port))
        return connection

    def is_usable(self) -> bool:
        """Say whether the server behind an open connection still answers, and still takes writes."""
        try:
            row = self.connection.execute("SHOW transaction_read_only").fetchone()
        except psycopg.Error:
            return False
        return bool(row == ("off",))

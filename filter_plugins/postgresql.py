"""Filters on PostgreSQL's settings."""

from __future__ import annotations

from typing import Any


def postgresql_memory(memory_mb: int, max_connections: int) -> dict[str, str]:
    """PostgreSQL's memory settings for a cluster that may use `memory_mb` of its host.

    The memory is first rounded down to steps, because a host reports some MiB more or less after another boot, and a new value of
    shared_buffers costs a restart.
    """
    step = 512 if memory_mb >= 1024 else 128
    memory = max(memory_mb // step * step, step)
    shared_buffers = _bounded(memory // 4, 64, 16384)
    values = {
        "shared_buffers": shared_buffers,
        # the planner's guess of what the kernel caches, too; allocates nothing
        "effective_cache_size": memory * 3 // 4,
        # VACUUM, index builds: a few at once
        "maintenance_work_mem": _bounded(memory // 16, 32, 2048),
        # each sort or hash of each query: three for each connection must fit beside shared_buffers
        "work_mem": _bounded((memory - shared_buffers) // (3 * max_connections), 4, 128),
    }
    return {name: f"{value}MB" for name, value in values.items()}


def _bounded(value: int, least: int, most: int) -> int:
    return min(max(value, least), most)


def maintenance_target(cluster: str, database: str = "", table: str = "") -> str:
    """What `pg_maintenance.py` is asked to work on: all of a cluster, one database, or one table."""
    return ":".join([cluster, database, table]).rstrip(":")


def systemd_escape(text: str) -> str:
    """The text as the instance of a unit's name, as `systemd-escape` writes it."""
    plain = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789:_.")
    escaped = "".join("-" if chr(byte) == "/" else chr(byte) if chr(byte) in plain else f"\\x{byte:02x}" for byte in text.encode())
    return f"\\x2e{escaped[1:]}" if escaped.startswith(".") else escaped


class FilterModule:
    """Filters for the roles of PostgreSQL and what runs them."""

    def filters(self) -> dict[str, Any]:
        return {"postgresql_memory": postgresql_memory, "maintenance_target": maintenance_target, "systemd_escape": systemd_escape}

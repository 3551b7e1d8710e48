"""Filters for the role pgbackrest: which clusters a host carries, and its units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Clusters = Mapping[str, Mapping[str, Any]]
PROGRAM = "/usr/local/lib/evenkeel/backup.py"
#: Type of backup to what it is called.
TYPES = {"full": "Full", "diff": "Differential", "incr": "Incremental"}


def clusters_of(clusters: Clusters, host: str) -> dict[str, Mapping[str, Any]]:
    """The clusters of which a host carries a member."""
    return {name: place for name, place in clusters.items() if host in members_of(place)}


def members_of(place: Mapping[str, Any]) -> list[str]:
    """The names of a cluster's members."""
    return [str(member["name"]) for member in place["members"]]


def backup_members(clusters: Clusters) -> dict[str, dict[str, list[str]]]:
    """The clusters and their members, for the program on the repository host."""
    return {name: {"members": members_of(place)} for name, place in clusters.items()}


def _task(name: str, instances: Sequence[str], task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The units of something that a timer starts, for each instance (cluster) or, without one, once."""
    at = "@" if instances else ""
    given = {"vars": {"__pgbackrest_task": dict(task)}}
    units = [
        {"name": f"{name}{at}.service", "template": "task.service.j2", **given},
        {"name": f"{name}{at}.timer", "template": "task.timer.j2", **given},
    ]
    if not instances:
        return [units[0], {**units[1], "enabled": True, "state": "started"}]
    return [*units, *({"name": f"{name}@{each}.timer", "enabled": True, "state": "started"} for each in instances)]


def _server(name: str, server: Mapping[str, Any], files: Sequence[str]) -> dict[str, Any]:
    return {
        "name": name,
        "template": "server.service.j2",
        "vars": {"__pgbackrest_server": dict(server)},
        "enabled": True,
        "state": "started",
        "reload_on": [f"/etc/pgbackrest/{server['config']}.conf", *files],
    }


def repository_units(clusters: Sequence[str], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The units of the repository host.

    settings: calendars {full, diff, incr, drill}, directories (of the repository, of this role's state, of metrics), files (the
    certificate's), memory_mb.
    """
    calendars, writes = settings["calendars"], list(settings["directories"])
    common = {"user": "pgbackrest", "writes": writes, "gentle": True, "hours": 24, "spread_seconds": 300}
    common["memory_mb"] = settings["memory_mb"]
    server = {"description": "Repository of the backups", "user": "pgbackrest", "config": "repository", "writes": writes}
    units = [_server("backup-repository.service", server, settings["files"])]
    for kind, title in TYPES.items():
        command = f"{PROGRAM} now %i --type {kind}"
        task = {**common, "description": f"{title} backup of cluster %i", "command": command, "calendar": calendars[kind]}
        units += _task(f"backup-{kind}", clusters, task)
    drill = {**common, "description": "Restore drill of cluster %i", "command": f"{PROGRAM} drill %i", "calendar": calendars["drill"]}
    metrics = {**common, "description": "Age and size of the backups as metrics", "command": f"{PROGRAM} metrics", "calendar": "*:0/15"}
    return [*units, *_task("restore-drill", clusters, drill), *_task("backup-metrics", [], {**metrics, "hours": 1, "spread_seconds": 30})]


def member_units(clusters: Sequence[str], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The units of a database host. settings: directories (that it writes to, and of metrics), files (the certificate's)."""
    agent = {"description": "Reads this host's clusters for their backups", "user": "postgres", "config": "member"}
    watch = {
        "description": "Whether the WAL of cluster %i is archived",
        "user": "postgres",
        "command": "/usr/local/lib/evenkeel/archive_watch.py %i",
        "calendar": "*:*:20",
        "writes": [settings["directories"][-1]],
        "gentle": False,
        "memory_mb": 128,
        "hours": 1,
        "spread_seconds": 0,
    }
    return [
        _server("backup-agent.service", {**agent, "writes": settings["directories"]}, settings["files"]),
        *_task("archive-watch", clusters, watch),
    ]


def command_words(result: Mapping[str, Any]) -> list[str]:
    """What a command printed, complaints last, as lines."""
    return [line for stream in ("stdout", "stderr") for line in str(result.get(stream) or "").splitlines() if line.strip()]


class FilterModule:
    """Gives the filters to Ansible."""

    def filters(self) -> dict[str, Any]:
        return {
            "clusters_of": clusters_of,
            "backup_members": backup_members,
            "repository_units": repository_units,
            "command_words": command_words,
            "member_units": member_units,
        }

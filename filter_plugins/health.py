"""Pure functions for the role healthcheck: the table of the services that a host checks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NEEDS = {"http": "url", "command": "command", "unit": "unit", "timer": "timers"}
OWN_DEFAULTS = {"timer": {"retries": 1}}  # the result of a run does not change by asking again


class HealthTableError(ValueError):
    """A row cannot be used; the message names it."""


def health_table(services: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of `healthcheck_services` with the defaults of H1, in the order of their names."""
    table: dict[str, dict[str, Any]] = {}
    for service in services:
        name = str(service["name"])
        place = f"healthcheck_services.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9@_.-]*", name):
            raise HealthTableError(f'{place}: the name "{name}" is not possible; use letters, digits and dashes')
        if name in table:
            raise HealthTableError(f"{place}: two services have this name")
        kind = str(service["kind"])
        needed = NEEDS[kind]
        if not service.get(needed):
            raise HealthTableError(f"{place}.{needed}: is missing; a check of kind {kind} needs it")
        if service.get("user") and (kind != "command" or service.get("credentials")):
            raise HealthTableError(f"{place}.user: only a command runs as a user, and its secrets are in environment_files")
        if kind in ("unit", "timer") and service.get("remote"):
            raise HealthTableError(f"{place}: a unit on another host cannot be seen from here; use an http or command check")
        if service.get("restart") and (kind == "timer" or service.get("remote") or not service.get("unit")):
            raise HealthTableError(f"{place}.restart: only a service of this host that has a unit can be restarted")
        for alternative in service.get("alternatives") or []:
            if list(alternative) != [needed]:
                raise HealthTableError(f"{place}.alternatives: each has {needed} and nothing else, because the check is of kind {kind}")
        # packages are for the role, not for the program that checks
        given = {key: value for key, value in service.items() if value is not None and key != "packages"}
        table[name] = {**defaults, **OWN_DEFAULTS.get(kind, {}), **given}
    for name, row in table.items():
        for other in row.get("after") or []:
            if other not in table:
                raise HealthTableError(f'healthcheck_services.{name}.after: no row is called "{other}"')
    return [table[name] for name in sorted(table)]


def health_watchers(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The daemons that a host needs: one, and one more for each user whose environment its checks need.

    Then no daemon needs a privilege: systemd gives each its user and reads that user's environment files.
    """
    users: dict[str, list[str]] = {"": []}
    for row in table:
        if row.get("remote"):
            continue
        files = users.setdefault(row.get("user") or "", [])
        files += [path for path in row.get("environment_files", []) if path not in files]
    return [
        {
            "unit": f"evenkeel-health-{user}.service" if user else "evenkeel-health.service",
            "user": user,
            "environment_files": files if user else [],
        }
        for user, files in sorted(users.items())
    ]


def _as_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        from ansible.errors import AnsibleFilterError

        try:
            return function(*args, **kwargs)
        except HealthTableError as error:
            raise AnsibleFilterError(str(error)) from None

    return run


class FilterModule:
    """Gives the filters to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"health_table": _as_filter(health_table), "health_watchers": health_watchers}

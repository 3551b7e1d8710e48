# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""What an entry of the `units` module may say, and when a unit has to be started again.

Nothing here looks at a host.
"""

from __future__ import annotations

import datetime
import os.path
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

UNIT_DIRECTORY = "/etc/systemd/system"
RECORD_DIRECTORY = "/var/lib/evenkeel/units"
DROP_IN = "evenkeel.conf"

STATES = ("started", "stopped", "absent")
KEYS = (
    "name",
    "template",
    "content",
    "drop_in",
    "vars",
    "enabled",
    "masked",
    "state",
    "restart",
    "restart_on",
    "reload_on",
    "requires_path",
)
PROPERTIES = (
    "Id",
    "LoadState",
    "ActiveState",
    "SubState",
    "UnitFileState",
    "NeedDaemonReload",
    "CanReload",
    "InvocationID",
    "InactiveExitTimestamp",
    "Type",
    "Triggers",
    "Result",
    "ExecMainCode",
    "ExecMainStatus",
    "NRestarts",
    "ConditionResult",
)
UNSEEN = "unseen"  # kept for a file that the running process is known not to have seen
CLOCK_MARGIN_SECONDS = 0.05  # a file's change time comes from a coarser clock than a unit's start time

_NAME = re.compile(
    r"[A-Za-z0-9:_.\\-]+(@[A-Za-z0-9:_.\\-]*)?"
    r"\.(service|socket|timer|path|target|mount|automount|slice|swap)"
)
_ENABLED = ("enabled", "static", "alias", "indirect", "generated", "linked", "transient")


@dataclass(frozen=True)
class Live:
    """What systemd says about a unit."""

    load: str = "not-found"
    active: str = "inactive"
    sub: str = "dead"
    file_state: str = ""
    needs_reload: bool = False
    can_reload: bool = False
    invocation: str = ""
    started_at: float = 0.0
    type: str = ""
    triggers: tuple[str, ...] = ()
    result: str = ""
    exit_code: str = ""
    exit_status: str = ""
    restarts: int = 0
    condition: bool = True

    @property
    def known(self) -> bool:
        """Whether systemd has found a definition of the unit."""
        return self.load != "not-found"

    @property
    def running(self) -> bool:
        """Whether the unit is up or coming up; a unit waiting for its next automatic restart is not."""
        return self.active in ("active", "reloading") or (self.active == "activating" and self.sub != "auto-restart")

    @property
    def enabled(self) -> bool:
        """Whether nothing is left to enable: static and generated units count, as for `systemctl is-enabled`."""
        return self.file_state in _ENABLED

    @property
    def masked(self) -> bool:
        """Whether the unit is masked, for ever or until the next boot."""
        return self.load == "masked" or self.file_state.startswith("masked")


@dataclass(frozen=True)
class Trigger:
    """A file on which a unit depends, as it is now."""

    digest: str
    changed_at: float = 0.0


@dataclass(frozen=True)
class Record:
    """What the trigger files were when this module last started or reloaded the unit."""

    digests: Mapping[str, str]
    invocation: str


@dataclass(frozen=True)
class Wanted:
    """A unit as the task wants it, contents aside."""

    name: str
    enabled: bool | None = None
    masked: bool | None = None
    state: str | None = None
    restart: bool = True
    restart_on: tuple[str, ...] = ()
    reload_on: tuple[str, ...] = ()
    requires_path: str | None = None


@dataclass
class Plan:
    """What has to be done to one unit, and why."""

    enable: bool = False
    disable: bool = False
    mask: bool = False
    unmask: bool = False
    run: str = ""  # start, restart, reload or stop
    reasons: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)  # files for which a restart is due that others shall make
    waiting: bool = False
    join: bool = False  # it is on its way up: wait for it, which changes nothing

    @property
    def changes(self) -> bool:
        """Whether anything is to be done."""
        return bool(self.enable or self.disable or self.mask or self.unmask or self.run)


def template_of(name: str) -> str | None:
    """Return `patroni@.service` for `patroni@core.service`, None for a name without an instance."""
    stem, _, suffix = name.rpartition(".")
    prefix, at, instance = stem.partition("@")
    return f"{prefix}@.{suffix}" if at and instance else None


def is_template(name: str) -> bool:
    """Say whether a name is that of a template, which cannot run itself."""
    return name.rpartition(".")[0].endswith("@")


def unit_path(name: str) -> str:
    """Return where the module writes a unit."""
    return f"{UNIT_DIRECTORY}/{name}"


def drop_in_path(name: str) -> str:
    """Return where the module writes a unit's drop-in."""
    return f"{UNIT_DIRECTORY}/{name}.d/{DROP_IN}"


def definition_paths(name: str) -> list[str]:
    """Return the files that may define a unit on the module's behalf."""
    template = template_of(name)
    names = [name] if template is None else [template, name]
    return [path for each in names for path in (unit_path(each), drop_in_path(each))]


def record_path(name: str) -> str:
    """Return where the module keeps what it last started a unit with."""
    return f"{RECORD_DIRECTORY}/{name}.json"


def install_section(text: bytes) -> list[bytes]:
    """Return the meaningful lines of a unit's [Install] section."""
    lines: list[bytes] = []
    inside = False
    for line in (raw.strip() for raw in text.splitlines()):
        if line.startswith(b"["):
            inside = line == b"[Install]"
        elif inside and line and not line.startswith((b"#", b";")):
            lines.append(line)
    return lines


def parse_show(output: str, names: Sequence[str]) -> dict[str, Live]:
    """Read the answer of one `systemctl show` about several units: a block each, in the order of the question."""
    blocks = [block for block in output.strip("\n").split("\n\n") if block.strip()]
    if len(blocks) != len(names):
        raise ValueError(f"systemctl show answered about {len(blocks)} of {len(names)} units")
    return {name: _live(block) for name, block in zip(names, blocks, strict=True)}


def _live(block: str) -> Live:
    values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
    return Live(
        load=values.get("LoadState", "not-found"),
        active=values.get("ActiveState", "inactive"),
        sub=values.get("SubState", ""),
        file_state=values.get("UnitFileState", ""),
        needs_reload=values.get("NeedDaemonReload") == "yes",
        can_reload=values.get("CanReload") == "yes",
        invocation=values.get("InvocationID", ""),
        started_at=parse_timestamp(values.get("InactiveExitTimestamp", "")),
        type=values.get("Type", ""),
        triggers=tuple(values.get("Triggers", "").split()),
        result=values.get("Result", ""),
        exit_code=values.get("ExecMainCode", ""),
        exit_status=values.get("ExecMainStatus", ""),
        restarts=int(values.get("NRestarts") or 0),
        condition=values.get("ConditionResult") != "no",
    )


def parse_timestamp(text: str) -> float:
    """Return the seconds of `Sat 2026-11-21 21:46:42.123456 UTC`; 0 for a time that never was."""
    words = text.split()
    if len(words) != 4:
        return 0.0
    form = "%Y-%m-%d %H:%M:%S.%f" if "." in words[2] else "%Y-%m-%d %H:%M:%S"
    try:
        moment = datetime.datetime.strptime(f"{words[1]} {words[2]}", form)
    except ValueError:
        return 0.0
    return moment.replace(tzinfo=datetime.UTC).timestamp()


def plan_unit(
    wanted: Wanted,
    live: Live,
    triggers: Mapping[str, Trigger],
    record: Record | None,
    *,
    definition_changes: bool,
    changed_files: Collection[str],
    path_exists: bool,
) -> Plan:
    """Decide what has to be done to a unit."""
    plan = Plan()
    if wanted.masked is not None:
        plan.mask = wanted.masked and not live.masked
        plan.unmask = live.masked and not wanted.masked
    if wanted.enabled is not None:
        plan.enable = wanted.enabled and not live.enabled
        plan.disable = not wanted.enabled and live.file_state in ("enabled", "enabled-runtime", "linked")
    if wanted.state == "stopped" and live.active not in ("inactive", "failed"):
        plan.run = "stop"
    if wanted.state == "started":
        if not path_exists:
            plan.waiting = True
        elif not live.running:
            plan.run = "start"
        else:
            _plan_running(plan, wanted, live, triggers, record, definition_changes, changed_files)
            plan.join = not plan.run and live.active in ("activating", "reloading")
    return plan


def _plan_running(
    plan: Plan,
    wanted: Wanted,
    live: Live,
    triggers: Mapping[str, Trigger],
    record: Record | None,
    definition_changes: bool,
    changed_files: Collection[str],
) -> None:
    definition = definition_paths(wanted.name)
    read_at_start = [*wanted.restart_on, *wanted.reload_on]
    restart: list[str] = []
    reload: list[str] = []
    reasons: list[str] = []
    if record is None:
        if read_at_start or any(triggers[path].digest != "absent" for path in definition):
            restart, reasons = [*definition, *read_at_start], ["it was started by something else"]
    else:
        restart = [path for path in definition if definition_is_stale(path, triggers[path], record, live)]
        restart += [path for path in wanted.restart_on if is_stale(path, triggers[path], record, live, changed_files)]
        reload = [path for path in wanted.reload_on if is_stale(path, triggers[path], record, live, changed_files)]
        if not live.can_reload:
            restart, reload = restart + reload, []
        reasons = restart
    if definition_changes:
        restart, reasons = [*definition, *restart], ["its definition"]
    if restart and wanted.restart:
        plan.run, plan.reasons = "restart", reasons
        return
    plan.unseen = restart
    if reload:
        plan.run, plan.reasons = "reload", reload


def definition_is_stale(path: str, now: Trigger, record: Record, live: Live) -> bool:
    """Say whether the running process was started by another definition than the present one.

    A process that something else started later was started by what systemd had read then: by a file that is older than itself, if
    systemd has read it since.
    """
    if record.digests.get(path, "absent") == now.digest:
        return False
    same_process = record.invocation == live.invocation
    return same_process or live.needs_reload or now.changed_at + CLOCK_MARGIN_SECONDS > live.started_at


def is_stale(path: str, now: Trigger, record: Record, live: Live, changed_files: Collection[str]) -> bool:
    """Say whether the running process has not seen a file's present content.

    The record answers for the process that it was written for. A process that something else started later (a crash,
    a reboot, an operator) has seen every file that is older than itself and may have seen anything else.
    """
    same_process = record.invocation == live.invocation
    newer_than_process = now.changed_at + CLOCK_MARGIN_SECONDS > live.started_at
    if not same_process:
        return newer_than_process or path in changed_files
    return record.digests.get(path) != now.digest or path in changed_files


def check_units(entries: Sequence[Any]) -> list[str]:
    """Return what is wrong with the entries, a line each."""
    problems: list[str] = []
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        label = label_of(index, entry)
        found = [f"{label}: {problem}" for problem in check_unit(entry)]
        problems += found
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if isinstance(name, str) and name in seen:
            problems.append(f"{label}: the same unit as entry {seen[name] + 1}")
        elif isinstance(name, str):
            seen[name] = index
    return problems


def label_of(index: int, entry: Any) -> str:
    """Name an entry for a message."""
    name = entry.get("name") if isinstance(entry, Mapping) else None
    return f"unit {index + 1} ({name})" if isinstance(name, str) and name else f"unit {index + 1}"


def check_unit(entry: Any) -> list[str]:
    """Return what is wrong with one entry."""
    if not isinstance(entry, Mapping):
        return ["must be a mapping with name"]
    problems = [f"unknown key {str(key)!r}; known are {', '.join(KEYS)}" for key in sorted(entry, key=str) if key not in KEYS]
    given = {str(key): value for key, value in entry.items() if value is not None}
    name = given.get("name")
    if not isinstance(name, str) or len(name) > 200 or not _NAME.fullmatch(name):
        return [*problems, "needs name, a whole unit name such as etcd.service"]
    if given.get("state") not in (None, *STATES):
        problems.append(f"state must be one of {', '.join(STATES)}; it is {given['state']!r}")
    for key in ("enabled", "masked", "restart"):
        if key in given and not isinstance(given[key], bool):
            problems.append(f"{key} must be true or false")
    problems += _check_sources(given)
    problems += _check_paths(given)
    problems += _check_together(name, given)
    return problems


def _check_sources(given: Mapping[str, Any]) -> list[str]:
    problems = _check_source("", given)
    drop_in = given.get("drop_in")
    templates = [given.get("template")]
    if drop_in is not None:
        if not isinstance(drop_in, Mapping):
            problems.append("drop_in must be a mapping with template or content")
        else:
            inner = {str(key): value for key, value in drop_in.items() if value is not None}
            problems += [f"drop_in: unknown key {key!r}" for key in inner if key not in ("template", "content")]
            if len(inner.keys() & {"template", "content"}) != 1:
                problems.append("drop_in needs template or content, one of them")
            problems += _check_source("drop_in: ", inner)
            templates.append(inner.get("template"))
    if "vars" in given:
        if not isinstance(given["vars"], Mapping) or not all(isinstance(key, str) for key in given["vars"]):
            problems.append("vars must be a mapping of variable names to values")
        elif not any(templates):
            problems.append("vars is only for template")
    return problems


def _check_source(where: str, given: Mapping[str, Any]) -> list[str]:
    problems: list[str] = []
    if not where and "template" in given and "content" in given:
        problems.append("has template and content; give one of them")
    for key in ("template", "content"):
        if key in given and (not isinstance(given[key], str) or not given[key].strip()):
            problems.append(f"{where}{key} must be a non-empty text")
    return problems


def _check_paths(given: Mapping[str, Any]) -> list[str]:
    problems: list[str] = []
    for key in ("restart_on", "reload_on"):
        paths = given.get(key, [])
        if isinstance(paths, str) or not isinstance(paths, Sequence):
            problems.append(f"{key} must be a list of absolute paths")
        else:
            problems += [f"{key}: {path!r} is not an absolute path" for path in paths if not _is_path(path)]
    if "requires_path" in given and not _is_path(given["requires_path"]):
        problems.append(f"requires_path: {given['requires_path']!r} is not an absolute path")
    if given.get("state") != "started":
        needless = [key for key in ("restart", "restart_on", "reload_on", "requires_path") if given.get(key) not in (None, [], "")]
        problems += [f"{key} has no meaning without state: started" for key in needless]
    return problems


def _is_path(path: Any) -> bool:
    return isinstance(path, str) and os.path.isabs(path) and "\0" not in path


def _check_together(name: str, given: Mapping[str, Any]) -> list[str]:
    problems: list[str] = []
    if given.get("state") == "absent":
        others = [key for key in given if key not in ("name", "state") and key in KEYS]
        problems += [f"{key} has no meaning with state: absent" for key in others]
    if is_template(name):
        if given.get("state") in ("started", "stopped"):
            problems.append("a template unit cannot run; name an instance of it")
        if "enabled" in given:
            problems.append("a template unit cannot be enabled; name an instance of it")
    if given.get("masked") is True:
        if given.get("state") == "started" or given.get("enabled") is True:
            problems.append("a masked unit can be neither started nor enabled")
        if "template" in given or "content" in given:
            problems.append("a masked unit has no content")
    if len(given) == 1 and "name" in given:
        problems.append("says nothing about the unit; give content, drop_in, enabled, masked or state")
    return problems

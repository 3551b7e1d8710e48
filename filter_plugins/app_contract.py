"""The app contract: what an application tells the suite about itself.

``app | app_contract(groups)`` checks the dictionary ``app`` of the inventory and returns it complete: defaults filled
in, names of users, paths and units derived, hosts resolved. Whatever is wrong ends in one sentence that begins with the
path of the value (``app.processes.web.comand: unknown name, did you mean command?``), before anything has changed.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast


class ContractError(ValueError):
    """The contract cannot be used; the message names the path of the value and what to do."""


@dataclass(frozen=True)
class Text:
    """A string that is not empty."""

    pattern: str = ""
    means: str = "a text"
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Number:
    """A whole number within bounds."""

    least: int
    most: int


@dataclass(frozen=True)
class Flag:
    """True or false."""


@dataclass(frozen=True)
class Scalar:
    """The value of an environment variable."""


@dataclass(frozen=True)
class Items:
    """A list; `single` says that one value may be written without brackets."""

    of: Kind
    least: int = 0
    single: bool = False


@dataclass(frozen=True)
class Table:
    """A dictionary with free keys."""

    of: Kind
    key: str = r"[a-z][a-z0-9-]*"
    key_means: str = "small letters, digits and dashes, beginning with a letter"
    least: int = 0


@dataclass(frozen=True)
class Record:
    """A dictionary with known names."""

    fields: Mapping[str, Field]


Kind = Text | Number | Flag | Scalar | Items | Table | Record


@dataclass(frozen=True)
class Field:
    """One known name of a record. A field without `required` and without `default` is left out when not given."""

    kind: Kind
    required: bool = False
    default: Callable[[], Any] | None = field(default=None)


VARIABLE = Table(Scalar(), r"[A-Za-z_][A-Za-z0-9_]*", "letters, digits and underscores")
CREDENTIALS = "{credentials}"  # in a command or an environment value: the directory that holds the process's credentials
ABSOLUTE = Text(r"/(?!.*(?:^|/)\.\.(?:/|$))[^\s\"'\\%$]*", "an absolute path without spaces, quotes, '$', '%' or '..'")
URL_PATH = Text(r"/[^\s]*", "a path that begins with '/'")
WORDS = Items(Text())
COMMAND = Items(Scalar(), least=1)
STATUS = Number(100, 599)
PORT = Number(1, 65535)
SECONDS = Number(1, 7 * 86400)

CREDENTIAL = Table(ABSOLUTE, r"[A-Za-z0-9_][A-Za-z0-9._-]*", "letters, digits, dots, dashes and underscores, as in tls.key")

HEALTH = Record(
    {
        "http": Field(
            Record(
                {
                    "path": Field(URL_PATH, required=True),
                    "port": Field(PORT),
                    "status": Field(STATUS, default=lambda: 200),
                    "contains": Field(Text()),
                    "bearer": Field(Text()),
                    "host": Field(Text(r"[^\s]+", "a host name")),
                    "tls": Field(Flag()),
                    "ca": Field(ABSOLUTE),
                }
            )
        ),
        "command": Field(COMMAND),
        "restart": Field(Flag()),
    }
)

RESOURCES = Record({"memory_mb": Field(Number(64, 1024 * 1024)), "tasks": Field(Number(16, 32768))})

PROCESS = Record(
    {
        "kind": Field(Text(choices=("web", "worker", "service", "timer", "task")), required=True),
        "hosts": Field(Text(), required=True),
        "command": Field(COMMAND, required=True),
        "after": Field(WORDS, default=list),
        "packages": Field(WORDS, default=list),
        "environment": Field(VARIABLE, default=dict),
        "credentials": Field(CREDENTIAL, default=dict),
        "notify": Field(Flag(), default=lambda: False),
        "start_period_seconds": Field(Number(0, 3600)),
        "health": Field(HEALTH),
        "port": Field(PORT),
        "path": Field(URL_PATH),
        "queue": Field(Text(r"[^\s]+", "a name without spaces")),
        "task_time_limit_seconds": Field(SECONDS),
        "on_calendar": Field(Text()),
        "once": Field(Text()),
        "resources": Field(RESOURCES, default=dict),
    }
)

STEP = Record(
    {
        "name": Field(Text(r"[0-9]{2}-[a-z0-9-]+", "two digits, a dash and a word, as in 10-web"), required=True),
        "environment": Field(Table(Text(), VARIABLE.key, VARIABLE.key_means), default=dict),
        "directories": Field(
            Items(
                Record(
                    {
                        "path": Field(ABSOLUTE, required=True),
                        "mode": Field(Text(r"0[0-7]{3}", "four octal digits in quotes"), default=lambda: "0750"),
                    }
                )
            ),
            default=list,
        ),
        "writable": Field(Items(ABSOLUTE), default=list),
        "command": Field(COMMAND),
        "start": Field(WORDS, default=list),
    }
)

CHECK = Record(
    {
        "name": Field(Text(), required=True),
        "path": Field(URL_PATH, required=True),
        "method": Field(Text(choices=("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")), default=lambda: "GET"),
        "status": Field(STATUS, default=lambda: 200),
        "bearer": Field(Text()),
        "contains": Field(Items(Text(), single=True), default=list),
    }
)

PRUNE = Record(
    {
        "name": Field(Text(r"[a-z][a-z0-9-]*", "small letters, digits and dashes, beginning with a letter"), required=True),
        "hosts": Field(Text(), required=True),
        "command": Field(COMMAND, required=True),
        "dry_run": Field(Items(Scalar(), least=1), required=True),
        "once": Field(Flag(), default=lambda: False),
    }
)

MIGRATIONS = Record(
    {
        "django": Field(WORDS, default=list),
        "settings": Field(Text()),
        "commands": Field(
            Record(
                {
                    "plan": Field(COMMAND, required=True),
                    "apply": Field(COMMAND, required=True),
                    "state": Field(COMMAND),
                    "reversal": Field(COMMAND),
                    "reverse": Field(COMMAND),
                }
            )
        ),
    }
)

INSTALL = Record(
    {
        "project": Field(Text()),
        "lock": Field(Text()),
        "requirement": Field(Text(r"[A-Za-z0-9][A-Za-z0-9._-]*", "the name of a package, without a version")),
        "locks": Field(Text()),
        "build": Field(WORDS, default=list),
    }
)
WAYS_TO_INSTALL = (("project", "lock"), ("requirement", "locks"))  # from a git repository, from a package index

APP = Record(
    {
        # A Debian user name, a directory and the prefix of unit names at once.
        "name": Field(Text(r"[a-z][a-z0-9-]{0,30}", "small letters, digits and dashes, at most 31"), required=True),
        "install": Field(INSTALL, required=True),
        "packages": Field(WORDS, default=list),
        "environment": Field(VARIABLE, default=dict),
        "secrets": Field(VARIABLE, default=dict),
        "databases": Field(Table(Record({"name": Field(Text(), required=True)})), default=dict),
        "processes": Field(Table(PROCESS, least=1), required=True),
        "bootstrap": Field(Table(Items(STEP)), default=dict),
        "migrations": Field(MIGRATIONS, default=lambda: {"django": []}),
        "checks": Field(Items(CHECK), default=list),
        "prune": Field(Items(PRUNE), default=list),
    }
)

# Names that only some kinds of process may carry, and those that they must carry.
ONLY_FOR = {
    "port": ("web", "service"),
    "path": ("web",),
    "queue": ("worker",),
    "task_time_limit_seconds": ("worker", "timer", "task"),
    "on_calendar": ("timer",),
    "once": ("timer",),
}
REQUIRED_FOR = {"web": ("port", "health"), "worker": ("task_time_limit_seconds",), "timer": ("on_calendar",)}
OCCASIONAL = ("timer", "task")  # they run and end: their last run is their health, and nobody can wait for them
START_PERIOD_SECONDS = {"web": 30}  # H1; every other kind 10
# Far above what such a process needs, and far below what makes a host useless to others. Workers run other people's programs (TeX).
MEMORY_MB = {"web": 2048, "worker": 4096}  # every other kind 1024
TASKS = {"web": 512, "worker": 512}  # every other kind 256
LOGS, DRY_RUN = "logs", "-bootstrap-check"  # units of the suite beside those of the processes
HOST_CA = "/etc/evenkeel/pki/ca.crt"  # whom the role pki's certificates are verified against
WORKER_GRACE_SECONDS = 30  # P3: a worker may finish its longest task, and needs a little to say goodbye


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean X?`` when one of `known` is near, else the list of what is known."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"known are: {', '.join(names)}" if names else "none is known"


def _kind_of(value: object) -> str:
    """What a person would call the kind of a value in YAML."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, int):
        return "a number"
    if isinstance(value, float):
        return "a number with a fraction"
    if isinstance(value, Mapping):
        return "a dictionary"
    if isinstance(value, Sequence):
        return "a list"
    return type(value).__name__


def _wrong(path: str, expected: str, value: object) -> ContractError:
    return ContractError(f"{path}: must be {expected}, but is {_kind_of(value)}")


def _text(value: Any, kind: Text, path: str) -> str:
    if not isinstance(value, str):
        hint = " (write it in quotes)" if isinstance(value, bool | int | float) else ""
        raise ContractError(f"{path}: must be {kind.means}, but is {_kind_of(value)}{hint}")
    text = str(value)
    if not text.strip():
        raise ContractError(f"{path}: is empty")
    if kind.choices and text not in kind.choices:
        raise ContractError(f'{path}: "{text}" is not one of {", ".join(kind.choices)}')
    if kind.pattern and not re.fullmatch(kind.pattern, text):
        raise ContractError(f'{path}: must be {kind.means}, but is "{text}"')
    return text


def _number(value: Any, kind: Number, path: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]+", value):
        value = int(value)  # a template such as "{{ web_port }}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(path, "a whole number", value)
    if not kind.least <= value <= kind.most:
        raise ContractError(f"{path}: must be between {kind.least} and {kind.most}, but is {value}")
    return int(value)


def _scalar(value: Any, path: str) -> str:
    if isinstance(value, bool):
        raise ContractError(f'{path}: must be a text; write "true" or "false" in quotes')
    if value is None or (isinstance(value, str) and value == ""):
        raise ContractError(f"{path}: is empty; give it a value or remove it")
    if not isinstance(value, str | int | float):
        raise _wrong(path, "a text", value)
    if "\0" in str(value):
        raise ContractError(f"{path}: contains a NUL character, which no environment variable can hold")
    return str(value)


def _table(value: Any, kind: Table, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(path, "a dictionary", value)
    if len(value) < kind.least:
        raise ContractError(f"{path}: is empty; at least {kind.least} is needed")
    for key in value:
        if not isinstance(key, str) or not re.fullmatch(kind.key, key):
            raise ContractError(f'{path}: the name "{key}" is not possible; use {kind.key_means}')
    return {str(key): _read(value[key], kind.of, f"{path}.{key}") for key in value}


def _record(value: Any, kind: Record, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(path, "a dictionary", value)
    for name in value:
        if name not in kind.fields:
            raise ContractError(f"{path}.{name}: unknown name, {did_you_mean(str(name), kind.fields)}")
    result: dict[str, Any] = {}
    for name, entry in kind.fields.items():
        if name in value:
            result[name] = _read(value[name], entry.kind, f"{path}.{name}")
        elif entry.required:
            raise ContractError(f"{path}.{name}: is missing")
        elif entry.default is not None:
            result[name] = entry.default()
    return result


def _items(value: Any, kind: Items, path: str) -> list[Any]:
    if kind.single and isinstance(value, str):
        value = [value]
    if isinstance(value, str) or not isinstance(value, Sequence):
        hint = f"; write [{', '.join(value.split())}]" if isinstance(value, str) and value.split() else ""
        raise ContractError(f"{path}: must be a list, but is {_kind_of(value)}{hint}")
    if len(value) < kind.least:
        raise ContractError(f"{path}: is empty")
    result = []
    for number, item in enumerate(value):
        # A step or a check is easier to find by its name than by its number.
        label = item.get("name") if isinstance(item, Mapping) else None
        place = f"{path}.{label}" if isinstance(label, str) and label else f"{path}[{number}]"
        result.append(_read(item, kind.of, place))
    return result


def _read(value: Any, kind: Kind, path: str) -> Any:
    """Check one value and return it as plain data."""
    match kind:
        case Text():
            return _text(value, kind, path)
        case Number():
            return _number(value, kind, path)
        case Flag():
            if not isinstance(value, bool):
                raise _wrong(path, "true or false", value)
            return bool(value)
        case Scalar():
            return _scalar(value, path)
        case Items():
            return _items(value, kind, path)
        case Table():
            return _table(value, kind, path)
        case Record():
            return _record(value, kind, path)


def _members(group: str, groups: Mapping[str, Sequence[str]], path: str) -> list[str]:
    if group not in groups:
        names = set(groups) - {"all", "ungrouped"}
        raise ContractError(f'{path}: the inventory has no group "{group}", {did_you_mean(group, names)}')
    if not groups[group]:
        raise ContractError(f'{path}: the group "{group}" has no host in the inventory; add one or remove the process')
    return [str(host) for host in groups[group]]


def _health(process: dict[str, Any], secrets: Mapping[str, str], path: str) -> dict[str, Any]:
    """Normalise to ``{"kind": "http" | "command" | "unit", "restart": …, …}``."""
    if "health" not in process:  # H1: every service has a check; without a better one: its unit runs, for which systemd cares
        return {"kind": "unit", "restart": False}
    given = dict(process["health"])
    restart = given.pop("restart", True)
    if len(given) != 1:
        raise ContractError(f"{path}: must have exactly one of http and command")
    return {**_check(given, process, secrets, path), "restart": restart}


def _check(given: Mapping[str, Any], process: Mapping[str, Any], secrets: Mapping[str, str], path: str) -> dict[str, Any]:
    if "command" in given:
        if any(CREDENTIALS in word for word in given["command"]):
            raise ContractError(f"{path}.command: {CREDENTIALS} is for the process alone; its health check runs apart and has none")
        return {"kind": "command", "command": given["command"]}
    http = dict(given["http"])
    if "port" not in http:
        if "port" not in process:
            raise ContractError(f"{path}.http.port: is missing; the process has no port of its own")
        http["port"] = process["port"]
    if http.pop("tls", False):
        http.setdefault("ca", HOST_CA)
    elif "ca" in http:
        raise ContractError(f"{path}.http.ca: says whom to trust over TLS, but tls is not true")
    _known_secret(http.get("bearer"), secrets, f"{path}.http.bearer")
    return {"kind": "http", **http}


def _known_secret(name: str | None, secrets: Mapping[str, str], path: str) -> None:
    if name is not None and name not in secrets:
        raise ContractError(f'{path}: app.secrets has no "{name}", {did_you_mean(name, secrets)}')


def _process(name: str, process: dict[str, Any], app: Mapping[str, Any], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    path, kind = f"app.processes.{name}", process["kind"]
    if name == LOGS or name.endswith(DRY_RUN):
        raise ContractError(f"{path}: the suite has a unit {app['name']}-{name} of its own; choose another name")
    for optional, kinds in ONLY_FOR.items():
        if optional in process and kind not in kinds:
            raise ContractError(f"{path}.{optional}: only a process of kind {' or '.join(kinds)} has it, not a {kind}")
    for needed in REQUIRED_FOR.get(kind, ()):
        if needed not in process:
            raise ContractError(f"{path}.{needed}: is missing; a process of kind {kind} needs it")
    if kind in OCCASIONAL and ("health" in process or process["notify"]):
        raise ContractError(f"{path}: a {kind} has neither health nor notify; its last run is its health")
    if "once" in process and process["once"] not in app["databases"]:
        raise ContractError(f'{path}.once: app.databases has no "{process["once"]}", {did_you_mean(process["once"], app["databases"])}')
    _check_environment(process, app, path)
    unit = f"{app['name']}-{name}"
    result: dict[str, Any] = {
        **process,
        "name": name,
        "unit": f"{unit}.service",
        "socket": f"{unit}.socket" if kind == "web" else None,
        "timer": f"{unit}.timer" if kind == "timer" else None,
        "members": _members(process["hosts"], groups, f"{path}.hosts"),
        "health": {"kind": kind} if kind in OCCASIONAL else _health(process, app["secrets"], f"{path}.health"),
    }
    for optional in ("port", "queue", "on_calendar", "once", "task_time_limit_seconds"):
        result.setdefault(optional, None)
    result["path"] = result.get("path", "/" if kind == "web" else None)
    result.setdefault("start_period_seconds", START_PERIOD_SECONDS.get(kind, 10))
    result["resources"] = {"memory_mb": MEMORY_MB.get(kind, 1024), "tasks": TASKS.get(kind, 256), **process["resources"]}
    limit = result["task_time_limit_seconds"]
    result["stop_seconds"] = limit + WORKER_GRACE_SECONDS if kind == "worker" else None
    return result


def _check_environment(process: Mapping[str, Any], app: Mapping[str, Any], path: str) -> None:
    """A variable has one source, and only a process with credentials can name their directory."""
    for variable in process["environment"]:
        if variable in app["secrets"]:
            raise ContractError(f"{path}.environment.{variable}: is in app.secrets too; keep it in one of them")
    if not process["credentials"]:
        words = [("command", word) for word in process["command"]]
        words += [(f"environment.{name}", value) for name, value in process["environment"].items()]
        for place, word in words:
            if CREDENTIALS in word:
                raise ContractError(f"{path}.{place}: {CREDENTIALS} is the directory of its credentials, but {path}.credentials is empty")


def _check_ports(processes: Mapping[str, Mapping[str, Any]]) -> None:
    taken: dict[tuple[str, int], str] = {}
    for name, process in processes.items():
        if process["port"] is None:
            continue
        for host in process["members"]:
            other = taken.setdefault((host, process["port"]), name)
            if other != name:
                raise ContractError(
                    f"app.processes.{name}.port: {process['port']} on host {host} is already taken "
                    f"by app.processes.{other}; give one of them another port"
                )


def _check_paths(processes: Mapping[str, Mapping[str, Any]]) -> None:
    taken: dict[str, str] = {}
    for name, process in processes.items():
        if process["path"] is None:
            continue
        other = taken.setdefault(process["path"], name)
        if other != name:
            raise ContractError(
                f"app.processes.{name}.path: {process['path']} is already served by app.processes.{other}; give one of them another path"
            )


def _check_remote(processes: Mapping[str, Mapping[str, Any]], app: str) -> None:
    """A process that others wait for from another host needs a check that can be made from there."""
    for name, process in processes.items():
        for other_name, other in processes.items():
            elsewhere = [host for host in process["members"] if host not in other["members"]]
            if f"{app}-{other_name}" in process["after"] and other["health"]["kind"] == "unit" and elsewhere:
                raise ContractError(
                    f"app.processes.{other_name}.health: is missing; {name} on {elsewhere[0]} waits for this process "
                    "from another host, so it needs an http or command check"
                )


def _check_services(processes: Mapping[str, Mapping[str, Any]], app: str, services: Iterable[str] | None) -> None:
    """Every name in `after:` is a service with a health check: one that the caller lists, or a process of the app."""
    if services is None:
        return
    known = {str(name) for name in services}
    known |= {f"{app}-{name}" for name, process in processes.items() if process["kind"] not in OCCASIONAL}
    for name, process in processes.items():
        for service in process["after"]:
            if service == f"{app}-{name}":
                raise ContractError(f"app.processes.{name}.after: the process would wait for itself")
            other = processes.get(service.removeprefix(f"{app}-"))
            if other and service not in known:
                raise ContractError(
                    f"app.processes.{name}.after: {service} is a {other['kind']}, which runs and ends; nobody can wait until it is healthy"
                )
            if service not in known:
                raise ContractError(
                    f'app.processes.{name}.after: no service "{service}" has a health check, {did_you_mean(service, known)}'
                )


def _bootstrap(app: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The steps of every process in the order of their names, each variable that they need being set somewhere."""
    for name in app["bootstrap"]:
        if name not in app["processes"]:
            raise ContractError(f"app.bootstrap.{name}: no such process, {did_you_mean(name, app['processes'])}")
    result: dict[str, list[dict[str, Any]]] = {}
    unset: list[str] = []
    for process, described in app["processes"].items():
        provided = {**app["environment"], **app["secrets"], **described["environment"]}
        steps = sorted(app["bootstrap"].get(process, []), key=lambda step: cast(str, step["name"]))
        for before, after in itertools.pairwise(steps):
            if before["name"] == after["name"]:
                raise ContractError(f"app.bootstrap.{process}.{after['name']}: two steps have this name")
        for step in steps:
            for variable, purpose in step["environment"].items():
                if variable not in provided:
                    unset.append(f"app.bootstrap.{process}.{step['name']}: {variable} is not set: {purpose}")
            if not described["credentials"] and any(CREDENTIALS in word for word in step.get("command", [])):
                raise ContractError(
                    f"app.bootstrap.{process}.{step['name']}.command: {CREDENTIALS} is the directory of the process's "
                    f"credentials, but app.processes.{process}.credentials is empty"
                )
        result[process] = steps
    if unset:
        raise ContractError("; ".join(unset))  # all at once: whoever sets one variable sets the others, too
    _check_starts(result, app["processes"])
    return result


def _prune(app: Mapping[str, Any], groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The commands that remove what the application does not need any more, each with the hosts where it runs."""
    names = [entry["name"] for entry in app["prune"]]
    for name in names:
        if names.count(name) > 1:
            raise ContractError(f"app.prune.{name}: two entries have this name")
    found = []
    for entry in app["prune"]:
        members = _members(entry["hosts"], groups, f"app.prune.{entry['name']}.hosts")
        found.append({**entry, "members": members[:1] if entry["once"] else members})
    return found


def _check_starts(bootstrap: Mapping[str, Sequence[Mapping[str, Any]]], processes: Mapping[str, Mapping[str, Any]]) -> None:
    """Every name in `start:` is a task on the same hosts, and no task starts itself, not even by way of others."""
    starts: dict[str, list[str]] = {}
    for process, steps in bootstrap.items():
        for step in steps:
            path = f"app.bootstrap.{process}.{step['name']}.start"
            for task in step["start"]:
                if task not in processes:
                    raise ContractError(f'{path}: no process "{task}", {did_you_mean(task, processes)}')
                if processes[task]["kind"] != "task":
                    raise ContractError(f"{path}: {task} is a {processes[task]['kind']}; only a process of kind task is started by a step")
                if processes[task]["hosts"] != processes[process]["hosts"]:
                    raise ContractError(
                        f"{path}: {task} runs on {processes[task]['hosts']}, but {process} on {processes[process]['hosts']}; "
                        "a step starts a task on its own host, so give both the same hosts"
                    )
                starts.setdefault(process, []).append(task)
    for first in starts:
        circle = _circle(first, starts)
        if circle:
            raise ContractError(f"app.bootstrap.{first}: {' starts '.join(circle)}, without end; take one start out")


def _circle(first: str, starts: Mapping[str, Sequence[str]]) -> list[str]:
    """The way from a process back to itself; empty when there is none."""
    ways = [[first]]
    seen: set[str] = set()
    while ways:
        way = ways.pop()
        for task in starts.get(way[-1], ()):
            if task == first:
                return [*way, task]
            if task not in seen:
                seen.add(task)
                ways.append([*way, task])
    return []


def install_contract(install: Any) -> dict[str, Any]:
    """Check `app.install`: one way to install, and that one complete."""
    given = _record(install, INSTALL, "app.install")
    ways = [way for way in WAYS_TO_INSTALL if any(name in given for name in way)]
    if len(ways) > 1:
        first, second = (next(name for name in way if name in given) for way in ways)
        raise ContractError(
            f"app.install.{second}: {first} is there, too; give project and lock (a git repository), "
            "or requirement and locks (a package of an index), not both"
        )
    if not ways:
        raise ContractError("app.install: give project and lock (a git repository), or requirement and locks (a package of an index)")
    for name in ways[0]:
        if name not in given:
            raise ContractError(f"app.install.{name}: is missing")
    return given


def _check_migrations(migrations: Mapping[str, Any]) -> None:
    """One way to migrate: Django's, or commands of the application's own; who reverses can show what it would do."""
    path, commands = "app.migrations", migrations.get("commands")
    if commands and migrations["django"]:
        raise ContractError(f"{path}.commands: django is there, too; Django's databases need no commands, so keep one of them")
    if "settings" in migrations and not migrations["django"]:
        raise ContractError(f"{path}.settings: only Django has settings; name its databases in {path}.django")
    for one, other in (("reversal", "reverse"), ("reverse", "reversal")):
        if commands and one in commands and other not in commands:
            raise ContractError(f"{path}.commands.{other}: is missing; reversal shows what reverse would do, so one needs the other")
    for alias in migrations["django"]:
        if migrations["django"].count(alias) > 1:
            raise ContractError(f"{path}.django: {alias} stands there twice")


def app_contract(app: Any, groups: Mapping[str, Sequence[str]], services: Iterable[str] | None = None) -> dict[str, Any]:
    """Check the contract against itself and the inventory's groups, and return it complete.

    `services`: names of the services outside the app that have a health check; with them, `after:` is checked too.
    """
    contract = _record(app, APP, "app")
    contract["install"] = install_contract(contract["install"])
    _check_migrations(contract["migrations"])
    name = contract["name"]
    if name in {"evenkeel", "root", "postgres", "redis", "etcd", "nginx", "www-data"}:
        raise ContractError(f'app.name: "{name}" belongs to the system; choose another name')
    for variable in contract["environment"]:
        if variable in contract["secrets"]:
            raise ContractError(f"app.secrets.{variable}: is in app.environment too; keep it in one of them")
    processes = {key: _process(key, process, contract, groups) for key, process in sorted(contract["processes"].items())}
    _check_ports(processes)
    _check_paths(processes)
    _check_services(processes, name, services)
    _check_remote(processes, name)
    for check in contract["checks"]:
        _known_secret(check.get("bearer"), contract["secrets"], f"app.checks.{check['name']}.bearer")
    return {
        **contract,
        "user": name,
        "group": name,
        "paths": {
            "root": f"/opt/{name}",
            "releases": f"/opt/{name}/releases",
            "current": f"/opt/{name}/current",
            "configuration": f"/etc/{name}",
            "environment": f"/etc/{name}/environment",
            "secrets": f"/etc/{name}/secrets.env",
            "bootstrap": f"/etc/{name}/bootstrap",
            "state": f"/var/lib/{name}",
            "log": f"/var/log/{name}",
            "run": f"/run/{name}",
            "command": f"/usr/local/sbin/{name}-run",
        },
        "databases": {cluster: {"name": database["name"], "owner": name} for cluster, database in contract["databases"].items()},
        "processes": processes,
        "prune": _prune(contract, groups),
        "bootstrap": _bootstrap(contract),
    }


def _filter(app: Any, groups: Mapping[str, Sequence[str]], services: Iterable[str] | None = None) -> dict[str, Any]:
    from ansible.errors import AnsibleFilterError

    try:
        return app_contract(app, groups, services)
    except ContractError as error:
        raise AnsibleFilterError(str(error)) from None


def _install_filter(install: Any) -> dict[str, Any]:
    from ansible.errors import AnsibleFilterError

    try:
        return install_contract(install)
    except ContractError as error:
        raise AnsibleFilterError(str(error)) from None


def contract_problem(app: Any, groups: Mapping[str, Sequence[str]], services: Iterable[str] | None = None) -> str:
    """What is wrong with the contract, in one sentence; empty when nothing is."""
    try:
        app_contract(app, groups, services)
    except ContractError as error:
        return str(error)
    return ""


class FilterModule:
    """Gives the filters to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"app_contract": _filter, "install_contract": _install_filter, "contract_problem": contract_problem}

"""Pure functions over the normalised app contract (see ``app_contract``): what a host runs, reads and answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

CREDENTIALS = "{credentials}"  # as in the filter app_contract: the directory that holds the process's credentials
OCCASIONAL = ("timer", "task")  # as there: they run and end
DRY_RUN = "-bootstrap-check"  # as there: the end of the name of a dry run's unit


def systemd_argv(argv: Sequence[str]) -> str:
    """A command line for ``ExecStart=`` that systemd splits into exactly these arguments."""
    return " ".join(_systemd_word(str(word).replace("$", "$$")) for word in argv)


def systemd_environment(values: Mapping[str, Any]) -> list[str]:
    """Assignments for ``Environment=`` lines that give exactly these values, sorted by name."""
    return [_systemd_word(f"{name}={values[name]}") for name in sorted(values)]


def _systemd_word(word: str) -> str:
    escaped = word.replace("%", "%%").replace(CREDENTIALS, "%d")
    if escaped and re.fullmatch(r"[A-Za-z0-9_@%$+=:,./-]+", escaped):
        return escaped
    escaped = escaped.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def environment_file(values: Mapping[str, Any]) -> str:
    """The lines of an ``EnvironmentFile=`` that give exactly these values, sorted by name."""
    return "".join(f"{name}={_environment_value(str(values[name]))}\n" for name in sorted(values))


def _environment_value(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", value):
        return value
    return '"' + re.sub(r'(["\\`$])', r"\\\1", value) + '"'


def release_command(command: Sequence[str], release: str) -> list[str]:
    """The command with its program looked up in the release's virtual environment, unless it is an absolute path."""
    program = command[0]
    return [program if program.startswith("/") else f"{release}/venv/bin/{program}", *command[1:]]


def host_processes(contract: Mapping[str, Any], group_names: Sequence[str]) -> list[dict[str, Any]]:
    """The processes whose group contains this host, in the order of their names."""
    return [dict(process) for process in contract["processes"].values() if process["hosts"] in group_names]


def host_packages(contract: Mapping[str, Any], group_names: Sequence[str]) -> list[str]:
    """The Debian packages that the processes of this host need."""
    processes = host_processes(contract, group_names)
    names = set(contract["packages"]) if processes else set()
    for process in processes:
        names |= set(process["packages"])
    return sorted(names)


def process_environment(contract: Mapping[str, Any], process: str) -> dict[str, dict[str, str]]:
    """What a process has in its environment, parted into what a file can say and what only its unit can.

    systemd fills in the directory of the credentials in units alone, and a file wins over the unit. So a process that
    has variables of its own reads a file of its own, in which those of the unit are left out.
    """
    own = contract["processes"][process]["environment"]
    unit = {name: value for name, value in own.items() if CREDENTIALS in value}
    merged = {**contract["environment"], **own}
    return {"file": {name: value for name, value in merged.items() if name not in unit}, "unit": unit}


def _environment_path(contract: Mapping[str, Any], process: Mapping[str, Any]) -> str:
    """The file of variables that a process reads: the app's, unless it has some of its own."""
    path: str = contract["paths"]["environment"]
    return f"{path}-{process['name']}" if process["environment"] else path


def process_files(contract: Mapping[str, Any], group_names: Sequence[str]) -> list[dict[str, Any]]:
    """The entries of a `files` task for the environments of this host's processes that have their own."""
    return [
        {
            "dest": _environment_path(contract, process),
            "content": environment_file(process_environment(contract, process["name"])["file"]),
            "group": contract["group"],
            "mode": "0640",
        }
        for process in host_processes(contract, group_names)
        if process["environment"]
    ]


def _own_directories(contract: Mapping[str, Any]) -> list[dict[str, str]]:
    """The app's three directories, with the mode that a step of any process declares: whichever starts first makes them."""
    declared = {entry["path"]: entry["mode"] for steps in contract["bootstrap"].values() for step in steps for entry in step["directories"]}
    paths = [contract["paths"][name] for name in ("state", "log", "run")]
    return [{"path": path, "mode": declared.get(path, "0750")} for path in paths]


def bootstrap_steps(contract: Mapping[str, Any], process: str) -> list[dict[str, Any]]:
    """The steps of a process, complete and in order; ``00-directories`` makes what every process of the app needs."""
    steps = [{"name": "00-directories", "directories": _own_directories(contract)}, *contract["bootstrap"][process]]
    return [
        {
            "name": step["name"],
            "environment": step.get("environment", {}),
            "directories": step.get("directories", []),
            "writable": step.get("writable", []),
            "command": step.get("command", []),
            "start": [contract["processes"][task]["unit"] for task in step.get("start", [])],
        }
        for step in steps
    ]


def bootstrap_table(contract: Mapping[str, Any], process: str) -> dict[str, Any]:
    """What ``/etc/<app>/bootstrap/<process>.json`` holds."""
    return {
        "app": contract["name"],
        "process": process,
        "user": contract["user"],
        "group": contract["group"],
        "credentials": contract["processes"][process]["credentials"],
        "program": release_command(contract["processes"][process]["command"], contract["paths"]["current"])[0],
        "steps": bootstrap_steps(contract, process),
    }


def bootstrap_tables(contract: Mapping[str, Any], group_names: Sequence[str]) -> list[dict[str, Any]]:
    """The bootstrap tables of this host's processes."""
    return [bootstrap_table(contract, process["name"]) for process in host_processes(contract, group_names)]


def bootstrap_files(contract: Mapping[str, Any], group_names: Sequence[str]) -> list[dict[str, Any]]:
    """The entries of a `files` task for the bootstrap tables of this host's processes."""
    return [
        {
            "dest": f"{contract['paths']['bootstrap']}/{table['process']}.json",
            "content": json.dumps(table, indent=2, ensure_ascii=False) + "\n",
        }
        for table in bootstrap_tables(contract, group_names)
    ]


def logs_table(contract: Mapping[str, Any], group_names: Sequence[str], max_mb: int, backups: int) -> dict[str, Any]:
    """What ``/etc/<app>/logs.json`` holds: which unit's lines go to which file. `max_mb` and `backups` as in role process."""
    if int(max_mb) < 1 or int(backups) < 1:
        raise ValueError("process_log_max_mb and process_log_backups must be at least 1: a file that is full becomes the first backup")
    return {
        "directory": contract["paths"]["log"],
        "max_bytes": int(max_mb) * 1_000_000,
        "backups": int(backups),
        "units": {process["unit"]: process["name"] for process in host_processes(contract, group_names)},
    }


def log_directory_mode(contract: Mapping[str, Any]) -> str:
    """The mode of the directory of log files, as the start-up steps make it."""
    return next(entry["mode"] for entry in _own_directories(contract) if entry["path"] == contract["paths"]["log"])


def state_directory(contract: Mapping[str, Any]) -> dict[str, str]:
    """The entry of a `files` task for the app's data, as the start-up steps make it: a staged release may need it before any start."""
    own = next(entry for entry in _own_directories(contract) if entry["path"] == contract["paths"]["state"])
    return {"dest": own["path"], "state": "directory", "owner": contract["user"], "group": contract["group"], "mode": own["mode"]}


def _writable_paths(contract: Mapping[str, Any], process: str) -> list[str]:
    """What the process may write to; everything else is read-only for it."""
    paths = [contract["paths"][name] for name in ("state", "log", "run")]
    for step in contract["bootstrap"][process]:
        paths += [directory["path"] for directory in step["directories"]] + step["writable"]
    return list(dict.fromkeys(paths))


def process_units(contract: Mapping[str, Any], group_names: Sequence[str]) -> list[dict[str, Any]]:
    """The entries of a `units` task for this host: services before timers.

    Each process also has a unit that nothing starts but a person: the dry run of its start.
    A process is restarted when it has not seen the present release, variables, steps or credentials.

    Nothing runs before the first deploy (`requires_path`), but all of it is enabled, so that a host that was deployed
    to while it was off starts everything at its next boot.
    """
    paths = contract["paths"]
    units: list[dict[str, Any]] = []
    for process in host_processes(contract, group_names):
        name = process["name"]
        item = {
            **process,
            "argv": release_command(process["command"], paths["current"]),
            "steps": bootstrap_steps(contract, name),
            "writable": _writable_paths(contract, name),
            "environment": process_environment(contract, name)["unit"],
            "environment_file": _environment_path(contract, process),
        }
        template_vars = {"__process_item": {**item, "dry_run": False}}
        service: dict[str, Any] = {"name": process["unit"], "template": "process.service.j2", "vars": template_vars}
        dry_run = {"name": f"{contract['name']}-{name}{DRY_RUN}.service", "template": "bootstrap-check.service.j2"}
        units.append({**dry_run, "vars": {"__process_item": {**item, "dry_run": True}}})
        running = {"enabled": True, "state": "started", "requires_path": paths["current"]}
        triggers = [paths["current"], _environment_path(contract, process), paths["secrets"], f"{paths['bootstrap']}/{name}.json"]
        triggers += sorted(set(process["credentials"].values()))
        if process["kind"] == "task":  # a bootstrap step or a person starts it, so it runs neither at boot nor now
            units.append(service)
            continue
        if process["kind"] == "timer":
            timer = {"name": process["timer"], "template": "process.timer.j2", "vars": template_vars}
            units += [service, {**timer, **running}]
            continue
        if process["kind"] == "web":  # earlier versions had its socket in a unit
            units.append({"name": process["socket"], "state": "absent"})
        units.append({**service, **running, "restart_on": triggers})
    return units


def contract_health_services(contract: Mapping[str, Any], host: str, addresses: Mapping[str, str]) -> list[dict[str, Any]]:
    """Entries of `healthcheck_services` for this host: its own processes and timers, and those elsewhere that they wait for.

    An unhealthy process may be restarted, unless it says otherwise; not while a service that it needs is not healthy, or the process
    of the application that answers for it. Timers are watched by their last run.
    `addresses`: host -> address. A process on several hosts is one service to those who wait for it elsewhere, and any of
    them may answer for it.
    """
    own: dict[str, dict[str, Any]] = {}
    wanted: list[str] = []
    for process in contract["processes"].values():
        if host in process["members"]:
            wanted += process["after"]
            if process["kind"] not in OCCASIONAL:
                entry = _health_entry(contract, process, addresses[host])
                needed = [*process["after"], *_answers_for(contract, process, host)]
                own[entry["name"]] = entry | {"restart": process["health"]["restart"], "after": needed}
            if process["kind"] == "timer":
                name = f"{contract['name']}-{process['name']}"
                own[name] = {"name": name, "owner": contract["name"], "kind": "timer", "timers": [process["timer"]]}
    remote = [
        _remote_entry(contract, process, [addresses[member] for member in process["members"]])
        for process in contract["processes"].values()
        if process["kind"] not in OCCASIONAL and f"{contract['name']}-{process['name']}" in wanted and host not in process["members"]
    ]
    logs = f"{contract['name']}-logs"
    if any(host in process["members"] for process in contract["processes"].values()):
        own[logs] = {"name": logs, "owner": contract["name"], "unit": f"{logs}.service", "kind": "unit", "start_period_seconds": 10}
    return [*own.values(), *remote]


def _remote_entry(contract: Mapping[str, Any], process: Mapping[str, Any], addresses: Sequence[str]) -> dict[str, Any]:
    """The row of a process on other hosts. A command asks whom it asks from any host; a URL is asked at each of them."""
    entries = [_health_entry(contract, process, address) for address in addresses]
    others = [{"url": entry["url"]} for entry in entries[1:] if entry["kind"] == "http"]
    return {**entries[0], "remote": True} | ({"alternatives": others} if others else {})


def _answers_for(contract: Mapping[str, Any], process: Mapping[str, Any], host: str) -> list[str]:
    """The processes of this host at whose port the health of another one is asked: its failures may be theirs."""
    port = process["health"].get("port")
    return [
        f"{contract['name']}-{other['name']}"
        for other in contract["processes"].values()
        if port and other["port"] == port and other["name"] != process["name"] and host in other["members"]
    ]


def _health_entry(contract: Mapping[str, Any], process: Mapping[str, Any], address: str) -> dict[str, Any]:
    health, paths = process["health"], contract["paths"]
    entry: dict[str, Any] = {
        "name": f"{contract['name']}-{process['name']}",
        "owner": contract["name"],
        "unit": process["unit"],
        "kind": health["kind"],
        "start_period_seconds": process["start_period_seconds"],
    }
    if process["port"] is not None:
        own_port = health.get("port") == process["port"]
        entry |= {"endpoint": f"{address}:{process['port']}", "protocol": ("https" if "ca" in health else "http") if own_port else "tcp"}
    if health["kind"] == "http":
        # As the proxy would ask, so that an application that insists on TLS answers instead of redirecting.
        headers = {"X-Forwarded-Proto": "https"} | ({"Host": health["host"]} if "host" in health else {})
        scheme = "https" if "ca" in health else "http"
        entry |= {"url": f"{scheme}://{address}:{health['port']}{health['path']}", "status": health["status"]}
        entry |= {"headers": headers}
        entry |= {key: health[key] for key in ("contains", "bearer", "ca") if key in health}
    if health["kind"] == "command":
        entry |= {
            "command": release_command(health["command"], paths["current"]),
            "user": contract["user"],
            "environment_files": [paths["environment"], paths["secrets"]],
            "directory": paths["current"],
        }
        own = {name: value for name, value in process["environment"].items() if CREDENTIALS not in value}
        entry |= {"environment": own} if own else {}
    return entry


def contract_credentials(contract: Mapping[str, Any]) -> dict[str, str]:
    """The secrets that the health checks of the app's processes send: name -> value, for `healthcheck_credentials`."""
    names = {process["health"].get("bearer") for process in contract["processes"].values()} - {None}
    return {name: contract["secrets"][name] for name in sorted(names)}


def contract_prune(contract: Mapping[str, Any], host: str) -> list[dict[str, Any]]:
    """What the module `prune` runs on this host as the application: [{name, command, dry_run}]."""
    return [
        {
            "name": entry["name"],
            "command": [contract["paths"]["command"], *entry["command"]],
            "dry_run": [contract["paths"]["command"], *entry["command"], *entry["dry_run"]],
        }
        for entry in contract["prune"]
        if host in entry["members"]
    ]


def contract_routes(contract: Mapping[str, Any], addresses: Mapping[str, str]) -> list[dict[str, Any]]:
    """Entries of `proxy_routes`: each web process with its path and the servers that answer."""
    return [
        {
            "name": process["unit"].removesuffix(".service"),
            "path": process["path"],
            "servers": [{"name": host, "address": addresses[host], "port": process["port"]} for host in process["members"]],
        }
        for process in contract["processes"].values()
        if process["kind"] == "web"
    ]


def has_understudy(routes: Sequence[Mapping[str, Any]], host: str) -> bool:
    """Whether a host serves a route, and each route that it serves has another server, so that it may be drained."""
    own = [[server["name"] for server in route["servers"]] for route in routes]
    own = [names for names in own if host in names]
    return bool(own) and all(set(names) != {host} for names in own)


def drain_result(results: Sequence[Mapping[str, Any]], accepted: Sequence[int] = (0,)) -> dict[str, list[str]]:
    """What `evenkeel-drain` said on each proxy (a registered loop over them): {problems, notes}, a line each.

    accepted: exit codes that are no problem. A proxy that is down is a note: it passes nothing on. Drained hosts outlast it, so
    that it may come back with an old view.
    """
    said: dict[str, list[str]] = {"problems": [], "notes": []}
    for result in results:
        proxy = result["item"]
        if result.get("unreachable"):
            said["notes"].append(f"{proxy} does not answer and was left out. When it is back, type there: evenkeel-drain list")
        elif result.get("skipped"):
            said["notes"].append(f"{proxy}: not asked in check mode")
        elif result.get("rc") in accepted:
            said["notes"].append(f"{proxy}: {json.loads(result['stdout'])['message']}")
        else:
            answer = str(result.get("stdout") or "")
            message = json.loads(answer)["message"] if answer.startswith("{") else result.get("stderr") or result.get("msg") or "no answer"
            said["problems"].append(f"{proxy}: {message}")
    return said


class FilterModule:
    """Gives the filters to Ansible."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        functions: tuple[Callable[..., Any], ...] = (
            systemd_argv,
            systemd_environment,
            environment_file,
            process_files,
            host_processes,
            host_packages,
            bootstrap_steps,
            bootstrap_tables,
            bootstrap_files,
            logs_table,
            log_directory_mode,
            state_directory,
            process_units,
            contract_health_services,
            contract_credentials,
            contract_prune,
            contract_routes,
            has_understudy,
            drain_result,
        )
        return {function.__name__: function for function in functions}

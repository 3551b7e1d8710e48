"""The app contract: what is wrong is said in one sentence that names the place; what is right comes back complete."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from programs import ROOT, load

contract_filter = load(ROOT / "filter_plugins/app_contract.py", "evk_app_contract")
app_contract, ContractError = contract_filter.app_contract, contract_filter.ContractError

GROUPS = {"all": ["a", "b"], "web": ["a", "b"], "worker": ["b"], "empty": []}

APP: dict[str, Any] = {
    "name": "pier",
    "install": {"project": "pier", "lock": "pier/requirements.lock"},
    "environment": {"PIER_PORT": 8000},
    "secrets": {"PIER_KEY": "k", "PIER_TOKEN": "t"},
    "databases": {"core": {"name": "pier"}},
    "processes": {
        "web": {
            "kind": "web",
            "hosts": "web",
            "command": ["gunicorn", "--threads", 4],
            "port": "8000",
            "health": {"http": {"path": "/health", "bearer": "PIER_TOKEN"}},
            "after": ["redis"],
        },
        "slow": {"kind": "worker", "hosts": "worker", "command": ["work"], "task_time_limit_seconds": 150},
        "sweep": {"kind": "timer", "hosts": "worker", "command": ["sweep"], "on_calendar": "hourly"},
        "register": {"kind": "task", "hosts": "worker", "command": ["register"], "after": ["redis"]},
        "script": {
            "kind": "service",
            "hosts": "worker",
            "command": ["serve", "--key", "{credentials}/tls.key"],
            "port": 4064,
            "environment": {"SCRIPT_CERT": "{credentials}/tls.crt", "PIER_PORT": "9"},
            "credentials": {"tls.key": "/etc/k.key", "tls.crt": "/etc/k.crt"},
            "health": {"http": {"path": "/", "tls": True}},
        },
    },
    "bootstrap": {
        "script": [{"name": "10-server", "environment": {"SCRIPT_CERT": "its certificate"}, "command": ["setup"], "start": ["register"]}],
        "web": [
            {"name": "20-later", "writable": ["/var/log/pier"]},
            {"name": "10-web", "environment": {"PIER_KEY": "signs; set app.secrets.PIER_KEY"}},
        ],
    },
    "checks": [{"name": "ping", "path": "/ping", "bearer": "PIER_TOKEN", "contains": "pong"}],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The contract with one value set; `...` removes it."""
    app = copy.deepcopy(APP)
    node: Any = app
    *way, last = path.split("/")
    for key in way:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return app


def test_a_good_contract_comes_back_complete() -> None:
    contract = app_contract(APP, GROUPS, ["redis"])
    web, slow, sweep = (contract["processes"][name] for name in ("web", "slow", "sweep"))
    assert (web["unit"], web["socket"], web["port"]) == ("pier-web.service", "pier-web.socket", 8000)
    assert web["health"] == {
        "kind": "http",
        "path": "/health",
        "port": 8000,
        "status": 200,
        "bearer": "PIER_TOKEN",
        "restart": True,
    }
    assert (web["path"], web["start_period_seconds"], web["members"]) == ("/", 30, ["a", "b"])
    assert web["command"] == ["gunicorn", "--threads", "4"]
    assert (slow["stop_seconds"], slow["health"], slow["start_period_seconds"]) == (180, {"kind": "unit", "restart": False}, 10)
    assert (sweep["timer"], sweep["socket"]) == ("pier-sweep.timer", None)
    assert [step["name"] for step in contract["bootstrap"]["web"]] == ["10-web", "20-later"]
    assert contract["databases"] == {"core": {"name": "pier", "owner": "pier"}}
    assert contract["environment"] == {"PIER_PORT": "8000"}
    assert contract["checks"][0]["contains"] == ["pong"]
    assert contract["checks"][0]["method"] == "GET"
    assert contract["paths"]["secrets"] == "/etc/pier/secrets.env"


WRONG: list[tuple[str, Any, str]] = [
    ("processes/web/comand", ["x"], "app.processes.web.comand: unknown name, did you mean command?"),
    ("proceses", {}, "app.proceses: unknown name, did you mean processes?"),
    ("install/lock", ..., "app.install.lock: is missing"),
    ("name", "Pier!", "app.name: must be small letters"),
    ("name", "postgres", 'app.name: "postgres" belongs to the system'),
    ("processes", {}, "app.processes: is empty"),
    ("processes/web/kind", "wep", 'app.processes.web.kind: "wep" is not one of web, worker, service, timer, task'),
    ("processes/web/command", "gunicorn x", "app.processes.web.command: must be a list, but is a text; write [gunicorn, x]"),
    ("processes/web/command", [], "app.processes.web.command: is empty"),
    ("processes/web/port", "eight", "app.processes.web.port: must be a whole number, but is a text"),
    ("processes/web/port", 70000, "app.processes.web.port: must be between 1 and 65535, but is 70000"),
    ("processes/web/port", ..., "app.processes.web.port: is missing; a process of kind web needs it"),
    ("processes/web/queue", "q", "app.processes.web.queue: only a process of kind worker has it, not a web"),
    ("processes/web/notify", "yes", "app.processes.web.notify: must be true or false, but is a text"),
    ("processes/web/hosts", "wbe", 'app.processes.web.hosts: the inventory has no group "wbe", did you mean web?'),
    ("processes/web/hosts", "empty", 'app.processes.web.hosts: the group "empty" has no host'),
    ("processes/web/after", ["rediss"], 'app.processes.web.after: no service "rediss" has a health check, did you mean redis?'),
    ("processes/web/after", ["pier-web"], "app.processes.web.after: the process would wait for itself"),
    ("processes/web/after", ["pier-slow"], "app.processes.slow.health: is missing; web on a waits"),
    ("processes/web/health", {}, "app.processes.web.health: must have exactly one of http and command"),
    ("processes/web/health/http/bearer", "PIER_TOKN", 'app.processes.web.health.http.bearer: app.secrets has no "PIER_TOKN"'),
    ("processes/web/health", {"restart": False}, "app.processes.web.health: must have exactly one of http and command"),
    ("processes/web/health/restart", "no", "app.processes.web.health.restart: must be true or false, but is a text"),
    ("processes/slow/health", {"http": {"path": "/"}}, "app.processes.slow.health.http.port: is missing"),
    ("processes/slow/task_time_limit_seconds", ..., "app.processes.slow.task_time_limit_seconds: is missing"),
    ("processes/sweep/on_calendar", ..., "app.processes.sweep.on_calendar: is missing"),
    ("processes/sweep/once", "cor", 'app.processes.sweep.once: app.databases has no "cor", did you mean core?'),
    ("processes/register/once", "core", "app.processes.register.once: only a process of kind timer has it, not a task"),
    ("processes/Web", {}, 'app.processes: the name "Web" is not possible'),
    ("secrets/PIER_KEY", "", "app.secrets.PIER_KEY: is empty"),
    ("secrets/PIER_KEY", None, "app.secrets.PIER_KEY: is empty"),
    ("secrets/PIER_KEY", ..., "app.bootstrap.web.10-web: PIER_KEY is not set: signs; set app.secrets.PIER_KEY"),
    ("secrets/PIER_PORT", "1", "app.secrets.PIER_PORT: is in app.environment too"),
    ("environment/DEBUG", True, 'app.environment.DEBUG: must be a text; write "true" or "false" in quotes'),
    ("environment/LIST", [1], "app.environment.LIST: must be a text, but is a list"),
    ("environment/A-B", "x", 'app.environment: the name "A-B" is not possible'),
    ("bootstrap/sloow", [], "app.bootstrap.sloow: no such process, did you mean slow?"),
    ("bootstrap/web/0/name", "10-web", "app.bootstrap.web.10-web: two steps have this name"),
    ("bootstrap/web/0/writable", ["var"], "app.bootstrap.web.20-later.writable[0]: must be an absolute path"),
    ("bootstrap/web/0/writable", ["/var/../etc"], "app.bootstrap.web.20-later.writable[0]: must be an absolute path"),
    ("bootstrap/web/0/directories", [{"path": "/x", "mode": 750}], "directories[0].mode: must be four octal digits"),
    ("checks/0/bearer", "NO", 'app.checks.ping.bearer: app.secrets has no "NO"'),
    ("processes/web/health/http/tls", "yes", "app.processes.web.health.http.tls: must be true or false, but is a text"),
    ("processes/web/health/http/ca", "/ca.crt", "app.processes.web.health.http.ca: says whom to trust over TLS, but tls is not true"),
    ("processes/register/health", {"command": ["x"]}, "app.processes.register: a task has neither health nor notify"),
    ("processes/register/on_calendar", "daily", "app.processes.register.on_calendar: only a process of kind timer has it, not a task"),
    ("processes/web/after", ["pier-register"], "app.processes.web.after: pier-register is a task, which runs and ends"),
    ("bootstrap/script/0/start", ["registre"], 'app.bootstrap.script.10-server.start: no process "registre", did you mean register?'),
    ("bootstrap/script/0/start", "register", "app.bootstrap.script.10-server.start: must be a list, but is a text; write [register]"),
    ("bootstrap/script/0/start", ["slow"], "app.bootstrap.script.10-server.start: slow is a worker; only a process of kind task"),
    ("bootstrap/web/0/start", ["register"], "app.bootstrap.web.20-later.start: register runs on worker, but web on web"),
    ("bootstrap/register", [{"name": "10-again", "start": ["register"]}], "app.bootstrap.register: register starts register, without end"),
    ("processes/script/credentials", {"a:b": "/k"}, 'app.processes.script.credentials: the name "a:b" is not possible'),
    ("processes/script/credentials/tls.key", "k.key", "app.processes.script.credentials.tls.key: must be an absolute path"),
    ("processes/script/credentials", {}, "app.processes.script.command: {credentials} is the directory of its credentials, but app.proc"),
    ("processes/web/environment", {"A": "{credentials}/a"}, "app.processes.web.environment.A: {credentials} is the directory of its"),
    ("processes/script/health", {"command": ["ping", "{credentials}/k"]}, "app.processes.script.health.command: {credentials} is for"),
    ("bootstrap/web/0/command", ["x", "{credentials}/k"], "app.bootstrap.web.20-later.command: {credentials} is the directory"),
    ("processes/web/environment", {"PIER_KEY": "x"}, "app.processes.web.environment.PIER_KEY: is in app.secrets too"),
    ("processes/script/environment", ..., "app.bootstrap.script.10-server: SCRIPT_CERT is not set: its certificate"),
    ("migrations", ["core"], "app.migrations: must be a dictionary, but is a list"),
    ("migrations", {"django": ["core", "core"]}, "app.migrations.django: core stands there twice"),
    ("migrations", {"settings": "x"}, "app.migrations.settings: only Django has settings"),
    ("migrations", {"commands": {"plan": ["p"]}}, "app.migrations.commands.apply: is missing"),
    ("migrations", {"django": ["core"], "commands": {"plan": ["p"], "apply": ["a"]}}, "app.migrations.commands: django is there, too"),
    ("migrations", {"commands": {"plan": ["p"], "apply": ["a"], "reverse": ["r"]}}, "app.migrations.commands.reversal: is missing"),
    ("processes/web/resources", {"memory": 1}, "app.processes.web.resources.memory: unknown name, did you mean memory_mb?"),
    ("processes/web/resources", {"memory_mb": 1}, "app.processes.web.resources.memory_mb: must be between 64 and 1048576, but is 1"),
    ("processes/logs", {"kind": "task", "hosts": "web", "command": ["x"]}, "app.processes.logs: the suite has a unit pier-logs of its own"),
    ("processes/a-bootstrap-check", {"kind": "task", "hosts": "web", "command": ["x"]}, "app.processes.a-bootstrap-check: the suite has"),
]


@pytest.mark.parametrize(("path", "value", "sentence"), WRONG, ids=[f"{path}={value!r}" for path, value, _ in WRONG])
def test_what_is_wrong_is_named(path: str, value: Any, sentence: str) -> None:
    with pytest.raises(ContractError) as error:
        app_contract(changed(path, value), GROUPS, ["redis", "postgresql-core"])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_s2_all_variables_that_are_missing_are_named_at_once() -> None:
    contract = copy.deepcopy(APP)
    contract["bootstrap"]["web"].append({"name": "30-last", "environment": {"PIER_B": "for b", "PIER_A": "for a"}})
    problem = contract_filter.contract_problem(contract, GROUPS)
    assert problem == "app.bootstrap.web.30-last: PIER_B is not set: for b; app.bootstrap.web.30-last: PIER_A is not set: for a"


def test_resources_have_bounds_that_fit_the_kind() -> None:
    contract = copy.deepcopy(APP)
    contract["processes"]["web"]["resources"] = {"memory_mb": 8192}
    resources = {name: process["resources"] for name, process in app_contract(contract, GROUPS)["processes"].items()}
    assert resources["web"] == {"memory_mb": 8192, "tasks": 512}
    assert resources["slow"] == {"memory_mb": 4096, "tasks": 512}
    assert resources["sweep"] == {"memory_mb": 1024, "tasks": 256}


def test_two_processes_on_one_port_of_a_host() -> None:
    app = changed("processes/web2", {**APP["processes"]["web"], "path": "/two", "hosts": "web"})
    with pytest.raises(ContractError, match=r"app.processes.web2.port: 8000 on host a is already taken by app.processes.web"):
        app_contract(app, GROUPS)


def test_one_port_on_two_hosts_is_no_conflict() -> None:
    groups = {**GROUPS, "web": ["a"], "other": ["b"]}
    app = changed("processes/web2", {**APP["processes"]["web"], "path": "/two", "hosts": "other"})
    assert app_contract(app, groups)["processes"]["web2"]["port"] == 8000


def test_two_processes_for_one_path() -> None:
    app = changed("processes/web2", {**APP["processes"]["web"], "port": 8001})
    with pytest.raises(ContractError, match=r"app.processes.web2.path: / is already served by app.processes.web"):
        app_contract(app, GROUPS)


def test_s3_a_circle_of_tasks_that_start_each_other_is_named() -> None:
    app = changed("processes/other", {"kind": "task", "hosts": "worker", "command": ["x"]})
    app["bootstrap"]["register"] = [{"name": "10-next", "start": ["other"]}]
    app["bootstrap"]["other"] = [{"name": "10-back", "start": ["register"]}]
    with pytest.raises(ContractError, match=r"app.bootstrap.register: register starts other starts register, without end"):
        app_contract(app, GROUPS)
    app["bootstrap"]["other"] = []
    assert app_contract(app, GROUPS)["bootstrap"]["register"][0]["start"] == ["other"]


def test_s3_a_task_may_wait_for_the_process_that_starts_it() -> None:
    contract = app_contract(changed("processes/register/after", ["pier-script"]), GROUPS, ["redis"])
    assert contract["processes"]["register"]["after"] == ["pier-script"]
    assert contract["bootstrap"]["script"][0]["start"] == ["register"]
    assert contract["processes"]["register"]["health"] == {"kind": "task"}


def test_a_health_check_over_tls_trusts_the_platforms_ca_unless_told_otherwise() -> None:
    health = app_contract(APP, GROUPS)["processes"]["script"]["health"]
    assert health == {"kind": "http", "path": "/", "port": 4064, "status": 200, "ca": "/etc/evenkeel/pki/ca.crt", "restart": True}
    other = changed("processes/script/health/http/ca", "/etc/other.crt")
    assert app_contract(other, GROUPS)["processes"]["script"]["health"]["ca"] == "/etc/other.crt"

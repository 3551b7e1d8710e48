"""Render every template of every role with Ansible's own engine; prints {role: {template: text}} as JSON. Templates are
rendered for the demo's host, and those of roles that write more where there are several hosts also for hosts of the lab (`lab/TEMPLATE`).

python render_templates.py               all of them
python render_templates.py --text TEXT   one given text, with the same variables
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template
from ansible.vars.hostvars import HostVars
from ansible.vars.manager import VariableManager

ROOT = Path(__file__).resolve().parents[2]
# roles that write more where there are several hosts, and one of the lab's hosts that has them
LAB_HOSTS = {"pgbackrest": "ops-1", "proxy": "proxy-1", "redis": "ops-1"}
# what plays and earlier tasks would have set
GIVEN = {
    "postgresql_cluster": "core", "pg_maintenance_cluster": "core",
    "release_app": "app", "release_archive": "/r", "release_id": "1", "release_signature": "/r.sig", "release_signers": [],
    "ansible_managed": "Managed by Ansible",
    "ansible_check_mode": False,
    "ansible_facts": {"default_ipv4": {"interface": "eth0"}},
}  # fmt: skip


def flatten(tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        yield task
        for key in ("block", "rescue", "always"):
            yield from flatten(task.get(key) or [])


def entries(task: dict[str, Any], templar: Templar) -> Iterator[dict[str, Any]]:
    """The templated entries of a `files` or `units` task; a drop-in counts as an entry."""
    for module in ("files", "units"):
        if module in task:
            for entry in templar.template(task[module][module]):
                yield entry
                if entry.get("drop_in"):
                    yield {**entry["drop_in"], "vars": entry.get("vars", {})}


def variables_of(loader: DataLoader, inventory_name: str, host_name: str) -> dict[str, Any]:
    """What a host's tasks see."""
    inventory = InventoryManager(loader=loader, sources=[str(ROOT / "inventories" / inventory_name)])
    manager = VariableManager(loader=loader, inventory=inventory)
    host = inventory.get_host(host_name)
    hostvars = HostVars(inventory=inventory, variable_manager=manager, loader=loader)
    base: dict[str, Any] = {**manager.get_vars(host=host), "hostvars": hostvars, **GIVEN}
    # what the suite has and the demo need not have: a timer, and a task that a service starts
    timer = {"kind": "timer", "hosts": "worker", "command": ["true"], "on_calendar": "daily"}
    register = {"kind": "task", "hosts": "worker", "command": ["register"], "task_time_limit_seconds": 77, "after": ["probe"]}
    speaks_tls = {"kind": "service", "hosts": "worker", "command": ["serve", "--key", "{credentials}/tls.key"]}
    speaks_tls |= {"credentials": {"tls.key": "/etc/probe.key"}, "environment": {"TLS_DIR": "{credentials}/x y", "LEVEL": "100%"}}
    base["app"] = {
        **base["app"],
        "processes": {**base["app"]["processes"], "nightly": timer, "register": register, "speaks-tls": speaks_tls},
        "bootstrap": {**base["app"]["bootstrap"], "speaks-tls": [{"name": "10-server", "command": ["setup"], "start": ["register"]}]},
    }
    return base


def render(loader: DataLoader, base: dict[str, Any], roles: list[str]) -> dict[str, dict[str, str]]:
    """role -> {template: text} of all that the tasks of these roles would render on this host."""
    texts: dict[str, dict[str, str]] = {}
    for role in (ROOT / "roles" / name for name in roles):
        scope = {"role_path": str(role)}
        for source in (role / "defaults/main.yml", role / "vars/main.yml"):
            if source.exists():
                scope.update(loader.load_from_file(str(source), trusted_as_template=True) or {})
        for file in sorted((role / "tasks").glob("*.yml")):
            for task in flatten(loader.load_from_file(str(file), trusted_as_template=True) or []):
                # the inventory's values win over the role's defaults, a task's own `vars` over both
                variables = {**scope, **base, **{k: v for k, v in scope.items() if k.startswith("__")}, **(task.get("vars") or {})}
                templar = Templar(loader=loader, variables=variables)
                for entry in entries(task, templar):
                    if entry.get("template"):
                        path = role / "templates" / entry["template"]
                        own = Templar(loader=loader, variables={**variables, **(entry.get("vars") or {})})
                        own = own.copy_with_new_env(searchpath=[str(path.parent)])
                        text = own.template(trust_as_template(path.read_text()), overrides={"trim_blocks": True})
                        texts.setdefault(role.name, {})[path.name] = str(text)
                        if place := entry.get("name") or entry.get("dest"):
                            texts[role.name][place] = str(text)
    return texts


def main() -> None:
    init_plugin_loader()
    loader = DataLoader()
    demo = variables_of(loader, "demo", "demo1")
    if "--text" in sys.argv:
        Templar(loader=loader, variables=demo).template(trust_as_template(sys.argv[-1]))
        return
    roles = sorted(path.name for path in (ROOT / "roles").iterdir() if path.name != "lab" and (path / "tasks").is_dir())
    texts = render(loader, demo, roles)
    for role, host in LAB_HOSTS.items():
        more = render(loader, variables_of(loader, "lab", host), [role])[role]
        texts[role] = {**more, **texts[role], **{f"lab/{name}": text for name, text in more.items()}}
    print(json.dumps(texts))


if __name__ == "__main__":
    main()

"""Render every template of every role for the demo's host, with Ansible's own engine; prints {role: {template: text}} as JSON.

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
# what plays and earlier tasks would have set
GIVEN = {
    "postgresql_cluster": "core",
    "release_app": "app", "release_archive": "/r", "release_id": "1", "release_sha256": "0",
    "ansible_managed": "Managed by Ansible",
    "ansible_check_mode": False,
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


def main() -> None:
    init_plugin_loader()
    loader = DataLoader()
    inventory = InventoryManager(loader=loader, sources=[str(ROOT / "inventories/demo")])
    manager = VariableManager(loader=loader, inventory=inventory)
    host = inventory.get_host("demo1")
    hostvars = HostVars(inventory=inventory, variable_manager=manager, loader=loader)
    base = {**manager.get_vars(host=host), "hostvars": hostvars, **GIVEN}
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
    if "--text" in sys.argv:
        Templar(loader=loader, variables=base).template(trust_as_template(sys.argv[-1]))
        return
    texts: dict[str, dict[str, str]] = {}
    for role in sorted((ROOT / "roles").iterdir()):
        if role.name == "lab" or not (role / "tasks").is_dir():
            continue
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
                        if "units" in task and "name" in entry:
                            texts[role.name][entry["name"]] = str(text)
    print(json.dumps(texts))


if __name__ == "__main__":
    main()

"""Promises that every role, playbook and inventory of this repository keeps; what linters do not see."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2 import Environment, meta, nodes

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if (path / "tasks").is_dir())


class Loader(yaml.SafeLoader):
    """Reads Ansible's own tags as plain text."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: getattr(node, "value", None))


def load(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader=Loader) if path.exists() else None


def spec(role: str, entry: str = "main") -> dict[str, Any]:
    options: dict[str, Any] = load(ROOT / "roles" / role / "meta/argument_specs.yml")["argument_specs"][entry].get("options") or {}
    return options


def all_options(role: str) -> set[str]:
    """Names of all inputs of a role, over all its entry points."""
    specs = load(ROOT / "roles" / role / "meta/argument_specs.yml")["argument_specs"]
    return {name for entry in specs.values() for name in entry.get("options") or {}}


def defaults(role: str) -> dict[str, Any]:
    return load(ROOT / "roles" / role / "defaults/main.yml") or {}


def tasks(role: str) -> Iterator[dict[str, Any]]:
    """Every task of a role, those in blocks too."""
    files = [*(ROOT / "roles" / role / "tasks").glob("*.yml"), *(ROOT / "roles" / role / "handlers").glob("*.yml")]
    for file in files:
        yield from flatten(load(file) or [])


def flatten(listed: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for task in listed:
        yield task
        for key in ("block", "rescue", "always"):
            yield from flatten(task.get(key) or [])


@pytest.mark.parametrize("role", ROLES)
def test_spec_gives_type_and_why_for_every_input(role: str) -> None:
    assert spec(role), f"{role}: no inputs in meta/argument_specs.yml"
    for name, option in spec(role).items():
        assert name.startswith(f"{role}_"), f"{role}: {name} must begin with {role}_"
        assert option.get("type") and option.get("description"), f"{role}: {name} needs type and description"
        assert not (option.get("required") and "default" in option), f"{role}: {name} is required and has a default"
        assert option["type"] != "list" or "elements" in option, f"{role}: {name} needs elements"


@pytest.mark.parametrize("role", ROLES)
def test_defaults_equal_spec(role: str) -> None:
    documented = {name: option["default"] for name, option in spec(role).items() if "default" in option}
    assert defaults(role) == documented


@pytest.mark.parametrize("role", ROLES)
def test_optional_inputs_have_a_default(role: str) -> None:
    for name, option in spec(role).items():
        assert option.get("required") or "default" in option, f"{role}: {name} is neither required nor has a default"


@pytest.mark.parametrize("role", ROLES)
def test_every_notify_has_its_handler(role: str) -> None:
    handlers = {h["name"] for h in load(ROOT / "roles" / role / "handlers/main.yml") or []}
    for task in tasks(role):
        notified = task.get("notify") or []
        for name in [notified] if isinstance(notified, str) else notified:
            assert name in handlers, f"{role}: task '{task.get('name')}' notifies '{name}', which no handler has"


def declared_names(role: str) -> set[str]:
    """Names that a template of this role may use: inputs, role vars, and `vars` of tasks and entries, at any depth."""
    names = all_options(role)
    for file in (ROOT / "roles" / role / "vars").glob("*.yml"):
        names |= set(load(file) or {})

    def collect(node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("vars", "set_fact") and isinstance(value, dict):
                    names.update(value)
                if key == "register":
                    names.add(value)
                collect(value)
        elif isinstance(node, list):
            for value in node:
                collect(value)
        elif isinstance(node, str):  # entries built by an expression: 'vars': {'name': …}
            for found in re.findall(r"'vars':\s*\{([^}]*)\}", node):
                names.update(re.findall(r"'(\w+)':", found))

    for file in (ROOT / "roles" / role / "tasks").glob("*.yml"):
        collect(load(file))
    return names


class Everything(dict[str, Any]):
    """Jinja's table of filters or tests, in which Ansible's are there too: only variables are looked at here."""

    def __contains__(self, name: object) -> bool:
        return True

    def get(self, name: object, default: object = None) -> Any:
        return str


MAGIC = {"ansible_managed", "inventory_hostname", "groups", "hostvars", "ansible_facts", "item", "lookup", "role_path", "template_path"}


def templates(role: str) -> list[Path]:
    return sorted((ROOT / "roles" / role / "templates").rglob("*.j2"))


@pytest.mark.parametrize("template", [t for role in ROLES for t in templates(role)], ids=lambda p: str(p.relative_to(ROOT / "roles")))
def test_templates_use_declared_names_only(template: Path) -> None:
    role = template.relative_to(ROOT / "roles").parts[0]
    environment = Environment(extensions=["jinja2.ext.do", "jinja2.ext.loopcontrols"])
    environment.filters = environment.tests = Everything()
    tree = environment.parse(template.read_text())
    assert isinstance(tree, nodes.Template)
    unknown = meta.find_undeclared_variables(tree) - declared_names(role) - MAGIC
    assert not unknown, f"{template.name} uses {sorted(unknown)}, which nothing declares"


@pytest.mark.parametrize("role", ROLES)
def test_templates_begin_with_managed_comment_and_are_used(role: str) -> None:
    users = [*(ROOT / "roles" / role).rglob("*.yml"), *(ROOT / "filter_plugins").glob("*.py")]
    text = "".join(path.read_text() for path in users)
    parts = {name for template in templates(role) for name in re.findall(r"{% include '(.+?)' %}", template.read_text())}
    for template in templates(role):
        if template.name in parts:
            continue
        json_text = "to_nice_json" in template.read_text()  # JSON has no comments
        assert json_text or "{{ ansible_managed | comment }}" in template.read_text(), f"{template}: begin with ansible_managed"
        assert template.name in text, f"{template} is used by no task"


INVENTORY_FILES = sorted(path for path in (ROOT / "inventories").rglob("*.yml") if path.name != "hosts.yml" and not path.is_symlink())


@pytest.mark.parametrize("file", INVENTORY_FILES, ids=lambda p: str(p.relative_to(ROOT / "inventories")))
def test_inventory_names_exist_in_specs(file: Path) -> None:
    """A mistyped `<role>_*` name in group_vars is ignored by Ansible: here it is an error."""
    own = {"platform_ports", "topology"}
    for name in load(file) or {}:
        for role in ROLES:
            if name.startswith(f"{role}_") and name not in own:
                assert name in all_options(role), f"{file.name}: {name} is no input of role {role}"


def test_inventories_link_the_common_files() -> None:
    for inventory in (ROOT / "inventories").iterdir():
        if inventory.name in ("common",) or not inventory.is_dir():
            continue
        for common in (ROOT / "inventories/common").glob("*.yml"):
            assert (inventory / "group_vars/all" / common.name).resolve() == common, f"{inventory.name} must link {common.name}"


def test_nothing_in_roles_or_playbooks_names_the_reference_application() -> None:
    application = "dry" + "dock"
    for folder in ("roles", "playbooks", "library", "module_utils", "action_plugins", "filter_plugins"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert application not in path.read_text(errors="ignore").lower(), f"{path} names the reference application"


def test_collections_of_requirements_come_with_the_ansible_package() -> None:
    import json

    import ansible_collections
    from packaging.specifiers import SpecifierSet

    top = Path(next(iter(ansible_collections.__path__)))
    for wanted in load(ROOT / "requirements.yml")["collections"]:
        namespace, name = wanted["name"].split(".")
        manifest = json.loads((top / namespace / name / "MANIFEST.json").read_text())
        assert manifest["collection_info"]["version"] in SpecifierSet(wanted["version"]), wanted["name"]


def test_collections_that_are_used_are_required() -> None:
    required = {wanted["name"] for wanted in load(ROOT / "requirements.yml")["collections"]}
    used = set()
    for folder in ("roles", "playbooks", "molecule"):
        for path in (ROOT / folder).rglob("*.yml"):
            used |= set(re.findall(r"^\s*-?\s*((?:community|ansible)\.\w+)\.\w+:", path.read_text(), re.MULTILINE))
    assert used - {"ansible.builtin"} == required


@pytest.mark.parametrize("role", ROLES)
def test_commands_state_a_reason(role: str) -> None:
    """A `command` task has a comment above it that says why no module does it (style 5)."""
    for file in (ROOT / "roles" / role / "tasks").glob("*.yml"):
        lines = file.read_text().splitlines()
        for number, line in enumerate(lines):
            if re.match(r"\s+ansible\.builtin\.(command|shell|raw):", line):
                start = next(n for n in range(number, -1, -1) if lines[n].lstrip().startswith("- "))
                assert any("#" in text for text in lines[max(0, start - 3) : start]), f"{file}:{number + 1}: say why it is a command"


def test_reference_is_generated_from_the_specs() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs/generate.py"), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_tests_named_in_the_table_of_promises_exist() -> None:
    table = (ROOT / "docs/reference/invariants.md").read_text()
    for folder, file, name in re.findall(r"`([\w/]+/)?(test_\w+\.py)::(test_\w+)`", table):
        assert f"def {name}(" in (ROOT / (folder or "molecule/single/tests/") / file).read_text(), f"{folder}{file}::{name}"
    for path, prefix in re.findall(r"`([\w/]+/test_\w+\.py)` \(`(test_\w+_)\*`", table):
        assert f"def {prefix}" in (ROOT / path).read_text(), f"{path}: {prefix}*"
    for path in re.findall(r"`((?:tests|drydock|playbooks|filter_plugins)/[\w/.]+)`", table):
        assert (ROOT / path).exists(), path


def test_the_tests_lab_has_the_hosts_and_groups_of_the_full_topology() -> None:
    """Only the network differs, so what is proven there holds for `make lab` too."""
    ours = load(ROOT / "inventories/lab/hosts.yml")
    tests = load(ROOT / "molecule/pairs/inventory/hosts.yml")
    for host in tests["all"]["hosts"].values():
        host["ansible_host"] = host["ansible_host"].replace("10.87.4.", "10.87.3.")
    assert tests == ours


@pytest.mark.parametrize("inventory", ["demo", "lab", "pretalx.example", "production.example"])
def test_every_inventory_passes_the_checks_of_the_controller(inventory: str, tmp_path: Path) -> None:
    """What a person copies must work: groups, voters, addresses, secrets, app contract and ports."""
    checks = [{"hosts": "localhost", "gather_facts": False, "tasks": [{"import_tasks": str(ROOT / "playbooks/tasks/preflight.yml")}]}]
    (tmp_path / "checks.yml").write_text(yaml.safe_dump(checks))
    done = subprocess.run(
        ["ansible-playbook", "-i", f"inventories/{inventory}", str(tmp_path / "checks.yml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "EVENKEEL_STATE": str(tmp_path), "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0"},
    )
    assert done.returncode == 0 and "ok=1 " in done.stdout, done.stdout + done.stderr

"""Every template of every role renders with the demo's inventory, and an undefined name in it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RENDER = Path(__file__).with_name("render_templates.py")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """role -> {template (or `dest`) -> text}, rendered in a process of its own with Ansible's own engine."""
    state = tmp_path_factory.mktemp("state")
    environment = {
        **os.environ,
        "EVENKEEL_STATE": str(state),
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_HOME": str(state / "ansible"),
    }
    done = subprocess.run([sys.executable, str(RENDER)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, dict[str, str]] = json.loads(done.stdout)
    return answer


def test_every_template_renders(rendered: dict[str, dict[str, str]]) -> None:
    for role in (path.name for path in (ROOT / "roles").iterdir()):
        for template in (ROOT / "roles" / role / "templates").glob("*.j2"):
            assert template.name in rendered.get(role, {}), f"{role}/{template.name} is used by no task"


def test_undefined_names_fail(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(RENDER), "--text", "{{ base_hosts }} {{ base_hosst }}"],
        cwd=ROOT,
        env={**os.environ, "EVENKEEL_STATE": str(tmp_path), "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "base_hosst" in done.stderr


def test_rendered_units_run_what_the_contract_says(rendered: dict[str, dict[str, str]]) -> None:
    web = rendered["process"]["process.service.j2"]
    assert "ExecStart=/opt/" in web
    assert "EnvironmentFile=/etc/" in web
    for text in rendered["process"].values():
        assert "{{" not in text

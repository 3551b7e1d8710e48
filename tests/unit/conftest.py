"""Lets unit tests import the suite's module_utils, library and action plugins as Ansible does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import ansible.module_utils
import pytest

ROOT = Path(__file__).resolve().parents[2]
ansible.module_utils.__path__.append(str(ROOT / "module_utils"))


def load(path: Path) -> ModuleType:
    """Import a plugin by its path: some have the name of a module of Python itself."""
    spec = importlib.util.spec_from_file_location(f"evenkeel_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def library() -> dict[str, ModuleType]:
    """The modules of library/, by name."""
    return {name: load(ROOT / "library" / f"{name}.py") for name in ("files", "units", "venv")}


@pytest.fixture(scope="session")
def actions() -> dict[str, ModuleType]:
    """The action plugins, by name."""
    return {name: load(ROOT / "action_plugins" / f"{name}.py") for name in ("files", "units", "venv")}

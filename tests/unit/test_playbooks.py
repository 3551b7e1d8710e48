"""What all playbooks must have, of which only a rare fault would tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import ROOT

PLAYBOOKS = sorted((ROOT / "playbooks").rglob("*.yml"))


def tasks(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping of a file, the nested ones, too."""
    if isinstance(node, dict):
        yield node
    for each in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        yield from tasks(each)


@pytest.mark.parametrize("path", PLAYBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_host_that_is_asked_for_another_and_is_down_does_not_end_the_play(path: Path) -> None:
    """ansible.cfg has `any_errors_fatal`, which an ignored unreachable host would set off."""
    asks = [task for task in tasks(yaml.safe_load(path.read_text())) if task.get("ignore_unreachable") and "delegate_to" in task]
    assert [task["name"] for task in asks if task.get("any_errors_fatal") is not False] == []

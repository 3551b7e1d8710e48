"""The signature under an approval, with real keys and the real ssh-keygen, as two people type it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.evenkeel_approval import examine

from filter_plugins.migrations import approval_statement, gate_refusal

PLAN: dict[str, Any] = {
    "platform": "demo",
    "release": "1.2-abc",
    "fingerprint": "0123456789abcdef",
    "pending": [{"database": "core", "app": "shop", "name": "0002_x"}],
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ann", "eve"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name], check=True)
    return folder


def signers(keys: Path) -> list[str]:
    return [f"ann@example.org {(keys / 'ann.pub').read_text().strip()}"]


def signed(keys: Path, who: str, plan: dict[str, Any], folder: Path) -> Path:
    """What the second person does: exactly what the gate told."""
    told = gate_refusal(plan, "x", "inventories/demo", "signature").splitlines()
    command = next(line for line in told if "ssh-keygen" in line).replace("~/.ssh/id_ed25519", str(keys / who))
    subprocess.run(["sh", "-c", command], cwd=folder, check=True, capture_output=True)
    return folder / "approval.sig"


def test_a_second_person_approves(keys: Path, tmp_path: Path) -> None:
    file = signed(keys, "ann", PLAN, tmp_path)
    assert examine(approval_statement(PLAN), file, signers(keys), "bob@controller") == ("ann@example.org", "")


def test_who_is_not_on_the_list_cannot(keys: Path, tmp_path: Path) -> None:
    file = signed(keys, "eve", PLAN, tmp_path)
    by, problem = examine(approval_statement(PLAN), file, signers(keys), "bob@controller")
    assert by == ""
    assert problem == "it was signed with a key that is not on the list of approvers (deploy_approvers)"
    assert examine(approval_statement(PLAN), file, [], "bob@controller")[0] == "", "an empty list lets nobody"


@pytest.mark.parametrize("other", [{"platform": "production"}, {"release": "1.3-x"}, {"fingerprint": "f" * 16}])
def test_a_signature_is_for_one_plan(keys: Path, tmp_path: Path, other: dict[str, str]) -> None:
    file = signed(keys, "ann", PLAN, tmp_path)
    by, problem = examine(approval_statement({**PLAN, **other}), file, signers(keys), "bob@controller")
    assert by == ""
    assert problem.startswith("the signature of ann@example.org is not for this plan (")


def test_a_signature_for_something_else_is_none(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(approval_statement(PLAN))
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-n", "git", "-f", keys / "ann", tmp_path / "text"], check=True, capture_output=True)
    assert "is not for this plan" in examine(approval_statement(PLAN), tmp_path / "text.sig", signers(keys), "")[1]


def test_who_deploys_cannot_approve(keys: Path, tmp_path: Path) -> None:
    file = signed(keys, "ann", PLAN, tmp_path)
    assert examine(approval_statement(PLAN), file, signers(keys), "ann@controller")[1].endswith("signed it: a second person must")


@pytest.mark.parametrize(
    ("names", "told"), [("eve,bob@example.org", "signed it: a second person must"), ("*@example.org", "names no person")]
)
def test_a_line_for_several_or_for_anybody_is_no_way_around(keys: Path, tmp_path: Path, names: str, told: str) -> None:
    file = signed(keys, "ann", PLAN, tmp_path)
    line = f"{names} {(keys / 'ann.pub').read_text().strip()}"
    assert told in examine(approval_statement(PLAN), file, [line], "bob@controller")[1]


def test_what_is_no_signature(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("hello")
    assert "there is no signature" in examine("x", tmp_path / "none", signers(keys), "")[1]
    assert "is no signature of ssh-keygen" in examine("x", tmp_path / "other", signers(keys), "")[1]

"""What the module of the role postgresql computes without a cluster."""

from __future__ import annotations

import base64
import hashlib
import hmac
import importlib.util
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).resolve().parents[2] / "roles" / "postgresql" / "library" / "patroni_cluster.py"
spec = importlib.util.spec_from_file_location("patroni_cluster", PATH)
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

WHOLE = ("postgresql", "parameters")


@pytest.mark.parametrize(
    ("wanted", "found", "patch"),
    [
        ({"ttl": 20}, {"ttl": 20, "pause": True}, {}),
        ({"ttl": 20}, {"ttl": 30, "pause": True}, {"ttl": 20}),
        ({"ttl": 20}, {}, {"ttl": 20}),
        ({"synchronous_mode": True}, {"synchronous_mode": 1}, {"synchronous_mode": True}),
        (
            {"postgresql": {"parameters": {"work_mem": "4MB"}}},
            {"postgresql": {"parameters": {"work_mem": "4MB", "log_statement": "all"}, "use_slots": True}},
            {"postgresql": {"parameters": {"log_statement": None}}},
        ),
        (
            {"postgresql": {"parameters": {"work_mem": "6MB"}}},
            {"postgresql": None},
            {"postgresql": {"parameters": {"work_mem": "6MB"}}},
        ),
    ],
)
def test_patch_is_the_least_that_is_needed(wanted: dict[str, Any], found: dict[str, Any], patch: dict[str, Any]) -> None:
    assert module.patch_of(wanted, found, WHOLE) == patch


def test_names_of_changed_settings() -> None:
    assert module.names_of({"ttl": 20, "postgresql": {"parameters": {"b": None, "a": 1}}}) == [
        "postgresql.parameters.a",
        "postgresql.parameters.b",
        "ttl",
    ]


def verifier(password: str) -> str:
    salt = b"0123456789abcdef"
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 4096)
    stored = hashlib.sha256(hmac.new(salted, b"Client Key", "sha256").digest()).digest()
    server = hmac.new(salted, b"Server Key", "sha256").digest()
    text = [base64.b64encode(part).decode() for part in (salt, stored, server)]
    return f"SCRAM-SHA-256$4096:{text[0]}${text[1]}:{text[2]}"


def test_password_is_compared_with_its_verifier() -> None:
    assert module.password_fits("right", verifier("right"))
    assert not module.password_fits("wrong", verifier("right"))
    assert not module.password_fits("right", None)
    assert not module.password_fits("right", "md5d41d8cd98f00b204e9800998ecf8427e")

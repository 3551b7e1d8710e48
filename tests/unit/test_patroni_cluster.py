"""What the module of the role postgresql computes without a cluster."""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
from email.message import Message
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import pytest
from ansible.module_utils import evenkeel_patroni
from ansible.module_utils.evenkeel_patroni import ClusterError, ConflictError, DeniedError
from conftest import ROOT, load

module = load(ROOT / "roles/postgresql/library/patroni_cluster.py")
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


def test_settings_that_another_member_changed_at_the_same_moment_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    found = {"ttl": 30, "loop_wait": 10}
    tried: list[dict[str, Any]] = []

    def order(method: str, path: str, patch: dict[str, Any]) -> None:
        tried.append(patch)
        if len(tried) == 1:
            found.update(ttl=20)
            raise ConflictError("409")
        found.update(patch)

    rest = SimpleNamespace(ask=lambda path: dict(found), order=order)
    wanted = {"ttl": 20, "loop_wait": 5}
    assert module.bring_in_line(rest, wanted, check_mode=True)[1] == wanted
    assert tried == []
    assert module.bring_in_line(rest, wanted, check_mode=False) == ({"ttl": 20, "loop_wait": 10}, {"loop_wait": 5})
    assert tried == [wanted, {"loop_wait": 5}]
    assert module.bring_in_line(rest, wanted, check_mode=False)[1] == {}


def test_a_cluster_whose_settings_are_not_in_etcd_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restore its state in etcd is removed, and Patroni answers 502 to /config until it has written its settings again."""
    monkeypatch.setattr(evenkeel_patroni.time, "sleep", lambda seconds: None)
    answers: dict[str, Any] = {
        "/patroni": {"state": "running"},
        "/cluster": {"members": [{"name": "a", "role": "leader", "state": "running"}]},
    }
    asked: list[str] = []

    def ask(path: str) -> dict[str, Any]:
        asked.append(path)
        if path == "/config" and asked.count(path) < 3:
            page = io.BytesIO(b"<!DOCTYPE HTML>\n<h1>Error response</h1>")
            raise evenkeel_patroni._problem(HTTPError("https://a:8008", 502, "Bad Gateway", Message(), page), path)
        return dict(answers.get(path, {}))

    module.wait_ready(SimpleNamespace(ask=ask), 60)
    assert asked.count("/config") == 3
    asked.clear()
    with pytest.raises(ClusterError, match=r"not ready after 0 s: .*answered 502 to /config: Bad Gateway"):
        module.wait_ready(SimpleNamespace(ask=ask), 0)


def test_a_password_that_stays_wrong_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RELOAD_SECONDS", 0)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)

    def order(method: str, path: str, patch: dict[str, Any]) -> None:
        raise DeniedError("401")

    with pytest.raises(DeniedError):
        module.bring_in_line(SimpleNamespace(ask=lambda path: {}, order=order), {"ttl": 20}, check_mode=False)

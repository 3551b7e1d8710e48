# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Patroni's REST API, and what a cluster's state means for those who restart its members. Standard library only; no Ansible."""

from __future__ import annotations

import base64
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

POLL_SECONDS = 0.5

#: The option `api` of the modules.
API_OPTIONS: dict[str, dict[str, Any]] = {
    "url": {"type": "str", "required": True},
    "user": {"type": "str", "default": "patroni"},
    "password": {"type": "str", "required": True, "no_log": True},
    "ca_file": {"type": "path", "required": True},
    "certificate_file": {"type": "path", "required": True},
    "key_file": {"type": "path", "required": True, "no_log": False},
}

#: A standby cannot run with a lower value of these than its primary, so the primary takes a lower one first.
PRIMARY_FIRST = frozenset(
    {"max_connections", "max_locks_per_transaction", "max_prepared_transactions", "max_wal_senders", "max_worker_processes"}
)


class ClusterError(Exception):
    """Something that people must put right; the text is for them."""


class DeniedError(ClusterError):
    """Patroni does not accept the password, or not yet."""


class ConflictError(ClusterError):
    """Another member changed the same thing at the same moment."""


@dataclass(frozen=True)
class Member:
    """A member as the cluster's other members see it."""

    name: str
    role: str = "replica"
    state: str = "stopped"
    url: str = ""
    lowered: bool = False  # it waits for a restart with a lower value of one of `PRIMARY_FIRST`

    @property
    def leads(self) -> bool:
        """Whether this is the primary, or holds its place while it starts or stops."""
        return self.role == "leader"

    @property
    def takes_part(self) -> bool:
        """Whether it does its work: the primary runs, a standby streams."""
        return self.state == ("running" if self.leads else "streaming")


@dataclass(frozen=True)
class Cluster:
    """A cluster as Patroni describes it."""

    name: str
    members: tuple[Member, ...]
    paused: bool = False

    @property
    def leader(self) -> Member | None:
        """The primary, if there is one."""
        return next((member for member in self.members if member.leads), None)

    @property
    def successor(self) -> Member | None:
        """The synchronous standby that may be promoted now without losing a commit."""
        return next((member for member in self.members if member.role == "sync_standby" and member.takes_part), None)

    def states(self, names: Sequence[str]) -> str:
        """Say in words what these members do."""
        known = {member.name: f"{member.name} is {member.state}" for member in self.members}
        return ", ".join(known.get(name, f"{name} is not there") for name in names)


def parse_cluster(answer: Mapping[str, Any]) -> Cluster:
    """Read Patroni's answer to `/cluster`."""
    members = tuple(
        Member(
            name=str(each["name"]),
            role=str(each.get("role", "replica")),
            state=str(each.get("state", "unknown")),
            url=str(each.get("api_url", "")).removesuffix("/patroni"),
            lowered=bool(lowered_of(each)),
        )
        for each in answer.get("members", [])
    )
    return Cluster(str(answer.get("scope", "")), members, bool(answer.get("pause")))


def pending_of(answer: Mapping[str, Any]) -> list[str]:
    """Return the settings for which a member waits for a restart, from its own or the cluster's description."""
    if not answer.get("pending_restart"):
        return []
    return sorted(answer.get("pending_restart_reason") or {}) or ["some settings"]


def lowered_of(answer: Mapping[str, Any]) -> list[str]:
    """Return those settings of `PRIMARY_FIRST` that wait for a restart with a lower value."""
    reasons = (answer.get("pending_restart_reason") or {}) if answer.get("pending_restart") else {}
    return sorted(name for name, diff in reasons.items() if name in PRIMARY_FIRST and _is_lower(diff))


def _is_lower(diff: Any) -> bool:
    try:
        return int(diff["new_value"]) < int(diff["old_value"])
    except (KeyError, TypeError, ValueError):
        return False


def shortcomings(cluster: Cluster, expected: Sequence[str], replication: Sequence[Mapping[str, Any]], *, synchronous: bool) -> list[str]:
    """Say what keeps the cluster from losing a member without harm; nothing when it is whole.

    replication: the primary's own account of the standbys that stream from it. What members report about themselves through etcd
    may be some seconds old.
    """
    leader = cluster.leader
    if leader is None:
        return [f"it has no primary ({cluster.states(expected)})"]
    if not leader.takes_part:
        return [f"its primary {leader.name} is {leader.state}"]
    known = {member.name: member for member in cluster.members}
    streaming = {str(each.get("application_name")) for each in replication if each.get("state") == "streaming"}
    problems: list[str] = []
    for name in expected:
        if name == leader.name:
            continue
        if name not in known:
            problems.append(f"{name} is not there")
        elif not known[name].takes_part:
            problems.append(f"{name} is {known[name].state}")
        elif name not in streaming:
            problems.append(f"{name} does not stream from {leader.name}")
    if problems or len(expected) == 1 or not synchronous:
        return problems
    synced = {str(each.get("application_name")) for each in replication if each.get("sync_state") in ("sync", "quorum")}
    if not any(member.role == "sync_standby" and member.name in synced for member in cluster.members):
        problems.append("no standby is synchronous yet")
    return problems


def refusal(cluster: Cluster, name: str, expected: Sequence[str]) -> str:
    """Say why the primary must not step down."""
    others = [other for other in expected if other != name]
    return (
        f"{name} is the primary of cluster {cluster.name}, and no synchronous standby can take over ({cluster.states(others)}). "
        f"{name} was left as it is. See `patronictl list {cluster.name}`, then `journalctl -u patroni@{cluster.name}` on "
        f"{' and '.join(others)}."
    )


class Rest:
    """Patroni's REST API of one member."""

    def __init__(self, api: Mapping[str, Any]) -> None:
        self.url: str = api["url"].rstrip("/")
        context = ssl.create_default_context(cafile=api["ca_file"])
        context.load_cert_chain(api["certificate_file"], api["key_file"])
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
        token = base64.b64encode(f"{api['user']}:{api['password']}".encode()).decode()
        self.authorization = f"Basic {token}"

    def ask(self, path: str, url: str = "") -> dict[str, Any]:
        """Return an answer as a dictionary, of another member's API when `url` is given. Patroni answers 503 with a body, too."""
        try:
            body = self._open(urllib.request.Request(f"{url or self.url}{path}"), 10)
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise _problem(error, path) from None
            body = error.read()
        try:
            answer = json.loads(body)
        except ValueError:
            raise ClusterError(f"Patroni's answer to {path} is not JSON: {body[:200]!r}") from None
        return answer if isinstance(answer, dict) else {}

    def order(self, method: str, path: str, body: Mapping[str, Any], url: str = "", seconds: float = 10) -> None:
        """Have something changed."""
        request = urllib.request.Request(f"{url or self.url}{path}", json.dumps(body).encode(), method=method)
        request.add_header("Authorization", self.authorization)
        request.add_header("Content-Type", "application/json")
        try:
            self._open(request, seconds)
        except urllib.error.HTTPError as error:
            raise _problem(error, path) from None

    def _open(self, request: urllib.request.Request, seconds: float) -> bytes:
        with self.opener.open(request, timeout=seconds) as response:
            body: bytes = response.read()
        return body


def _problem(error: urllib.error.HTTPError, path: str) -> ClusterError:
    kind = {401: DeniedError, 409: ConflictError}.get(error.code, ClusterError)
    body = error.read().decode(errors="replace")
    said = error.reason if body.lstrip().startswith("<") else body[:300]  # where Patroni has no words of its own, Python writes a page
    return kind(f"Patroni answered {error.code} to {path}: {said}")


def wait_for(seconds: float, look: Callable[[], Sequence[str]]) -> list[str]:
    """Look until nothing is missing any more; return what still is at the end. A look that finds no answer counts as missing."""
    limit = time.monotonic() + seconds
    while True:
        try:
            missing = list(look())
        except (OSError, ClusterError) as error:
            missing = [f"Patroni gives no answer ({getattr(error, 'reason', error)})"]
        if not missing or time.monotonic() > limit:
            return missing
        time.sleep(POLL_SECONDS)

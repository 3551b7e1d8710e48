#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Planned work on one of several Redis nodes: hand over, restart, wait until all are in sync."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: redis_node
short_description: Hand the master over, restart a node, wait until all nodes are there and in sync
description:
  - Planned work on a Redis node that the role C(redis) has set up. Who the members are and how to reach them is read from
    C(/etc/redis/node.json) on the host, so that no password is passed.
  - It never moves a master unasked, and it does nothing that would leave the platform without a master or without an in-sync replica.
options:
  action:
    description:
      - V(wait_redundant) waits until every member answers, one is master, the others are its replicas and in sync, and every Sentinel
        knows all of them and names that master.
      - V(step_down) lets another node take over if this one is the master. Writes pause for about a second; none that was acknowledged
        is lost. It refuses when there is no replica in sync.
      - V(restart) restarts O(units) of this node. A server is restarted only while all other members are well, a master after it has
        stepped down, and all are in sync again at the end. A Sentinel answers again at the end; the others watch on meanwhile.
    type: str
    required: true
    choices: [wait_redundant, step_down, restart]
  units:
    description: For O(action=restart), C(redis-server.service), C(redis-sentinel.service) or both.
    type: list
    elements: str
    default: []
  master:
    description: For O(action=restart), whether a server that is the master is restarted, too. If not, it is left for a later pass and
      named in RV(left).
    type: bool
    default: false
  timeout_seconds:
    description: How long to wait until all members are in sync.
    type: int
    default: 120
author:
  - Evenkeel contributors (@evenkeel)
attributes:
  check_mode:
    support: full
    description: Looks, predicts and changes nothing; it does not wait.
  diff_mode:
    support: none
"""

EXAMPLES = r"""
- name: Let another node be the Redis master
  redis_node:
    action: step_down
"""

RETURN = r"""
master:
  description: The master, as the Sentinels name it; empty when nobody does.
  returned: always
  type: str
  sample: redis-1
left:
  description: The units that were not restarted because their node is the master.
  returned: always
  type: list
  elements: str
pause_seconds:
  description: How long writes were held back while the master changed.
  returned: when another node took over
  type: float
"""

import contextlib
import json
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "action": {"type": "str", "required": True, "choices": ["wait_redundant", "step_down", "restart"]},
    "units": {"type": "list", "elements": "str", "default": []},
    "master": {"type": "bool", "default": False},
    "timeout_seconds": {"type": "int", "default": 120},
}
NODE = Path("/etc/redis/node.json")
OPERATOR = Path("/run/redis/operator.env")
SERVER = "redis-server.service"
SENTINEL = "redis-sentinel.service"
MASTER = "main"
ANSWER_SECONDS = 3
SYNC_SECONDS = 2  # for the replicas to take the last writes
TAKE_OVER_SECONDS = 10  # for another node to take over
HOLD_SECONDS = 20  # at most; longer than Sentinel takes to make a replica of a master that has been replaced
LAG_SECONDS = 2
ASKS_SECONDS = 11  # a little longer than the time between two questions of a Sentinel
POLL_SECONDS = 0.5


class NodeError(Exception):
    """Something that people must put right; the text is for them."""


class Connection:
    """A connection to a server or a Sentinel, over TLS with its name verified, in Redis's protocol."""

    def __init__(self, host: str, port: int, ca_file: str, user: str, password: str) -> None:
        plain = socket.create_connection((host, port), timeout=ANSWER_SECONDS)
        try:
            context = ssl.create_default_context(cafile=ca_file)
            self.socket = context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
        self.file = self.socket.makefile("rb")
        self.call("AUTH", user, password)

    def call(self, *words: str | int) -> Any:
        """Send a command and return its answer; an error that the server answers is raised."""
        parts = [str(word).encode() for word in words]
        self.socket.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))
        return self._read(str(words[0]))

    def _read(self, command: str) -> Any:
        line = self.file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the connection was closed")
        kind, rest = line[:1], line[1:-2].decode()
        if kind == b"+":
            return rest
        if kind == b"-":
            raise NodeError(f"{command}: {rest}")
        if kind == b":":
            return int(rest)
        if int(rest) < 0:
            return None
        if kind == b"*":
            return [self._read(command) for _ in range(int(rest))]
        return self.file.read(int(rest) + 2)[:-2].decode(errors="replace")

    def info(self) -> dict[str, str]:
        """Return what INFO says about replication."""
        return parse_info(self.call("INFO", "replication"))

    def close(self) -> None:
        """Close the connection."""
        self.file.close()
        self.socket.close()


@dataclass(frozen=True)
class Node:
    """This node and the other members, as `/etc/redis/node.json` names them."""

    name: str
    members: list[str]
    port: int
    sentinel_port: int
    sentinel_password: str
    ca_file: str

    @property
    def others(self) -> list[str]:
        """The other members."""
        return [member for member in self.members if member != self.name]

    @contextlib.contextmanager
    def server(self, member: str, *, operator: bool = False) -> Iterator[Connection]:
        """Connect to a member's server, or to this node's as the operator, who may do everything."""
        user, password = ("operator", operator_password()) if operator else ("sentinel", self.sentinel_password)
        with contextlib.closing(Connection(member, self.port, self.ca_file, user, password)) as connection:
            yield connection

    @contextlib.contextmanager
    def sentinel(self, member: str) -> Iterator[Connection]:
        """Connect to a member's Sentinel."""
        connection = Connection(member, self.sentinel_port, self.ca_file, "sentinel", self.sentinel_password)
        with contextlib.closing(connection):
            yield connection


def operator_password() -> str:
    """Return the password that the running server of this host knows."""
    return OPERATOR.read_text(encoding="utf-8").strip().partition("=")[2]


def parse_info(text: str) -> dict[str, str]:
    """Read the answer of INFO."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key: value.strip() for key, value in pairs}


def pairs(flat: list[str]) -> dict[str, str]:
    """Read an answer that is a flat list of names and values."""
    return dict(zip(flat[::2], flat[1::2], strict=False))


def replicas_of(info: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return a master's replicas from its INFO, by name."""
    lines = [value for key, value in info.items() if key.startswith("slave") and "ip=" in value]
    found = [dict(item.split("=", 1) for item in line.split(",")) for line in lines]
    return {each["ip"]: each for each in found}


@dataclass
class Seen:
    """What the members' servers and Sentinels said at one moment."""

    servers: dict[str, dict[str, str]] = field(default_factory=dict)  # INFO
    sentinels: dict[str, dict[str, str]] = field(default_factory=dict)  # SENTINEL MASTER
    silent: dict[str, str] = field(default_factory=dict)  # why there is no answer, by "server|Sentinel of member"

    @property
    def master(self) -> str:
        """The master that most Sentinels name; without Sentinels the server that is one."""
        named = [each.get("ip", "") for each in self.sentinels.values()]
        named = named or [name for name, info in self.servers.items() if info.get("role") == "master"]
        return max(sorted(set(named)), key=named.count, default="")


def look(node: Node) -> Seen:
    """Ask everybody."""
    seen = Seen()
    alone = not node.others
    for member in node.members:
        try:
            with node.server(member, operator=alone) as server:
                seen.servers[member] = server.info()
        except (OSError, NodeError) as error:
            seen.silent[f"Redis on {member}"] = reason(error)
        if alone:
            continue
        try:
            seen.sentinels[member] = watched(node, member)
        except (OSError, NodeError) as error:
            seen.silent[f"Sentinel on {member}"] = reason(error)
    return seen


def reason(error: BaseException) -> str:
    """Say in a few words why there was no answer."""
    return "no answer in time" if isinstance(error, TimeoutError) else str(getattr(error, "strerror", None) or error)


def missing(seen: Seen, members: list[str], *, without: str = "") -> list[str]:
    """Say what keeps the members from being redundant; nothing when they are.

    without: a member whose own state does not count, because it is about to be restarted. It must not be the master.
    """
    problems = [f"{who} does not answer ({why})" for who, why in seen.silent.items() if who.rpartition(" ")[2] != without]
    counted = [member for member in members if member != without]
    masters = [member for member, info in seen.servers.items() if info.get("role") == "master"]
    if len(masters) > 1:
        problems.append(f"{' and '.join(masters)} both say that they are master")
    elif not masters:
        problems.append("no member is master")
    if not masters or len(members) == 1:
        return problems
    master = masters[0]
    if master == without:
        problems.append(f"{master} is the master")
    attached = replicas_of(seen.servers[master])
    for member in counted:
        info = seen.servers.get(member)
        if info is None or member in masters:
            continue
        if info.get("master_host") != master:
            problems.append(f"{member} follows {info.get('master_host')}, not {master}")
        elif info.get("master_link_status") != "up" or attached.get(member, {}).get("state") != "online":
            problems.append(f"{member} is not in sync with {master}")
    for member in counted:
        state = seen.sentinels.get(member)
        if state is None:
            continue
        if state.get("ip") != master:
            problems.append(f"Sentinel on {member} names {state.get('ip')} as master")
        elif without == "":
            problems += unaware(member, state, len(members) - 1)
    return problems


def unaware(member: str, state: Mapping[str, str], others: int) -> list[str]:
    """Say what a Sentinel does not know or does not like."""
    problems = []
    if state.get("num-other-sentinels") != str(others):
        problems.append(f"Sentinel on {member} knows {state.get('num-other-sentinels')} other Sentinels instead of {others}")
    if state.get("num-slaves") != str(others):
        problems.append(f"Sentinel on {member} knows {state.get('num-slaves')} replicas instead of {others}")
    if state.get("flags") != "master":
        problems.append(f"Sentinel on {member} says of the master: {state.get('flags')}")
    return problems


def wait_redundant(node: Node, seconds: float, *, without: str = "") -> Seen:
    """Wait until nothing is missing."""
    limit = time.monotonic() + seconds
    while True:
        seen = look(node)
        problems = missing(seen, node.members, without=without)
        if not problems:
            return seen
        if time.monotonic() > limit:
            waited = f" after {seconds:.0f} s" if seconds else ""
            others = f"{'; '.join(problems)}. Look at: journalctl -u redis-server -u redis-sentinel"
            raise NodeError(f"{'the other members are' if without else 'Redis is'} not all well{waited}: {others}")
        time.sleep(POLL_SECONDS)


def until(seconds: float, what: str, done: Callable[[], Any]) -> Any:
    """Ask again and again, quickly, until the answer is true."""
    limit = time.monotonic() + seconds
    while True:
        answer = done()
        if answer:
            return answer
        if time.monotonic() > limit:
            raise NodeError(f"{what} took longer than {seconds} s")
        time.sleep(0.02)


def in_sync(info: Mapping[str, str]) -> list[str]:
    """Return the replicas that follow closely, by a master's INFO."""
    return [name for name, each in replicas_of(info).items() if each.get("state") == "online" and int(each.get("lag", "99")) <= LAG_SECONDS]


def step_down(node: Node) -> float:
    """Let another node take over from this one, which is the master; return how long writes were held back.

    Writes are held back first, so that the replicas have everything. This node follows the new master at once and does not wait for
    Sentinel to tell it. Clients are disconnected only when their writes will be accepted elsewhere. If something fails on the way, the
    hold is lifted only while nobody else can have become master; otherwise it ends by itself, when Sentinel has sorted it out.
    """
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(node.server(node.name, operator=True))
        candidates = in_sync(own.info())
        if not candidates:
            raise NodeError(f"{node.name} is the master and no replica is in sync with it, so nobody can take over. Nothing was changed.")
        leader, sentinel = last_sentinel(node, stack)
        wait_moment(sentinel)
        began = time.monotonic()
        own.call("CLIENT", "PAUSE", HOLD_SECONDS * 1000, "WRITE")
        try:
            written = int(own.info()["master_repl_offset"])
            until(SYNC_SECONDS, "sending the last writes", lambda: all(offset(node, each) >= written for each in candidates))
            sentinel.call("SENTINEL", "FAILOVER", MASTER)
        except BaseException:
            own.call("CLIENT", "UNPAUSE")
            raise
        new = until(TAKE_OVER_SECONDS, "the election of a new master", lambda: new_master(node, candidates))
    with node.server(node.name, operator=True) as own:  # Sentinel disconnects everybody from a node that it tells whom to follow
        own.call("REPLICAOF", new, node.port)
        own.call("CONFIG", "REWRITE")
        until(TAKE_OVER_SECONDS, f"the start of replication from {new}", lambda: in_sync(info_of(node, new)))
        asked = [each for each in [node.name, *candidates] if each != leader]
        until(TAKE_OVER_SECONDS, f"the Sentinels' agreement on {new}", lambda: agreed(node, asked, new))
    with node.server(node.name, operator=True) as own:
        own.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        own.call("CLIENT", "KILL", "TYPE", "pubsub")
        own.call("CLIENT", "UNPAUSE")
    return time.monotonic() - began


def last_sentinel(node: Node, stack: contextlib.ExitStack) -> tuple[str, Connection]:
    """Connect to the last Sentinel that answers. The one that leads names the new master last: it should be the last that clients ask."""
    for member in reversed(node.members):
        with contextlib.suppress(OSError):
            return member, stack.enter_context(node.sentinel(member))
    raise NodeError("no Sentinel answers, so nobody can take over. Nothing was changed.")


def wait_moment(sentinel: Connection) -> None:
    """Wait for the moment at which a failover takes least.

    The leading Sentinel learns of a promotion when it next asks the replica: every ten seconds, during a failover a second after it
    last did. A promotion takes a third of a second; so the best moment is shortly after it has asked.
    """
    limit = time.monotonic() + ASKS_SECONDS
    while time.monotonic() < limit:
        replicas = [pairs(each) for each in sentinel.call("SENTINEL", "REPLICAS", MASTER)]
        heir = min(replicas, key=lambda each: int(each["slave-priority"]), default=None)
        if heir is None or 200 <= int(heir["info-refresh"]) <= 500:
            return
        time.sleep(0.1)


def info_of(node: Node, member: str) -> dict[str, str]:
    """Return a member's INFO, nothing when it gives none."""
    try:
        with node.server(member) as server:
            return server.info()
    except (OSError, NodeError):
        return {}


def offset(node: Node, member: str) -> int:
    """Return how far a replica has come."""
    return int(info_of(node, member).get("slave_repl_offset", "0"))


def new_master(node: Node, candidates: list[str]) -> str:
    """Return the replica that has become master, if one has."""
    return next((name for name in candidates if info_of(node, name).get("role") == "master"), "")


def agreed(node: Node, members: list[str], master: str) -> bool:
    """Say whether these members' Sentinels all name this master."""
    try:
        return all(watched(node, member).get("ip") == master for member in members)
    except (OSError, NodeError):
        return False


def watches(node: Node) -> bool:
    """Say whether this node's Sentinel answers."""
    try:
        return bool(watched(node, node.name))
    except (OSError, NodeError):
        return False


def watched(node: Node, member: str) -> dict[str, str]:
    """Return what a member's Sentinel says about the master."""
    with node.sentinel(member) as sentinel:
        return pairs(sentinel.call("SENTINEL", "MASTER", MASTER))


def systemctl_restart(unit: str) -> None:
    """Restart a unit."""
    done = subprocess.run(["systemctl", "restart", unit], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NodeError(f"{unit} does not start: {done.stderr.strip()}. Look at: journalctl -u {unit}")


def own_role(node: Node) -> str:
    """Return whether this node is master or slave, empty when it does not answer."""
    try:
        with node.server(node.name, operator=True) as server:
            return str(server.call("ROLE")[0])
    except (OSError, NodeError):
        return ""


def restart(node: Node, params: Mapping[str, Any], *, check_mode: bool) -> dict[str, Any]:
    """Restart what is asked for, as far as this pass goes."""
    role = own_role(node)
    keep = role == "master" and bool(node.others) and not params["master"]
    asked = [unit for unit in params["units"] if node.others or unit != SENTINEL]
    left = [unit for unit in asked if unit == SERVER and keep]
    units = [unit for unit in asked if unit not in left]
    result: dict[str, Any] = {"changed": bool(units), "left": left}
    if not units or check_mode:
        return result
    if SENTINEL in units:
        # Nothing is asked before: it takes a second in which the others watch on, and with a new password they would not answer
        systemctl_restart(SENTINEL)
        until(ANSWER_SECONDS * 3, "the start of Sentinel", lambda: watches(node))
    if SERVER in units:
        seconds = params["timeout_seconds"]
        if node.others:  # the one that was restarted before this may just be coming up
            wait_redundant(node, seconds, without="" if role == "master" else node.name)
        if role == "master" and node.others:
            result["pause_seconds"] = round(step_down(node), 2)
            wait_redundant(node, seconds)
        systemctl_restart(SERVER)
        wait_redundant(node, seconds)
    return result


def run(params: Mapping[str, Any], *, check_mode: bool) -> dict[str, Any]:
    """Do the work of the module."""
    if not NODE.exists():
        if check_mode:
            return {"changed": False, "msg": "Redis is not installed here yet", "master": "", "left": []}
        raise NodeError(f"{NODE} is not on this host: apply the role redis first")
    node = Node(**json.loads(NODE.read_text(encoding="utf-8")))
    result: dict[str, Any] = {"changed": False, "left": []}
    if params["action"] == "wait_redundant" and not check_mode:
        wait_redundant(node, params["timeout_seconds"])
    elif params["action"] == "restart":
        result |= restart(node, params, check_mode=check_mode)
    elif params["action"] == "step_down" and node.others and own_role(node) == "master":
        result["changed"] = True
        if not check_mode:
            result["pause_seconds"] = round(step_down(node), 2)
    return {**result, "master": look(node).master}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    try:
        module.exit_json(**run(module.params, check_mode=module.check_mode))
    except (NodeError, OSError) as error:
        module.fail_json(msg=f"Redis: {error}")


if __name__ == "__main__":
    main()

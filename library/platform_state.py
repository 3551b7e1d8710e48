#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Read what a host knows of the platform, in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: platform_state
short_description: Read what a host knows of the platform, in one call
description:
  - Asks the parts that run on this host how they are, side by side and each within O(timeout_seconds), and returns what they say. The
    filter C(status_report) makes a screen of the answers of all hosts.
  - Reads only. A part that does not answer is a result as well (C(error) in its place), never a failure of the task.
options:
  current:
    description: The link that points at the current release; left out on hosts without a process of the application.
    type: path
  ca_file:
    description: CA of the platform's certificates.
    type: path
    required: true
  etcd_metrics_port:
    description: Port on loopback where this host's etcd tells its metrics; left out on hosts without etcd.
    type: int
  patroni:
    description: Cluster to the address C(host:port) of this member's REST API.
    type: dict
    default: {}
  redis:
    description: Address C(host:port) of this host's Redis; left out on hosts without it.
    type: str
  sentinel:
    description: Address C(host:port) of this host's Sentinel; left out where none runs.
    type: str
  redis_password:
    description: Password of Redis's user C(health), who may ask for C(ROLE).
    type: str
  sentinel_password:
    description: Password of the Sentinels' user C(sentinel), who may ask them for the master's address.
    type: str
  proxy:
    description: Whether this host is a proxy, which has drained hosts, shows users a page or not, and may hold the platform's address.
    type: bool
    default: false
  timeout_seconds:
    description: How long to wait for each part. Short, because somebody looks at an empty screen meanwhile.
    type: int
    default: 4
author:
  - Evenkeel contributors (@evenkeel)
attributes:
  check_mode:
    support: full
    description: Reads in any mode.
"""

EXAMPLES = r"""
- name: Read the state of this host
  platform_state:
    ca_file: /etc/evenkeel/pki/ca.crt
    current: /opt/shop/current
    patroni: {core: "10.0.0.11:8008"}
  register: platform_state
"""

RETURN = r"""
state:
  description: What was asked for, by part; a part that did not answer has C(error).
  returned: always
  type: dict
  sample:
    health: [{name: postgresql-core, status: healthy, since: 1795322964.2, message: accepting connections}]
    failures: {shop-prune.service: "2026-11-22T03:30:04+0000 shop-prune.service has failed"}
    release: 1.4.0-0f3c2a9
    etcd: {leader: true, has_leader: true}
    patroni: {core: {own: {role: primary, timeline: 1}, cluster: {members: []}}}
    redis: {role: master, offset: 118, replicas: [{name: redis-2, offset: 118}]}
    sentinel: {master: redis-1}
    addresses: [10.0.0.61, 10.0.0.10]
    drained: [{host: web-1, reason: kernel update, by: anna, since: "2026-11-22T03:30:04Z"}]
    page: {reason: new hall, by: anna, since: "2026-11-22T03:30:04Z"}
"""

import json
import os
import ssl
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

from ansible.module_utils.basic import AnsibleModule

FAILURES = Path("/var/lib/evenkeel/failures")
PATRONI = {"own": "patroni", "cluster": "cluster"}  # what this member believes of itself, and what etcd says of all
MASTER = "main"  # the name under which the Sentinels know the master


class Unanswered(Exception):
    """A part did not answer; the message says how."""


def run(argv: list[str], timeout: float, environment: dict[str, str] | None = None) -> str:
    """The standard output of a command that must end in time."""
    everything = {**os.environ, **(environment or {})}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL, env=everything)
    except subprocess.TimeoutExpired:
        raise Unanswered(f"no answer within {timeout:.0f} s") from None
    except OSError as error:
        raise Unanswered(f"{argv[0]}: {error.strerror}") from None
    if done.returncode and not done.stdout.strip():
        raise Unanswered((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout


def get(url: str, timeout: float, ca_file: str | None = None) -> str:
    """The body of an answer, whatever its status."""
    handlers: list[Any] = [ProxyHandler({})]
    if ca_file:
        handlers.append(HTTPSHandler(context=ssl.create_default_context(cafile=ca_file)))
    try:
        with build_opener(*handlers).open(Request(url), timeout=timeout) as answer:
            return str(answer.read().decode())
    except HTTPError as error:
        return error.read().decode()
    except OSError as error:
        raise Unanswered(f"{url}: {getattr(error, 'reason', None) or error}") from None


def parsed(text: str) -> Any:
    """The answer, which is JSON unless it is a complaint."""
    try:
        return json.loads(text)
    except ValueError:
        raise Unanswered(text.strip()[:200] or "an empty answer") from None


def etcd_state(metrics: str) -> dict[str, Any]:
    """What a voter's metrics say: whether it leads, and whether it knows a leader, that is, belongs to a majority."""
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line and not line.startswith("#") and " " in line)
    if "etcd_server_has_leader" not in values:
        raise Unanswered("its metrics do not say whether it has a leader")
    return {"leader": float(values.get("etcd_server_is_leader", 0)) == 1, "has_leader": float(values["etcd_server_has_leader"]) == 1}


def redis_state(role: list[Any]) -> dict[str, Any]:
    """What ROLE says, by name."""
    if role[0] == "master":
        replicas = [{"name": name, "offset": int(offset)} for name, _port, offset in role[2]]
        return {"role": "master", "offset": int(role[1]), "replicas": replicas}
    if role[0] == "slave":
        return {"role": "replica", "master": role[1], "link": role[3], "offset": int(role[4])}
    raise Unanswered(f"it is neither master nor replica: {role[0]}")


def failures() -> dict[str, str]:
    """The units that have failed for good, with the line that tells the operator."""
    return {path.name: path.read_text(encoding="utf-8").strip() for path in sorted(FAILURES.glob("[!.]*"))}


def questions(params: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Part to the function that asks it."""
    timeout = params["timeout_seconds"]

    def redis(address: str, user: str, password: str | None, *command: str) -> Any:
        host, _, port = address.rpartition(":")
        argv = ["redis-cli", "--json", "--tls", "--cacert", params["ca_file"], "-h", host, "-p", port, "--user", user, *command]
        return parsed(run(argv, timeout, {"REDISCLI_AUTH": password or ""}))

    def sentinel(address: str) -> dict[str, Any]:
        found = redis(address, "sentinel", params["sentinel_password"], "SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)
        return {"master": found[0] if found else ""}

    def patroni(address: str) -> dict[str, Any]:
        return {part: parsed(get(f"https://{address}/{path}", timeout, params["ca_file"])) for part, path in PATRONI.items()}

    def addresses() -> list[str]:
        links = parsed(run(["ip", "-json", "address"], timeout))
        return [entry["local"] for link in links for entry in link.get("addr_info", []) if entry.get("scope") == "global"]

    asked: dict[str, Callable[[], Any]] = {
        "health": lambda: parsed(run(["evenkeel-health", "status", "--json"], timeout)),
        "failures": failures,
    }
    if params["current"]:
        asked["release"] = lambda: Path(params["current"]).readlink().name
    if params["etcd_metrics_port"]:
        asked["etcd"] = lambda: etcd_state(get(f"http://127.0.0.1:{params['etcd_metrics_port']}/metrics", timeout))
    for cluster, address in params["patroni"].items():
        asked[f"patroni {cluster}"] = lambda address=address: patroni(address)  # type: ignore[misc]
    if params["redis"]:
        asked["redis"] = lambda: redis_state(redis(params["redis"], "health", params["redis_password"], "ROLE"))
    if params["sentinel"]:
        asked["sentinel"] = lambda: sentinel(params["sentinel"])
    if params["proxy"]:
        asked["addresses"] = addresses
        asked["drained"] = lambda: parsed(run(["evenkeel-drain", "list", "--json"], timeout))
        asked["page"] = lambda: parsed(run(["evenkeel-page", "status", "--json"], timeout))
    return asked


def answer(ask: Callable[[], Any]) -> Any:
    """What a part says, or why it says nothing."""
    try:
        return ask()
    except Unanswered as error:
        return {"error": str(error)}
    except (OSError, LookupError, TypeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def read(params: dict[str, Any]) -> dict[str, Any]:
    """Ask all parts at once."""
    asked = questions(params)
    with ThreadPoolExecutor(max_workers=len(asked)) as pool:
        state = dict(zip(asked, pool.map(answer, asked.values()), strict=True))
    state["patroni"] = {cluster: state.pop(f"patroni {cluster}") for cluster in params["patroni"]}
    return state


def main() -> None:
    """Read and tell."""
    module = AnsibleModule(
        argument_spec={
            "current": {"type": "path"},
            "ca_file": {"type": "path", "required": True},
            "etcd_metrics_port": {"type": "int"},
            "patroni": {"type": "dict", "default": {}},
            "redis": {"type": "str"},
            "sentinel": {"type": "str"},
            "redis_password": {"type": "str", "no_log": True},
            "sentinel_password": {"type": "str", "no_log": True},
            "proxy": {"type": "bool", "default": False},
            "timeout_seconds": {"type": "int", "default": 4},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, state=read(module.params))


if __name__ == "__main__":
    main()

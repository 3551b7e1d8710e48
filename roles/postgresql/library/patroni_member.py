#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Restart a member of a Patroni cluster without harm to the cluster, or have it give the lead away."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: patroni_member
short_description: Restart this member of a Patroni cluster when the others can do without it
description:
  - Runs on the member itself. Give tasks that use it C(throttle=1), so that members follow one another.
  - A primary with other members never restarts as one. It first switches over to its synchronous standby, which loses no commit and costs
    clients about two seconds of writing, and stays a standby afterwards. A cluster of one member restarts in place.
  - Nothing is restarted or switched over while another member is missing. A member that is missing itself may be restarted.
options:
  action:
    description:
      - V(restart) restarts Patroni and its PostgreSQL and waits until the cluster is whole again.
      - V(restart_if_needed) does the same when O(due), or when a setting of PostgreSQL waits for a restart.
      - V(step_down) makes a primary hand over to its synchronous standby. On a standby, and in a cluster of one, it does nothing.
      - V(wait_redundant) waits until every member takes part and one of them is a synchronous standby.
    type: str
    required: true
    choices: [restart, restart_if_needed, step_down, wait_redundant]
  phase:
    description:
      - With V(restart_if_needed). In phase V(standbys) the primary is left alone, with one exception. A standby cannot run with a lower
        value of C(max_connections) and its like than the primary has, so when such a value was lowered the primary restarts in place first.
      - In phase V(rest) whoever still needs it restarts. Run it after the phase V(standbys) has been run on all members.
    type: str
    choices: [standbys, rest]
    default: rest
  due:
    description: Whether Patroni itself needs a restart, for its unit or its program has changed.
    type: bool
    default: false
  api:
    description: How to reach this member's REST API.
    type: dict
    required: true
    suboptions:
      url:
        description: Base URL.
        type: str
        required: true
      user:
        description: User for what changes something.
        type: str
        default: patroni
      password:
        description: Password for what changes something.
        type: str
        required: true
      ca_file:
        description: CA of the API's certificate.
        type: path
        required: true
      certificate_file:
        description: Certificate to show.
        type: path
        required: true
      key_file:
        description: Its key.
        type: path
        required: true
  name:
    description: This member.
    type: str
    required: true
  members:
    description: All members that the cluster shall have.
    type: list
    elements: str
    required: true
  unit:
    description: The unit that runs Patroni.
    type: str
    required: true
  synchronous:
    description: Whether a whole cluster has a synchronous standby.
    type: bool
    default: true
  timeout_seconds:
    description: How long each wait may take.
    type: int
    default: 120
author:
  - Evenkeel contributors (@evenkeel)
attributes:
  check_mode:
    support: full
    description: Says whether it would restart or switch over. When Patroni does not answer there is nothing to say.
"""

EXAMPLES = r"""
- name: Hand over before maintenance of this host
  patroni_member:
    action: step_down
    api: "{{ __postgresql_api }}"
    name: db1
    members: [db1, db2]
    unit: patroni@core.service
  throttle: 1
"""

RETURN = r"""
restarted:
  description: Whether this member was restarted.
  returned: always
  type: bool
primary:
  description: Name of the primary, as it was in the end.
  returned: when the cluster answers
  type: str
reasons:
  description: Why this member restarts.
  returned: always
  type: list
  elements: str
"""

import subprocess
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_patroni import (
    API_OPTIONS,
    Cluster,
    ClusterError,
    Rest,
    parse_cluster,
    pending_of,
    refusal,
    shortcomings,
    wait_for,
)

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "action": {"type": "str", "required": True, "choices": ["restart", "restart_if_needed", "step_down", "wait_redundant"]},
    "phase": {"type": "str", "choices": ["standbys", "rest"], "default": "rest"},
    "due": {"type": "bool", "default": False},
    "api": {"type": "dict", "required": True, "options": API_OPTIONS},
    "name": {"type": "str", "required": True},
    "members": {"type": "list", "elements": "str", "required": True},
    "unit": {"type": "str", "required": True},
    "synchronous": {"type": "bool", "default": True},
    "timeout_seconds": {"type": "int", "default": 120},
}
SUCCESSOR_SECONDS = 20  # a standby that has just come back becomes synchronous within some rounds of Patroni
SWITCHOVER_SECONDS = 60  # Patroni answers within 20, when it knows how it ended


class Run:
    """One call of the module."""

    def __init__(self, module: AnsibleModule) -> None:
        params = module.params
        self.module = module
        self.rest = Rest(params["api"])
        self.name: str = params["name"]
        self.expected: list[str] = params["members"]
        self.alone = len(self.expected) == 1
        self.seconds: int = params["timeout_seconds"]
        self.changed = False
        self.restarted = False
        self.reasons: list[str] = []

    def cluster(self) -> Cluster:
        """Ask this member about the cluster."""
        cluster: Cluster = parse_cluster(self.rest.ask("/cluster"))
        return cluster

    def leads(self, cluster: Cluster) -> bool:
        """Whether this member is the primary."""
        return cluster.leader is not None and cluster.leader.name == self.name

    def lacks(self, expected: list[str], *, synchronous: bool) -> list[str]:
        """Say what a cluster of these members lacks."""
        cluster = self.cluster()
        leader = cluster.leader
        replication = self.rest.ask("/patroni", leader.url).get("replication") or [] if leader and len(expected) > 1 else []
        missing: list[str] = shortcomings(cluster, expected, replication, synchronous=synchronous)
        return missing

    def wait_redundant(self, before: str = "") -> None:
        """Wait until the cluster is whole. `before` is what has happened so far, for the message."""
        synchronous = self.module.params["synchronous"]
        missing = [] if self.module.check_mode else wait_for(self.seconds, lambda: self.lacks(self.expected, synchronous=synchronous))
        if missing:
            raise ClusterError(
                f"{before}the cluster of {', '.join(self.expected)} was not whole after {self.seconds} s: {', '.join(missing)}. "
                "Look at `patronictl list` here, and at `journalctl -u 'patroni@*' -n 50` on the member that is named."
            )

    def step_down(self) -> None:
        """Hand over to the synchronous standby, if this is the primary."""
        cluster = self.cluster()
        if self.alone or not self.leads(cluster):
            return
        wait_for(0 if self.module.check_mode else SUCCESSOR_SECONDS, lambda: [] if self.cluster().successor else ["no successor"])
        cluster = self.cluster()
        if cluster.successor is None:
            raise ClusterError(refusal(cluster, self.name, self.expected))
        self.changed = True
        if self.module.check_mode:
            return
        order = {"leader": self.name, "candidate": cluster.successor.name}
        self.rest.order("POST", "/switchover", order, seconds=SWITCHOVER_SECONDS)
        self.wait_redundant(f"{self.name} has handed over to {cluster.successor.name}, but ")

    def restart(self) -> None:
        """Restart this member, as a standby where there are others."""
        cluster = self.cluster()
        if cluster.paused:
            raise ClusterError(
                f"cluster {cluster.name} is paused: Patroni would leave PostgreSQL running, and systemd would kill it. "
                f"Nothing was restarted. First: patronictl resume {cluster.name}"
            )
        self.changed = self.restarted = True
        if self.module.check_mode:
            return
        if self.leads(cluster):
            self.step_down()
        elif not self.alone:
            others = [name for name in self.expected if name != self.name]
            missing = wait_for(self.seconds, lambda: self.lacks(others, synchronous=False))
            if missing:
                raise ClusterError(f"{self.name} was not restarted, because others are missing: {', '.join(missing)}")
        unit = self.module.params["unit"]
        command = ["systemctl", "--no-ask-password", "restart", "--", unit]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.seconds, check=False)
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{unit} did not restart within {self.seconds} s. See `journalctl -u {unit} -n 50`.") from None
        if done.returncode:
            raise ClusterError(f"{unit} did not restart: {done.stderr.strip()[-300:]}. See `journalctl -u {unit} -n 50`.")
        self.wait_redundant(f"{self.name} was restarted, but ")

    def restart_if_needed(self, phase: str) -> None:
        """Restart this member when it needs it and its turn has come."""
        cluster = self.cluster()
        if phase == "standbys":
            self.lower(cluster)
            if self.leads(cluster):
                return
        pending = pending_of(self.rest.ask("/patroni"))
        self.reasons = [*(["Patroni's unit or program"] if self.module.params["due"] else []), *pending]
        if not self.reasons:
            return
        if cluster.paused:
            self.module.warn(
                f"{', '.join(self.reasons)}: {self.name} needs a restart for these, but cluster {cluster.name} is paused. "
                f"After `patronictl resume {cluster.name}` the next run makes it."
            )
            return
        self.restart()

    def lower(self, cluster: Cluster) -> None:
        """Have the primary restarted in place when a setting was lowered that it must lower first."""
        leader = cluster.leader
        if leader is None or not leader.lowered or cluster.paused:
            return
        self.changed = True
        if self.module.check_mode:
            return
        self.wait_redundant("nothing was restarted: ")
        self.rest.order("POST", "/restart", {"timeout": self.seconds}, leader.url, seconds=self.seconds + 10)
        self.wait_redundant(f"PostgreSQL on {leader.name} was restarted, but ")

    def primary(self) -> str | None:
        """Name the primary."""
        leader = self.cluster().leader
        return leader.name if leader else None


def work(module: AnsibleModule) -> dict[str, Any]:
    """Do the work of the module."""
    action = module.params["action"]
    run = Run(module)
    try:
        if action == "restart_if_needed":
            run.restart_if_needed(module.params["phase"])
        else:
            {"restart": run.restart, "step_down": run.step_down, "wait_redundant": run.wait_redundant}[action]()
        primary = run.primary()
    except OSError as error:
        silence = f"Patroni at {run.rest.url} gives no answer ({getattr(error, 'reason', error)})"
        if module.check_mode:
            return {"changed": False, "restarted": False, "reasons": [], "msg": silence}
        raise ClusterError(f"{silence}. See `systemctl status {module.params['unit']}`.") from None
    return {"changed": run.changed, "restarted": run.restarted, "primary": primary, "reasons": run.reasons}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    try:
        module.exit_json(**work(module))
    except (ClusterError, OSError) as error:
        module.fail_json(msg=f"PostgreSQL: {error}")


if __name__ == "__main__":
    main()

#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Host side of the `platform_lock` module."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: platform_lock
short_description: Take or give back the platform's lock on this host
description:
  - One deploy, rollback or acting runbook works on a platform at a time. The lock is a file on the hosts of the ledger.
  - The controller adds who takes it, and which process. A later run of the same controller can tell whether that process still runs.
    When it does not, and the person is the same, its lock is taken over without being asked.
  - A lock that is held by somebody else is no failure of the module, but told in RV(refused).
options:
  state:
    description: What is wanted. V(released) gives back the lock O(id) only.
    type: str
    choices: [read, held, released]
    default: read
  id:
    description: Names the lock of this run, on all hosts the same.
    type: str
  run:
    description: Name of the run.
    type: str
  purpose:
    description: What it does, for whoever finds the lock.
    type: str
  hours:
    description: After this time a lock is said to have expired. It is still there.
    type: float
    default: 4
  take_over:
    description: The id of somebody else's lock that a person has decided to take over. Refused while its process runs on this controller.
    type: str
    default: ""
  path:
    description: The file.
    type: path
    default: /var/lib/evenkeel/lock.json
author:
  - Evenkeel contributors (@evenkeel)
attributes:
  check_mode:
    support: full
    description: Takes and gives back nothing; a foreign lock is told in RV(note).
"""

EXAMPLES = r"""
- name: Take the lock
  platform_lock:
    state: held
    id: 5a1e90c2
    run: deploy-20261122-234151-1f3a
    purpose: deploy of release 1.4.0-0af1
  register: lock
  failed_when: lock.refused != ''
"""

RETURN = r"""
lock: {description: "The lock now: id, run, purpose, who, process, since, expires; empty when it is free.", type: dict, returned: success}
taken: {description: Whether this call took it., type: bool, returned: "when O(state=held)"}
refused: {description: "Why it was not taken, and what to type; else empty.", type: str, returned: "when O(state=held)"}
resumed: {description: "Run and purpose of the lock that was taken over; else empty.", type: dict, returned: "when O(state=held)"}
note: {description: "What a person should know; else empty.", type: str, returned: success}
who: {description: "The person and the controller, as user@controller.", type: str, returned: success}
"""

from datetime import UTC, datetime
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_lock import LockError, hold, read, release

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "state": {"choices": ["read", "held", "released"], "default": "read"},
    "id": {"type": "str"},
    "run": {"type": "str"},
    "purpose": {"type": "str"},
    "owner": {"type": "dict"},  # of the controller: who, process
    "hours": {"type": "float", "default": 4},
    "take_over": {"type": "str", "default": ""},
    "path": {"type": "path", "default": "/var/lib/evenkeel/lock.json"},
}


def work(params: dict[str, Any], *, check_mode: bool) -> dict[str, Any]:
    """The lock afterwards, and the time on this host."""
    now = datetime.now(UTC)
    if params["state"] == "read" or check_mode:
        before = after = read(params["path"])
    elif params["state"] == "held":
        wanted = {"id": params["id"], "run": params["run"], "purpose": params["purpose"], **params["owner"]}
        before, after = hold(params["path"], wanted, params["hours"], params["take_over"], now)
    else:
        before, after = release(params["path"], params["id"])
    return {"changed": before != after, "lock": after, "now": now.isoformat()}


def main() -> None:
    """Read, take or give back."""
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        required_if=[("state", "held", ("id", "run", "purpose", "owner")), ("state", "released", ("id",))],
        supports_check_mode=True,
    )
    try:
        module.exit_json(**work(module.params, check_mode=module.check_mode))
    except (LockError, OSError) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()

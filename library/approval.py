#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Verify a second person's signature under an approval, on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: approval
short_description: Verify a second person's signature under an approval, on the controller
description:
  - Verifies a signature of C(ssh-keygen -Y sign -n evenkeel-approval). One that is not good is no failure, but in RV(problem).
options:
  statement:
    description: The text that was signed.
    required: true
    type: str
  signature:
    description: File with the signature.
    required: true
    type: path
  signers:
    description: Who may approve, as lines of an allowed_signers file (C(ann@example.org ssh-ed25519 AAAA…)).
    required: true
    type: list
    elements: str
  deployer:
    description: Who deploys, as C(user@controller). An approver of the same name, up to the C(@), is refused. Empty lets everybody approve.
    type: str
    default: ""
attributes:
  check_mode:
    support: full
    description: It is a read.
author: Evenkeel contributors (@evenkeel)
"""

EXAMPLES = r"""
- name: Verify the second person's signature
  approval:
    statement: "{{ plan | approval_statement }}"
    signature: approval.sig
    signers: ["ann@example.org ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA…"]
    deployer: bob@controller
  delegate_to: localhost
  register: signed
"""

RETURN = r"""
by: {description: Who signed; empty unless the signature is good., type: str, returned: always}
problem: {description: What is wrong with it in one sentence; empty when nothing is., type: str, returned: always}
"""

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_approval import ApprovalError, examine


def main() -> None:
    """Examine it."""
    module = AnsibleModule(
        argument_spec={
            "statement": {"required": True},
            "signature": {"type": "path", "required": True},
            "signers": {"type": "list", "elements": "str", "required": True},
            "deployer": {"default": ""},
        },
        supports_check_mode=True,
    )
    given = module.params
    try:
        by, problem = examine(given["statement"], Path(os.path.abspath(given["signature"])), given["signers"], given["deployer"])
    except (ApprovalError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, by=by, problem=problem)


if __name__ == "__main__":
    main()

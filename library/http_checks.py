#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Ask the checks of the app contract at one address, in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: http_checks
short_description: Ask the checks of the app contract at one address, in one call
description:
  - Sends each request, follows no redirect, and judges status and content. Those that fail are asked again.
  - What is wrong is returned, not raised, because the caller can say what it means. Tokens are in no message.
options:
  url:
    description: Where to ask, without a slash at its end.
    required: true
    type: str
  checks:
    description: "The checks: name, path, and optionally method, status, contains (a list), token (sent as a bearer token)."
    required: true
    type: list
    elements: dict
    suboptions:
      name: {description: What it is called in messages., required: true, type: str}
      path: {description: Path and query., required: true, type: str}
      method: {description: HTTP method., default: GET, type: str}
      status: {description: The status that it should have., default: 200, type: int}
      contains: {description: Texts that the answer should contain., default: [], type: list, elements: str}
      token: {description: A bearer token., default: "", type: str}
  headers:
    description: Headers of every request.
    default: {}
    type: dict
  ca_file:
    description: Whom to trust over TLS; the system's authorities when it is empty.
    default: ""
    type: str
  tries:
    description: How often a check that fails is asked in all.
    default: 6
    type: int
  pause_seconds:
    description: Between two tries.
    default: 5
    type: float
  timeout_seconds:
    description: Of one request.
    default: 30
    type: float
author: Evenkeel contributors
attributes:
  check_mode:
    support: full
    description: It asks in check mode, too.
"""

EXAMPLES = r"""
- name: Ask what users ask
  http_checks:
    url: https://shop.example.org
    checks:
      - {name: front page, path: /, contains: [Welcome]}
  register: asked
"""

RETURN = r"""
wrong: {description: A sentence for each check whose answer is not as it should be., type: list, returned: always}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_http import run


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"required": True},
            "checks": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"required": True},
                    "path": {"required": True},
                    "method": {"default": "GET"},
                    "status": {"type": "int", "default": 200},
                    "contains": {"type": "list", "elements": "str", "default": []},
                    "token": {"default": "", "no_log": True},
                },
            },
            "headers": {"type": "dict", "default": {}, "no_log": True},
            "ca_file": {"default": ""},
            "tries": {"type": "int", "default": 6},
            "pause_seconds": {"type": "float", "default": 5},
            "timeout_seconds": {"type": "float", "default": 30},
        },
        supports_check_mode=True,
    )
    given = module.params
    places = (given["url"], given["checks"], given["headers"], given["ca_file"])
    module.exit_json(changed=False, wrong=run(*places, given["tries"], given["pause_seconds"], given["timeout_seconds"]))


if __name__ == "__main__":
    main()

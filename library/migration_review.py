#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Let squawk look at the SQL of migrations, on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: migration_review
short_description: Let squawk look at the SQL of migrations, on the controller
description:
  - Runs C(squawk) (the controller's Python package C(squawk-cli)) on each migration, and returns what it finds. Changes nothing.
  - What the suite does itself is not asked for again. It sets lock and statement time-outs, and a migration runs once, so that it need not
    be robust against running twice.
options:
  migrations:
    description: The C(pending) entries of a migration plan (C(database), C(app), C(name), C(sql), C(atomic)).
    required: true
    type: list
    elements: dict
  postgresql_version:
    description: Major version of the servers.
    type: str
    default: "15"
attributes:
  check_mode:
    support: full
    description: It is a read.
author: Evenkeel contributors (@evenkeel)
"""

EXAMPLES = r"""
- name: Review the SQL of the plan
  migration_review:
    migrations: "{{ plan.pending }}"
  delegate_to: localhost
  register: reviewed
"""

RETURN = r"""
findings:
  description: What was found, each C({migration, rule, level, message, line}). C(migration) is C(database app.name), C(line) in its SQL.
  type: list
  elements: dict
  returned: always
"""

import os
import shutil
import subprocess
import sys
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_review import SQUAWK_OPTIONS, ReviewError, read_findings, sql_to_review

SECONDS = 60


def find_squawk() -> str:
    """The program: beside this Python, or on PATH."""
    beside = os.path.join(os.path.dirname(sys.executable), "squawk")
    found = beside if os.access(beside, os.X_OK) else shutil.which("squawk")
    if not found:
        raise ReviewError("squawk is not installed on the controller: type `make setup` (or pip install squawk-cli), then this again")
    return found


def review(squawk: str, migration: dict[str, Any], version: str) -> list[dict[str, Any]]:
    """What squawk says of one migration."""
    sql = sql_to_review(migration)
    if not sql:
        return []
    name = f"{migration['database']} {migration['app']}.{migration['name']}"
    command = [squawk, *SQUAWK_OPTIONS, "--pg-version", version, "--stdin-filepath", "migration.sql"]
    command += ["--assume-in-transaction"] if migration.get("atomic", True) else []
    # a folder without a .squawk.toml of somebody else's
    done = subprocess.run(command, input=sql, capture_output=True, text=True, timeout=SECONDS, check=False, cwd="/")
    return list(read_findings(name, done.returncode, done.stdout, done.stderr))


def main() -> None:
    """Review them all."""
    module = AnsibleModule(
        argument_spec={
            "migrations": {"type": "list", "elements": "dict", "required": True},
            "postgresql_version": {"default": "15"},
        },
        supports_check_mode=True,
    )
    try:
        squawk = find_squawk() if module.params["migrations"] else ""
        findings = [each for one in module.params["migrations"] for each in review(squawk, one, module.params["postgresql_version"])]
    except (ReviewError, OSError, subprocess.TimeoutExpired) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, findings=findings)


if __name__ == "__main__":
    main()

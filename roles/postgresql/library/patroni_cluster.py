#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Bring what the members of a Patroni cluster share in line with the inventory, and say what this member is."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: patroni_cluster
short_description: Wait for a Patroni cluster, apply its shared settings, say what differs on the primary
description:
  - One call that waits until the cluster has a primary and this member runs, compares the shared settings with O(settings) and changes
    what differs through Patroni's REST API, and, on the primary only, compares the passwords of roles and the owners of databases.
  - It changes nothing that Patroni decides (who is primary, pause, slots, standby cluster) and no setting outside O(settings), except
    PostgreSQL parameters, of which O(settings) is the whole list.
options:
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
  settings:
    description: Shared settings, as in Patroni's C(bootstrap.dcs).
    type: dict
    required: true
  port:
    description: Port of PostgreSQL, for its local socket.
    type: int
    required: true
  roles:
    description: Roles and the passwords that they shall have, each with C(name) and C(password).
    type: list
    elements: dict
    default: []
  databases:
    description: Databases and their owners, each with C(name) and C(owner).
    type: list
    elements: dict
    default: []
  reloaded:
    description: Whether Patroni was told just now to read its configuration again. The module then waits until that is done everywhere.
    type: bool
    default: false
  timeout_seconds:
    description: How long to wait for the cluster.
    type: int
    default: 120
author:
  - Evenkeel contributors (@evenkeel)
attributes:
  check_mode:
    support: full
    description: Compares. When Patroni does not answer, for it may not be installed yet, there is nothing to compare.
  diff_mode:
    support: full
    description: The shared settings before and after.
"""

EXAMPLES = r"""
- name: Bring the shared settings in line
  patroni_cluster:
    api:
      url: https://db1:8008
      password: "{{ postgresql_rest_password }}"
      ca_file: /etc/evenkeel/pki/ca.crt
      certificate_file: /etc/evenkeel/pki/host.crt
      key_file: /etc/evenkeel/pki/host.key
    settings: {ttl: 20, postgresql: {parameters: {max_connections: 200}}}
    port: 5432
  register: __postgresql_state
"""

RETURN = r"""
primary:
  description: Whether this member is the primary.
  returned: always
  type: bool
changed_settings:
  description: Names of the shared settings that were changed.
  returned: always
  type: list
  elements: str
  sample: [postgresql.parameters.work_mem]
pending:
  description: Settings whose new values wait for a restart of this member's PostgreSQL.
  returned: always
  type: list
  elements: str
  sample: [shared_buffers]
roles:
  description: Names of the roles that are missing or have another password. Empty on a standby.
  returned: always
  type: list
  elements: str
databases:
  description: Names of the databases that are missing or have another owner. Empty on a standby.
  returned: always
  type: list
  elements: str
"""

import base64
import hashlib
import hmac
import importlib
import json
import re
import time
import unicodedata
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_patroni import (
    API_OPTIONS,
    POLL_SECONDS,
    ClusterError,
    ConflictError,
    DeniedError,
    Rest,
    parse_cluster,
    pending_of,
    wait_for,
)

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "api": {"type": "dict", "required": True, "options": API_OPTIONS},
    "settings": {"type": "dict", "required": True},
    "port": {"type": "int", "required": True},
    "roles": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "name": {"type": "str", "required": True},
            "password": {"type": "str", "required": True, "no_log": True},
        },
    },
    "databases": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "name": {"type": "str", "required": True},
            "owner": {"type": "str", "required": True},
        },
    },
    "reloaded": {"type": "bool", "default": False},
    "timeout_seconds": {"type": "int", "default": 120},
}
RELOAD_SECONDS = 15
SCRAM = re.compile(r"SCRAM-SHA-256\$(\d+):([^$]+)\$([^:]+):(.+)")


def patch_of(wanted: dict[str, Any], found: dict[str, Any], whole: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what must be sent so that `found` gets all of `wanted`.

    Keys that only `found` has stay, except below the path `whole`, where they are removed (None, as Patroni wants it).
    """
    patch: dict[str, Any] = {}
    for key, value in wanted.items():
        present = found.get(key)
        if isinstance(value, dict):
            inner = patch_of(value, present if isinstance(present, dict) else {}, whole[1:] if whole[:1] == (key,) else ())
            if whole == (key,) and isinstance(present, dict):
                inner.update({name: None for name in present if name not in value})
            if inner:
                patch[key] = inner
        elif present != value or isinstance(present, bool) != isinstance(value, bool):
            patch[key] = value
    return patch


def names_of(patch: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of what a patch changes."""
    found: list[str] = []
    for key, value in patch.items():
        found += names_of(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return sorted(found)


def password_fits(password: str, verifier: str | None) -> bool:
    """Say whether a stored SCRAM verifier is the one of a password."""
    match = SCRAM.fullmatch(verifier or "")
    if not match:
        return False
    rounds, salt, stored = int(match.group(1)), base64.b64decode(match.group(2)), base64.b64decode(match.group(3))
    prepared = password if password.isascii() else unicodedata.normalize("NFKC", password)
    salted = hashlib.pbkdf2_hmac("sha256", prepared.encode(), salt, rounds)
    client = hmac.new(salted, b"Client Key", "sha256").digest()
    return hmac.compare_digest(hashlib.sha256(client).digest(), stored)


def bring_in_line(rest: Rest, settings: dict[str, Any], *, check_mode: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Change the shared settings; return what they were, and the change.

    A new password counts only when Patroni has finished its reload: give it some seconds. When another member was faster, look again.
    """
    limit = time.monotonic() + RELOAD_SECONDS
    while True:
        found = rest.ask("/config")
        patch = patch_of(settings, found, ("postgresql", "parameters"))
        if not patch or check_mode:
            return found, patch
        try:
            rest.order("PATCH", "/config", patch)
            return found, patch
        except (ConflictError, DeniedError):
            if time.monotonic() > limit:
                raise
            time.sleep(POLL_SECONDS)


def wait_ready(rest: Rest, seconds: int) -> None:
    """Wait until this member runs, the cluster has a primary, and etcd has its shared settings.

    A cluster whose state in etcd was removed (after a restore) runs before Patroni has written its settings there again.
    """

    def look() -> list[str]:
        state = str(rest.ask("/patroni").get("state"))
        leader = parse_cluster(rest.ask("/cluster")).leader
        missing = [] if state in ("running", "streaming") else [f"this member is {state}"]
        if not (leader and leader.takes_part):
            missing.append("the cluster has no running primary")
        if not missing:
            rest.ask("/config")
        return missing

    missing = wait_for(seconds, look)
    if missing:
        raise ClusterError(
            f"the cluster was not ready after {seconds} s: {', '.join(missing)}. Look at `journalctl -u 'patroni@*' -n 50` on this "
            "host, and whether etcd is healthy."
        )


def differences(module: AnsibleModule) -> tuple[list[str], list[str]]:
    """Return the roles and the databases that are not as wanted."""
    try:
        psycopg2 = importlib.import_module("psycopg2")  # absent on the controller
    except ImportError:
        raise ClusterError("this host has no python3-psycopg2, which the role installs") from None
    connection = psycopg2.connect(host="/var/run/postgresql", port=module.params["port"], user="postgres", dbname="postgres")
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT rolname, rolpassword, rolcanlogin FROM pg_authid")
            passwords = {name: password for name, password, may_log_in in cursor.fetchall() if may_log_in}
            cursor.execute("SELECT datname, pg_get_userbyid(datdba) FROM pg_database")
            owners = dict(cursor.fetchall())
    finally:
        connection.close()
    roles = [each["name"] for each in module.params["roles"] if not password_fits(each["password"], passwords.get(each["name"]))]
    databases = [each["name"] for each in module.params["databases"] if owners.get(each["name"]) != each["owner"]]
    return roles, databases


def converge(module: AnsibleModule) -> dict[str, Any]:
    """Do the work of the module."""
    params = module.params
    nothing = {"changed": False, "primary": False, "changed_settings": [], "pending": [], "roles": [], "databases": []}
    try:
        rest = Rest(params["api"])
        wait_ready(rest, 0 if module.check_mode else params["timeout_seconds"])
    except (ClusterError, OSError) as error:
        if module.check_mode:
            return {**nothing, "msg": f"not compared: {error}"}
        raise
    found, patch = bring_in_line(rest, params["settings"], check_mode=module.check_mode)
    if (patch or params["reloaded"]) and not module.check_mode:
        time.sleep(int(params["settings"].get("loop_wait", 5)) + 1)  # every member reads it within one round
    member = rest.ask("/patroni")
    primary = member.get("role") in ("primary", "master")
    roles, databases = differences(module) if primary else ([], [])
    result = {
        **nothing,
        "changed": bool(patch),
        "primary": primary,
        "changed_settings": names_of(patch),
        "pending": pending_of(member),
        "roles": roles,
        "databases": databases,
    }
    if patch and module._diff:
        result["diff"] = {"before": _shown(found), "after": _shown(_merged(found, patch))}
    return result


def _merged(found: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    merged = dict(found)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            merged[key] = _merged(merged.get(key) or {}, value)
        else:
            merged[key] = value
    return merged


def _shown(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    try:
        module.exit_json(**converge(module))
    except (ClusterError, OSError) as error:
        module.fail_json(msg=f"PostgreSQL: {error}")


if __name__ == "__main__":
    main()

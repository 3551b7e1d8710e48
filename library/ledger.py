#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""One copy of the ledger: read and verify it, append an entry, take over what another copy has."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: ledger
short_description: Read, verify and append to this host's copy of the ledger
description:
  - The ledger is a file of JSON lines, C(ledger.jsonl). Each holds the hash of the one before it, so that a line that was changed or
    removed is found and named. Format and kinds of entries are in C(docs/reference/ledger.md).
  - It is verified as a whole before anything is added. Writers of one host wait for each other; a line is on the disk before the module
    says so.
  - A last line that a crash tore is kept in a file beside the ledger when the next entry is added. Any other broken place is never
    written behind.
options:
  state:
    description:
      - V(read) verifies and tells.
      - V(appended) adds O(entry).
      - V(copied) adds those of O(entries) that this copy lacks, when they continue it. A copy that differs from them is an error, and
        stays as it is.
    type: str
    choices: [read, appended, copied]
    default: read
  entry:
    description: kind, run, who and the data of the kind. The ledger itself gives seq, at, prev and hash.
    type: dict
  entries:
    description: Entries as RV(entries) of another copy has them.
    type: list
    elements: dict
    default: []
  aside:
    description: With V(copied), when O(entries) do not continue this copy, keep it as C(ledger.jsonl.<time>) and put O(entries), which
      must be a whole ledger then, in its place.
    type: bool
    default: false
  after:
    description: Return only entries with a higher number.
    type: int
    default: 0
  directory:
    description: Where the ledger is.
    type: path
    default: /var/lib/evenkeel/ledger
author:
  - Evenkeel contributors (@evenkeel)
attributes:
  check_mode:
    support: full
    description: Says what would be added.
"""

EXAMPLES = r"""
- name: Read the ledger
  ledger:
  register: copy

- name: Write down that a deploy succeeded
  ledger:
    state: appended
    entry: {kind: deploy, run: deploy-20261122-234151-1f3a, who: alice@controller, release: 1.4.0-0af1, outcome: succeeded}
"""

RETURN = r"""
entries: {description: "The good entries after O(after), up to the first broken place.", type: list, elements: dict, returned: success}
head: {description: "Of the last good entry: seq (0 when there is none), hash and at.", type: dict, returned: success}
problem: {description: "The first broken place in words; empty when nothing is wrong.", type: str, returned: success}
torn: {description: "Whether the last line is torn and all before it is well.", type: bool, returned: success}
entry: {description: The entry that was added., type: dict, returned: "when O(state=appended)"}
added: {description: How many entries were added., type: int, returned: success}
note: {description: "What else was done, in words; else empty.", type: str, returned: success}
"""

from datetime import UTC, datetime
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_ledger import FILE, Ledger, LedgerError, add, joined, locked, made, make, read, replace

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "state": {"choices": ["read", "appended", "copied"], "default": "read"},
    "entry": {"type": "dict"},
    "entries": {"type": "list", "elements": "dict", "default": []},
    "aside": {"type": "bool", "default": False},
    "after": {"type": "int", "default": 0},
    "directory": {"type": "path", "default": "/var/lib/evenkeel/ledger"},
}


def continuation(params: dict[str, Any], ledger: Ledger, now: datetime) -> list[dict[str, Any]]:
    """The entries to add."""
    if ledger.broken:
        raise LedgerError(f"{ledger.broken}, so nothing is added behind it")
    if params["state"] == "appended":
        return [dict(made(params["entry"], ledger.head, now.isoformat(timespec="seconds")))]
    return list(joined(ledger, params["entries"]))


def work(params: dict[str, Any], *, check_mode: bool) -> dict[str, Any]:
    """Do what is asked for, and tell what the ledger holds then."""
    directory, now, note, kept = params["directory"], datetime.now(UTC), "", ""
    writes = params["state"] != "read"
    if writes and not check_mode:
        make(directory)
    with locked(directory):
        ledger = read(directory)
        added: list[dict[str, Any]] = []
        try:
            added = continuation(params, ledger, now) if writes else []
        except LedgerError as error:
            if not (params["aside"] and params["state"] == "copied"):
                raise
            ledger, added = Ledger(), joined(Ledger(), params["entries"])
            kept = f"the copy that was here ({error}) is kept as {f'{FILE}.<time>' if check_mode else replace(directory, added, now)}"
        if added and not kept and not check_mode:
            note = add(directory, ledger, added, now)
    then = Ledger([*ledger.entries, *added], ledger.broken, b"" if added else ledger.torn)
    told = {"entries": then.after(params["after"]), "head": then.head, "problem": then.problem, "torn": bool(then.torn and not then.broken)}
    if params["state"] == "appended":
        told["entry"] = added[0]
    return {**told, "changed": bool(added or kept), "added": len(added), "note": note or kept}


def main() -> None:
    """Read, append or copy."""
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, required_if=[("state", "appended", ("entry",))], supports_check_mode=True)
    try:
        module.exit_json(**work(module.params, check_mode=module.check_mode))
    except (LedgerError, OSError) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()

#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Verify and unpack a release archive on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release
short_description: Verify and unpack a release archive on a host, remove old releases
description:
  - Verifies the signature of the archive and then every file in it before anything appears below O(directory). A release that is there and
    whole is left alone; one that is damaged gets its files back.
  - An interrupted run leaves nothing that a later run takes for a release.
options:
  directory:
    description: Folder that holds the releases, one folder each.
    required: true
    type: path
  id:
    description: Look whether this release is there and whole, and change nothing.
    type: str
  archive:
    description: The archive on the host, C(<id>.tar); removed afterwards, whether it was good or not.
    type: path
  signature:
    description: The text of its signature, as C(ssh-keygen -Y sign) wrote it.
    type: str
  app:
    description: Name of the application whose release it must be; empty for any.
    type: str
    default: ""
  signers:
    description: Who may sign releases, as lines of an allowed_signers file.
    type: list
    elements: str
  python:
    description: Interpreter on the host that will run the release. Another version than the release is made for is refused.
    type: str
    default: /usr/bin/python3
  keep:
    description: Remove all but this many newest releases, never one in O(protected).
    type: int
  protected:
    description: Names of releases that are never removed.
    type: list
    elements: str
    default: []
author: Evenkeel contributors
"""

EXAMPLES = r"""
- name: See whether the release is there
  release:
    directory: /opt/shop/releases
    id: 1.2.0-0123456789ab

- name: Unpack the release
  release:
    directory: /opt/shop/releases
    archive: /opt/shop/incoming/1.2.0-0123456789ab.tar
    signature: "{{ lookup('ansible.builtin.file', chosen.signature) }}"
    signers: "{{ release_signers }}"
"""

RETURN = r"""
whole: {description: Whether the release is there and every file of it is as its manifest says., type: bool, returned: with id}
removed: {description: Names of the releases that were removed., type: list, returned: always}
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_release import ReleaseError, damage, prune, unpack
from ansible.module_utils.evenkeel_venv import LockError, python_version


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "id": {},
            "app": {"default": ""},
            "archive": {"type": "path"},
            "signature": {},
            "signers": {"type": "list", "elements": "str"},
            "python": {"default": "/usr/bin/python3"},
            "keep": {"type": "int"},
            "protected": {"type": "list", "elements": "str", "default": []},
        },
        required_together=[("archive", "signature", "signers")],
        required_one_of=[("id", "archive", "keep")],
        supports_check_mode=True,
    )
    given = module.params
    directory = Path(given["directory"])
    if given["id"]:
        module.exit_json(changed=False, whole=not damage(directory / given["id"]), removed=[])
    if module.check_mode:
        module.exit_json(skipped=True, msg="a release is neither unpacked nor removed in check mode", removed=[])
    changed = False
    removed: list[str] = []
    try:
        if given["archive"]:
            archive = Path(given["archive"])
            try:
                python = python_version(given["python"])
                _target, changed = unpack(archive, directory, given["signature"], given["signers"], python, given["app"])
            finally:
                archive.unlink(missing_ok=True)
        if given["keep"]:
            removed = prune(directory, given["keep"], set(given["protected"]))
    except (ReleaseError, LockError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=changed or bool(removed), removed=removed)


if __name__ == "__main__":
    main()

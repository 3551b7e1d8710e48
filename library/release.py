#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Verify and unpack a release archive on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release
short_description: Verify and unpack a release archive on a host, remove old releases
description:
  - Verifies the archive and every file in it before anything appears below O(directory). A release that is there is left alone.
  - An interrupted run leaves nothing that a later run takes for a release.
options:
  directory:
    description: Folder that holds the releases, one folder each.
    required: true
    type: path
  archive:
    description: The archive on the host; removed once it is unpacked.
    type: path
  sha256:
    description: SHA-256 that the archive must have.
    type: str
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
- name: Unpack the release
  release:
    directory: /opt/shop/releases
    archive: /opt/shop/releases/1.2.0-0123456789ab.tar
    sha256: "{{ chosen.sha256 }}"
"""

RETURN = r"""
removed: {description: Names of the releases that were removed., type: list, returned: always}
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_release import ReleaseError, prune, unpack


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "archive": {"type": "path"},
            "sha256": {},
            "keep": {"type": "int"},
            "protected": {"type": "list", "elements": "str", "default": []},
        },
        required_together=[("archive", "sha256")],
        required_one_of=[("archive", "keep")],
    )
    given = module.params
    changed = False
    removed: list[str] = []
    try:
        if given["archive"]:
            archive = Path(given["archive"])
            _target, changed = unpack(archive, given["sha256"], Path(given["directory"]))
            archive.unlink(missing_ok=True)
        if given["keep"]:
            removed = prune(Path(given["directory"]), given["keep"], set(given["protected"]))
    except (ReleaseError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=changed or bool(removed), removed=removed)


if __name__ == "__main__":
    main()

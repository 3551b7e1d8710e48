#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Which releases of an application are on a host, which of them runs, and how much room there is for another."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release_facts
short_description: Which releases of an application are on a host, and which of them runs
description:
  - Reads only, in one remote call.
options:
  app:
    description: Name of the application; its releases live in C(/opt/<app>/releases).
    required: true
    type: str
author: Evenkeel contributors
attributes:
  check_mode:
    support: full
    description: It only reads.
"""

EXAMPLES = r"""
- name: See which release runs
  release_facts:
    app: shop
  register: there
"""

RETURN = r"""
converged: {description: Whether site.yml has prepared this host for the application., type: bool, returned: always}
current: {description: Id of the release that runs; empty before the first deploy., type: str, returned: always}
kept: {description: Ids of the releases that are installed whole., type: list, returned: always}
free_mb: {description: Room on the file system of the releases., type: int, returned: always}
"""

import os
import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    module = AnsibleModule(argument_spec={"app": {"required": True}}, supports_check_mode=True)
    app = module.params["app"]
    root = Path("/opt") / app
    releases, current = root / "releases", root / "current"
    kept = sorted(path.parent.name for path in releases.glob("[!.]*/manifest.json") if (path.parent / "venv/bin").is_dir())
    there = next(path for path in (releases, root, root.parent, Path("/")) if path.exists())
    module.exit_json(
        converged=os.access(f"/usr/local/sbin/{app}-run", os.X_OK),
        current=os.readlink(current).rpartition("/")[2] if current.is_symlink() else "",
        kept=kept,
        free_mb=shutil.disk_usage(there).free >> 20,
    )


if __name__ == "__main__":
    main()

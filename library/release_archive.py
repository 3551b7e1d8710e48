#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Build or choose a release archive on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release_archive
short_description: Build or choose a release archive on the controller
description:
  - Builds one immutable archive from a commit (wheelhouse with hashes, manifest), or finds one that was built, and verifies it.
  - Runs on the controller. Building needs git, pip and the package index; nothing later does.
options:
  state:
    description: C(built) builds the release of O(ref) unless it is there; C(chosen) finds the one that O(wanted) names.
    choices: [built, chosen]
    default: chosen
    type: str
  directory:
    description: Folder of this application's release archives on the controller.
    required: true
    type: path
  wanted:
    description: A release id, the start (7 characters or more) of a commit, or C(latest) (the one built or named last).
    default: latest
    type: str
  app:
    description: Name of the application, for C(state=built).
    type: str
  repository:
    description: Git checkout that the release is built from.
    type: path
  ref:
    description: Commit, tag or branch.
    default: HEAD
    type: str
  project:
    description: Folder of the Python project below the repository.
    type: str
  lock:
    description: Requirements file with hashes below the repository, resolved for the hosts' Python.
    type: str
  wheelhouses:
    description: Folder on the controller where downloaded wheels are kept.
    type: path
  python:
    description: The hosts' Python version, MAJOR.MINOR.
    default: "3.11"
    type: str
author: Evenkeel contributors
"""

EXAMPLES = r"""
- name: Build the release of the newest tag
  release_archive:
    state: built
    directory: /srv/releases/shop
    wheelhouses: /srv/wheelhouses
    app: shop
    repository: /src/shop
    ref: v1.2.0
    project: .
    lock: requirements.lock
"""

RETURN = r"""
archive: {description: Path of the archive., type: str, returned: always}
id: {description: Name of the release., type: str, returned: always}
sha256: {description: SHA-256 of the archive., type: str, returned: always}
commit: {description: The commit it was built from., type: str, returned: always}
"""

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_release import ReleaseError, build, choose, expected_sha256, problem, read_manifest, resolve
from ansible.module_utils.evenkeel_venv import LockError
from ansible.module_utils.evenkeel_wheelhouse import ARCHITECTURES, fetch


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"choices": ["built", "chosen"], "default": "chosen"},
            "directory": {"type": "path", "required": True},
            "wanted": {"default": "latest"},
            "app": {},
            "repository": {"type": "path"},
            "ref": {"default": "HEAD"},
            "project": {},
            "lock": {},
            "wheelhouses": {"type": "path"},
            "python": {"default": "3.11"},
        },
        required_if=[("state", "built", ("app", "repository", "project", "lock", "wheelhouses"))],
        supports_check_mode=True,
    )
    given = module.params
    directory = Path(given["directory"])
    changed = False
    try:
        if given["state"] == "built":
            repository = Path(given["repository"])
            if module.check_mode:
                commit = resolve(repository, given["ref"])
                module.exit_json(changed=not list(directory.glob(f"*-{commit[:12]}.tar")), commit=commit)
            directory.mkdir(parents=True, exist_ok=True)
            hosts = {"build": [], "architecture": ARCHITECTURES[0], "python_version": given["python"]}

            def wheels(lock: Path) -> Path:
                return Path(fetch(Path(given["wheelhouses"]), lock.read_bytes(), given["lock"], hosts)[1])

            archive, changed = build(
                repository, given["ref"], given["app"], given["project"], given["lock"], directory, given["python"], wheels
            )
            os.utime(archive)  # the release named last is the one that `latest` means
        else:
            archive = choose(directory, given["wanted"])
        wrong = problem(archive)
        if wrong:
            raise ReleaseError(wrong)
        manifest = read_manifest(archive)
        module.exit_json(changed=changed, archive=str(archive), id=manifest.id, sha256=expected_sha256(archive), commit=manifest.commit)
    except (ReleaseError, LockError) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()

#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Build or choose a release archive on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release_archive
short_description: Build or choose a release archive on the controller
description:
  - Builds one immutable archive (wheelhouse with hashes, manifest, bill of materials) from a commit of a git repository or from the lock of
    a package of an index, audits it and signs it; or finds one that was built, and verifies it.
  - Runs on the controller. Building needs git, pip, ssh-keygen and the package index; nothing later does.
options:
  state:
    description: C(built) builds the release of O(ref) unless it is there, and audits it in any case; C(chosen) finds the one that O(wanted)
      names and verifies it.
    choices: [built, chosen]
    default: chosen
    type: str
  directory:
    description: Folder of this application's release archives on the controller.
    required: true
    type: path
  wanted:
    description: A release id, a version, the start (7 characters or more) of a commit, a tag or branch of O(repository), or C(latest) (the
      one built or named last).
    default: latest
    type: str
  signers:
    description: Who may sign releases, as lines of an allowed_signers file (C(principal ssh-ed25519 AAAA…)), for C(state=chosen).
    type: list
    elements: str
  app:
    description: Name of the application, for C(state=built).
    type: str
  repository:
    description: Git checkout that the release is built from, or whose tags O(wanted) may name.
    type: path
  ref:
    description: Commit, tag or branch; with O(locks) the name of a lock. By default C(HEAD), which no lock has.
    type: str
  project:
    description: Folder of the Python project below the repository.
    type: str
  lock:
    description: Requirements file with hashes below the repository, resolved for the hosts' Python.
    type: str
  requirement:
    description: Name of a package of an index, instead of O(project) and O(lock).
    type: str
  locks:
    description: Folder on the controller with a requirements file with hashes for each release of O(requirement), C(<ref>.lock).
    type: path
  build:
    description: Packages of the lock, or of others of O(locks), that are published only as source. They must be pure Python.
    type: list
    elements: str
    default: []
  installer_lock:
    description: Requirements file with hashes that pins uv, for a lock that does not. uv travels in the release and installs it on hosts.
    type: path
  wheelhouses:
    description: Folder on the controller where downloaded wheels are kept.
    type: path
  python:
    description: The hosts' Python version, MAJOR.MINOR.
    default: "3.11"
    type: str
  signing_key:
    description: Private SSH key that signs, or the public half of one in an SSH agent. It is made at first use.
    type: path
  advisories:
    description: File or folder with advisories in OSV form, or the address of a service with OSV's interface. Empty is https://api.osv.dev.
    type: str
    default: ""
  allowed_advisories:
    description: Findings that are let pass for a while.
    type: list
    elements: dict
    default: []
    suboptions:
      id: {description: An id of the advisory. An alias counts., type: str}
      package: {description: Name of the package., type: str}
      until: {description: Last day, YYYY-MM-DD, at most 180 days ahead., type: str}
      reason: {description: Why it does not concern this application., type: str}
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
    signing_key: /srv/keys/release

- name: Find it again and verify it
  release_archive:
    directory: /srv/releases/shop
    wanted: v1.2.0
    repository: /src/shop
    signers: ["release ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA…"]
"""

RETURN = r"""
archive: {description: Path of the archive., type: str, returned: always}
signature: {description: Path of its signature., type: str, returned: always}
id: {description: Name of the release., type: str, returned: always}
version: {description: Version of the project., type: str, returned: always}
sha256: {description: SHA-256 of the archive., type: str, returned: always}
commit: {description: "The commit it was built from, or the SHA-256 of its lock.", type: str, returned: always}
signer: {description: The principal who signed it., type: str, returned: with state=chosen}
audit: {description: "What the audit and the scan said, a line each.", type: str, returned: with state=built}
audit_file: {description: The audit's findings as JSON., type: str, returned: with state=built}
"""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

try:
    from ansible.module_utils import evenkeel_audit, evenkeel_build

    MISSING = ""
except ImportError as error:
    MISSING = str(error.name)
from ansible.module_utils.evenkeel_release import ReleaseError, check, choose, read_manifest, sha256
from ansible.module_utils.evenkeel_venv import LockError
from ansible.module_utils.evenkeel_wheelhouse import ARCHITECTURES, fetch

WORDS: dict[str, Any] = {"type": "list", "elements": "str"}
ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "state": {"choices": ["built", "chosen"], "default": "chosen"},
    "directory": {"type": "path", "required": True},
    "wanted": {"default": "latest"},
    "signers": WORDS,
    "app": {},
    "repository": {"type": "path"},
    "ref": {},
    "project": {},
    "lock": {},
    "requirement": {},
    "locks": {"type": "path"},
    "build": {**WORDS, "default": []},
    "installer_lock": {"type": "path"},
    "wheelhouses": {"type": "path"},
    "python": {"default": "3.11"},
    "signing_key": {"type": "path", "no_log": False},
    "advisories": {"default": ""},
    "allowed_advisories": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {"id": {}, "package": {}, "until": {}, "reason": {}},
    },
}


def origin_of(given: dict[str, Any]) -> evenkeel_build.Origin:
    """What the release is built from."""
    if given["requirement"]:
        origin = evenkeel_build.from_index(given["requirement"], Path(given["locks"]), given["ref"] or "HEAD")
    else:
        origin = evenkeel_build.from_git(Path(given["repository"]), given["ref"] or "HEAD", given["project"], given["lock"])
    return origin


def gate(given: dict[str, Any], origin: evenkeel_build.Origin, told: list[str], release: Path) -> None:
    """Audit and scan an unpacked release; write the result beside its archive, and refuse what must not be built."""
    now = datetime.now(UTC)
    packages = evenkeel_build.packages(release)
    result = evenkeel_audit.audit(packages, given["advisories"], given["allowed_advisories"], now.date())
    refused = evenkeel_audit.refusal(result, release.name, now.date())
    told.append(result.line())
    try:
        if not refused:
            with evenkeel_build.partial(release.parent) as folder:
                told.append(evenkeel_audit.scan(release, evenkeel_build.sources(origin, folder)))
    finally:
        record = evenkeel_audit.record(result, release.name, now, told[1] if len(told) > 1 else "")
        audit_file(given, release.name).write_text(record)
    if refused:
        raise evenkeel_audit.AuditError(refused)


def audit_file(given: dict[str, Any], release: str) -> Path:
    return Path(given["directory"], f"{release}.audit.json")


def built(given: dict[str, Any]) -> dict[str, Any]:
    """Build the release unless it is there, and audit it."""
    directory, origin, told = Path(given["directory"]), origin_of(given), list[str]()
    os.environ["SOURCE_DATE_EPOCH"] = evenkeel_build.SOURCE_EPOCH
    build = evenkeel_build.source_only(given["build"], origin.lock, Path(given["locks"])) if given["locks"] else given["build"]
    hosts = {"build": build, "architecture": ARCHITECTURES[0], "python_version": given["python"]}

    def wheels(lock: bytes, name: str) -> Path:
        complete = evenkeel_build.with_installer(lock, name, given["installer_lock"])
        return Path(fetch(Path(given["wheelhouses"]), complete, name, hosts)[1])

    archive, changed = evenkeel_build.build(
        origin,
        given["app"],
        directory,
        given["python"],
        wheels,
        Path(given["signing_key"]),
        lambda release: gate(given, origin, told, release),
    )
    os.utime(archive)  # the release named last is the one that `latest` means
    return {
        "archive": archive,
        "changed": changed,
        "audit": "\n".join(told),
        "audit_file": str(audit_file(given, read_manifest(archive).id)),
    }


def chosen(given: dict[str, Any]) -> dict[str, Any]:
    """Find the release and verify it."""
    repository = Path(given["repository"]) if given["repository"] else None
    archive = choose(Path(given["directory"]), given["wanted"], evenkeel_build.named_commit(repository, given["wanted"]))
    return {"archive": archive, "changed": False, "signer": check(archive, given["signers"])[1]}


def main() -> None:
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        required_if=[("state", "built", ("app", "wheelhouses", "signing_key")), ("state", "chosen", ("signers",))],
        required_together=[("project", "lock"), ("requirement", "locks")],
        mutually_exclusive=[("project", "requirement")],
        supports_check_mode=True,
    )
    given = module.params
    if MISSING:
        module.fail_json(msg=f"{missing_required_lib(MISSING)} (make setup installs all that the controller needs)")
    if given["state"] == "built" and not given["requirement"] and not (given["project"] and given["repository"]):
        module.fail_json(msg="state=built needs repository, project and lock, or requirement and locks")
    try:
        if given["state"] == "built" and module.check_mode:
            commit = origin_of(given).commit
            module.exit_json(changed=not list(Path(given["directory"]).glob(f"*-{commit[:12]}.tar")), commit=commit)
        result = built(given) if given["state"] == "built" else chosen(given)
        archive = result["archive"]
        manifest = read_manifest(archive)
        module.exit_json(
            **{**result, "archive": str(archive), "signature": f"{archive}.sig", "sha256": sha256(archive)},
            id=manifest.id,
            version=manifest.version,
            commit=manifest.commit,
        )
    except (ReleaseError, LockError, evenkeel_audit.AuditError, OSError) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()

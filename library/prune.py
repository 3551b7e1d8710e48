#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Remove from a host what nobody needs any more, within bounds, and say how much that frees."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: prune
short_description: Remove from a host what nobody needs any more, within bounds
description:
  - Looks at each kind in turn, says what is there, and removes what is beyond its bound. What is left out is not looked at.
  - Failure notes (C(/var/lib/evenkeel/failures)) of units that do not exist any more are always removed. Others are of use until their unit
    runs again, which removes them.
options:
  releases:
    description: Folder of the releases of the application. The one that runs is never removed.
    type: path
  releases_kept:
    description: How many of the newest releases or archives stay; without it all of them.
    type: int
  releases_protected:
    description: Names of releases that stay however old they are, because a rollback would go back to them.
    type: list
    elements: str
    default: []
  archives:
    description: Folder of release archives, on the controller.
    type: path
  archives_protected:
    description: Names of releases whose archives stay, because some host carries them and could be sent back to them.
    type: list
    elements: str
    default: []
  journal_max_mb:
    description: Size of the journal above which its oldest archived files go. journald keeps to the same bound by itself, once it is told.
    type: int
  packages:
    description: Whether downloaded Debian packages go. They are installed, and can be downloaded again.
    type: bool
    default: false
  commands:
    description: "The application's own commands: C({name, command, dry_run}), each a list of words."
    type: list
    elements: dict
    default: []
    suboptions:
      name: {description: What it removes., type: str, required: true}
      command: {description: Removes it., type: list, elements: str, required: true}
      dry_run: {description: Only says what it would remove., type: list, elements: str, required: true}
  timeout_seconds:
    description: For each command.
    type: int
    default: 900
author:
  - Evenkeel contributors (@evenkeel)
attributes:
  check_mode:
    support: full
    description: Says what would be removed, and removes nothing.
"""

EXAMPLES = r"""
- name: Prune
  prune:
    releases: /opt/shop/releases
    journal_max_mb: 1024
    packages: true
    commands:
      - {name: carts, command: [shop-run, shop, prune], dry_run: [shop-run, shop, prune, --dry-run]}
"""

RETURN = r"""
lines: {description: A line for each kind., type: list, returned: always, sample: ["releases   7, 412.0 MB; removed 1, 118.0 MB: 1.0-a"]}
freed_bytes: {description: What was freed or would be; of the application's own commands it is not known., type: int, returned: always}
releases: {description: Names of the releases that are on the host., type: list, returned: always}
"""

import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_release import remove as remove_folder
from ansible.module_utils.evenkeel_release import superfluous

JOURNAL = Path("/var/log/journal")
PACKAGES = Path("/var/cache/apt/archives")
FAILURES = Path("/var/lib/evenkeel/failures")
MB = 1 << 20


@dataclass
class Finding:
    """One kind: what is there, and what goes."""

    kind: str
    there: list[Path]
    goes: list[Path]
    names: list[str] = field(default_factory=list)  # of what goes, when they tell something
    note: str = ""

    def line(self, removed: str) -> str:
        """What a person reads."""
        text = f"{self.kind:<10} {len(self.there)}, {mb(self.there)}{self.note}; {removed} "
        text += f"{len(self.goes)}, {mb(self.goes)}" if self.goes else "nothing"
        return f"{text}: {', '.join(self.names)}" if self.names else text


def size_of(path: Path) -> int:
    """What a file or folder takes on the disk."""
    paths = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    total = 0
    for each in paths:
        try:
            total += each.lstat().st_blocks * 512
        except FileNotFoundError:
            continue  # somebody was faster
    return total


def mb(paths: Iterable[Path]) -> str:
    """Their size for people."""
    return f"{sum(map(size_of, paths)) / MB:.1f} MB"


def files(folder: Path, *patterns: str) -> list[Path]:
    """The files of a folder that may not exist."""
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def look_releases(folder: Path, keep: int | None, protected: set[str]) -> Finding:
    """Releases, and what interrupted runs left beside them."""
    there = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    goes = superfluous(folder, len(there) if keep is None else keep, protected)
    stay = " (all stay)" if keep is None else f" (the newest {keep} stay, the one that runs, and the one before it)"
    return Finding("releases", there, goes, [path.name for path in goes], stay)


def look_archives(folder: Path, keep: int | None, protected: set[str]) -> Finding:
    """Archives of releases on the controller."""
    archives = sorted(files(folder, "*.tar"), key=lambda path: path.stat().st_mtime, reverse=True)
    old = [] if keep is None else archives[keep:]
    goes = [path for path in old if path.name.removesuffix(".tar") not in protected]
    return Finding("archives", archives, goes, [path.name for path in goes], f" (the newest {keep} stay, and those of releases on hosts)")


def look_journal(folder: Path, bound_mb: int) -> Finding:
    """Archived files of the journal, the oldest first, until the rest is within the bound."""
    there = files(folder, "*/*.journal", "*/*.journal~")
    archived = sorted((path for path in there if "@" in path.name), key=lambda path: path.stat().st_mtime)
    over = sum(map(size_of, there)) - bound_mb * MB
    goes = []
    for path in archived:
        if over <= 0:
            break
        over -= size_of(path)
        goes.append(path)
    return Finding("journal", there, goes, note=f" of at most {bound_mb} MB")


def look_packages(folder: Path) -> Finding:
    """Downloaded packages, also those that were broken off."""
    found = files(folder, "*.deb", "partial/*")
    return Finding("packages", found, found)


def look_failures(folder: Path, exists: Callable[[str], bool]) -> Finding:
    """Notes about units that are gone: nothing will ever run that removes them."""
    notes = files(folder, "[!.]*")
    goes = [path for path in notes if not exists(path.name)]
    return Finding("failures", notes, goes, [path.name for path in goes])


def unit_exists(unit: str) -> bool:
    """Whether systemd knows the unit."""
    shown = subprocess.run(["systemctl", "show", "--property=LoadState", "--value", unit], capture_output=True, text=True, check=False)
    return shown.returncode != 0 or shown.stdout.strip() != "not-found"


def remove(path: Path) -> None:
    """A file or a folder; an archive goes with its signature and its audit."""
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
        return
    path.unlink(missing_ok=True)
    if path.suffix == ".tar":
        Path(f"{path}.sig").unlink(missing_ok=True)
        path.with_suffix(".audit.json").unlink(missing_ok=True)


def findings(params: dict[str, Any]) -> list[Finding]:
    """Look at all that was asked for."""
    found = []
    if params["releases"]:
        found.append(look_releases(Path(params["releases"]), params["releases_kept"], set(params["releases_protected"])))
    if params["archives"]:
        return [look_archives(Path(params["archives"]), params["releases_kept"], set(params["archives_protected"]))]
    if params["journal_max_mb"] is not None:
        found.append(look_journal(JOURNAL, params["journal_max_mb"]))
    if params["packages"]:
        found.append(look_packages(PACKAGES))
    return [*found, look_failures(FAILURES, unit_exists)]


def ask(command: dict[str, Any], check_mode: bool, timeout: int) -> str:
    """Run one of the application's commands; the last line that it writes."""
    argv = command["dry_run" if check_mode else "command"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=timeout, stdin=subprocess.DEVNULL)
    lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or lines or [f"exit code {done.returncode}"])[-1])
    return lines[-1] if lines else "it wrote nothing"


def main() -> None:
    """Look, remove, tell."""
    words = {"type": "list", "elements": "str"}
    module = AnsibleModule(
        argument_spec={
            "releases": {"type": "path"},
            "releases_kept": {"type": "int"},
            "releases_protected": {**words, "default": []},
            "archives": {"type": "path"},
            "archives_protected": {**words, "default": []},
            "journal_max_mb": {"type": "int"},
            "packages": {"type": "bool", "default": False},
            "commands": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "command": {**words, "required": True},
                    "dry_run": {**words, "required": True},
                },
            },
            "timeout_seconds": {"type": "int", "default": 900},
        },
        supports_check_mode=True,
    )
    check_mode = module.check_mode
    removed = "would remove" if check_mode else "removed"
    lines, problems, freed, changed = [], [], 0, False
    found = findings(module.params)
    for finding in found:
        lines.append(finding.line(removed))
        freed += sum(map(size_of, finding.goes))
        changed = changed or bool(finding.goes)
        for path in [] if check_mode else finding.goes:
            remove(path)
    # `current` is what the commands run: without a release there is nothing of the application's to prune
    ready = module.params["releases"] and (Path(module.params["releases"]).parent / "current").exists()
    for command in module.params["commands"] if ready else []:
        try:
            said = ask(command, check_mode, module.params["timeout_seconds"])
            changed = changed or not said.startswith("unchanged")
            known = re.escape(command["name"])
            lines.append(f"{command['name']:<10} {re.sub(f'^(un)?changed ({known}: )?', '', said)}")
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            problems.append(f"{command['name']}: {error}")
    lines.append(f"{'in all':<10} {'would free' if check_mode else 'freed'} {freed / MB:.1f} MB")
    there = [path.name for finding in found if finding.kind == "releases" for path in finding.there if path not in finding.goes]
    if problems:
        module.fail_json(msg="; ".join(problems), lines=lines, changed=changed, freed_bytes=freed, releases=there)
    module.exit_json(changed=changed, lines=lines, freed_bytes=freed, releases=there)


if __name__ == "__main__":
    main()

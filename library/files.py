#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Host side of the `files` module."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: files
short_description: Write the files, directories and links of a role in one remote call
description:
  - Renders, copies, links, creates and removes many paths in one task. A remote task costs most of a second whatever
    it does; one C(files) task costs as much as one M(ansible.builtin.template).
  - Every entry is checked and every template is rendered on the controller before anything is changed. What is wrong
    with any of them is told in one message.
  - On the host the directories are made first. Then all new content is written beside its destination and checked with
    O(files[].validate); only when every check has passed are files replaced, in the given order, each in one atomic
    step that also survives a power cut. A run that is killed leaves each file old or new, never half; the next run
    removes what was left over and finishes the work.
  - In check mode the module predicts. An owner, group, parent directory or validator that does not exist yet is not an
    error there. Validators are not run in check mode, as with M(ansible.builtin.template).
options:
  owner:
    description: Owner of the entries that name none.
    type: str
    default: root
  group:
    description: Group of the entries that name none.
    type: str
    default: root
  files:
    description: The entries. Each has O(files[].dest) and exactly one of O(files[].template), O(files[].copy),
      O(files[].content), O(files[].link) and O(files[].state). Unknown keys and two entries for one destination are
      errors.
    type: list
    elements: dict
    required: true
    suboptions:
      dest:
        description:
          - Absolute path on the host. Its directory must exist or be an entry.
          - A file entry replaces a symbolic link at this place with a file, and leaves what the link leads to alone,
            as M(ansible.builtin.template) does with C(follow=false). A directory there is an error.
        type: str
        required: true
      template:
        description: Name of a template in the C(templates/) of the role or playbook. Undefined names are errors.
          C(ansible_managed), C(template_path) and the like are set as for M(ansible.builtin.template), and
          C(trim_blocks) is on.
        type: str
      copy:
        description: Name of a file in the C(files/) of the role or playbook, up to 16 MiB. Text or binary.
        type: str
      content:
        description: The text itself, written as it is.
        type: str
      link:
        description: Target of a symbolic link. It need not exist. An existing link is replaced atomically; a file or
          a directory at this place is an error. Owner and group are those of the link itself.
        type: str
      state:
        description:
          - V(directory) creates a directory, with missing ones above it, as M(ansible.builtin.file) does. A symbolic
            link to a directory is accepted and the directory that it leads to gets the attributes.
          - V(absent) removes a file, a link or a whole directory.
        type: str
        choices: [directory, absent]
      owner:
        description: Owner, a name or a number. Defaults to O(owner).
        type: str
      group:
        description: Group, a name or a number. Defaults to O(group).
        type: str
      mode:
        description: Permissions, a quoted octal (V("0640")) or symbolic (V("u=rw,g=r")) text. C("0644") for files and
          C("0755") for directories when it is not given. A symbolic mode starts from the present one, or for a new
          path from what the umask leaves.
        type: str
      validate:
        description: Command that checks a new content before any file of the task is replaced. V(%s) stands for the
          path of the new content, which lies in the directory of O(files[].dest) under another name, with its final
          owner and mode. No shell. It runs only when the content changes.
        type: str
      secret:
        description: Keep the content out of diffs, logs, C(-vvv) and failure messages.
        type: bool
        default: false
      vars:
        description: Template variables for this entry only. They win over all others.
        type: dict
author:
  - Evenkeel contributors (@evenkeel)
attributes:
  check_mode:
    support: full
    description: Predicts what would change.
  diff_mode:
    support: full
    description: A diff for each path.
"""

EXAMPLES = r"""
- name: Write the configuration of etcd
  files:
    files:
      - {dest: /etc/etcd, state: directory, group: etcd, mode: "0750"}
      - {dest: /etc/etcd/etcd.yml, template: etcd.yml.j2, group: etcd, mode: "0640"}
      - {dest: /etc/etcd/password, content: "{{ etcd_password }}", mode: "0600", secret: true}
      - {dest: /etc/sudoers.d/etcd, template: sudoers.j2, mode: "0440", validate: /usr/sbin/visudo -cf %s}
      - {dest: /etc/etcd/current, link: /opt/etcd/current}
      - {dest: /etc/default/etcd, state: absent}
  register: __etcd_files

- name: Say what changed
  ansible.builtin.debug:
    var: __etcd_files.changed_files
"""

RETURN = r"""
changed_files:
  description: The destinations that were changed or, in check mode, would be.
  returned: always
  type: list
  elements: str
  sample: [/etc/etcd/etcd.yml]
diff:
  description: For each changed path what was and what is, when diffs are asked for.
  returned: in diff mode
  type: list
  elements: dict
"""

import base64
import os
import shlex
import stat
from types import SimpleNamespace
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_files import PayloadError, decode_payload
from ansible.module_utils.evenkeel_host import (
    HIDDEN,
    Attributes,
    attributes_of,
    content_diff,
    describe,
    discard,
    gid_of,
    group_name,
    lstat,
    make_directory,
    place,
    place_link,
    remove,
    set_attributes,
    stage,
    state_diff,
    sweep,
    uid_of,
    user_name,
)

ENTRY_SPEC: dict[str, dict[str, Any]] = {
    "dest": {"type": "str", "required": True},
    "template": {"type": "str"},
    "copy": {"type": "str"},
    "content": {"type": "str"},
    "link": {"type": "str"},
    "state": {"type": "str", "choices": ["directory", "absent"]},
    "owner": {"type": "str"},
    "group": {"type": "str"},
    "mode": {"type": "str"},
    "validate": {"type": "str"},
    "secret": {"type": "bool", "default": False},
    "vars": {"type": "dict"},
}
ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "owner": {"type": "str", "default": "root"},
    "group": {"type": "str", "default": "root"},
    "files": {"type": "list", "elements": "dict", "options": ENTRY_SPEC},
    "payload": {"type": "str", "no_log": True},
}


class EntryError(Exception):
    """An entry that cannot be done on this host; the text is for people."""


class Entry:
    """One path: what is there, what shall be there, and the way from one to the other."""

    def __init__(self, raw: dict[str, Any], umask: int) -> None:
        self.raw = raw
        self.kind: str = raw["kind"]
        self.label: str = raw["label"]
        self.secret: bool = raw["secret"]
        self.dest: str = raw["dest"]
        self.path = os.path.realpath(self.dest) if self.kind == "directory" else self.dest
        self.data = base64.b64decode(raw["data"]) if "data" in raw else b""
        self.umask = umask
        self.found = lstat(self.path)
        self.before: bytes | None = None
        self.staged: str | None = None
        self.changed = False
        self.content_changed = False

    def plan(self, coming: set[str], *, check_mode: bool) -> None:
        """Find out whether the entry changes anything; refuse what cannot work."""
        uid = uid_of(self.raw["owner"]) if "owner" in self.raw else 0
        gid = gid_of(self.raw["group"]) if "group" in self.raw else 0
        if uid is None and not check_mode:
            raise EntryError(f"there is no user {self.raw['owner']!r} on this host")
        if gid is None and not check_mode:
            raise EntryError(f"there is no group {self.raw['group']!r} on this host")
        self._check_place(coming, check_mode=check_mode)
        unknown = uid is None or gid is None
        self.wanted = Attributes(-1 if uid is None else uid, -1 if gid is None else gid, self._mode())
        self.content_changed = self._content_differs()
        self.changed = unknown or self.content_changed or self._attributes_differ()

    def _check_place(self, coming: set[str], *, check_mode: bool) -> None:
        found = self.found
        if self.kind == "absent" or self.kind == "directory":
            blocked = self._blocking_file()
            if self.kind == "directory" and blocked:
                raise EntryError(f"{blocked} exists and is not a directory")
            if self.kind == "directory" and os.path.islink(self.dest) and found is None:
                raise EntryError(f"is a symbolic link to {self.path}, which does not exist")
            return
        if found is not None and stat.S_ISDIR(found.st_mode):
            raise EntryError(f"is a directory on this host, the entry makes a {self.kind}; remove it first")
        if found is not None and self.kind == "link" and not stat.S_ISLNK(found.st_mode):
            raise EntryError("exists and is not a symbolic link; remove it first")
        if found is not None and not stat.S_ISREG(found.st_mode) and not stat.S_ISLNK(found.st_mode):
            raise EntryError("exists and is neither a file nor a symbolic link")
        if found is not None and stat.S_ISLNK(found.st_mode) and self.kind == "file" and os.path.isdir(self.path):
            raise EntryError(f"is a symbolic link to the directory {os.path.realpath(self.path)}; remove it first")
        parent = os.path.dirname(self.path)
        if not os.path.isdir(parent) and parent not in coming:
            if os.path.exists(parent):
                raise EntryError(f"{parent} exists and is not a directory")
            if not check_mode:
                raise EntryError(f"its directory {parent} does not exist; add an entry with state: directory before it")

    def _blocking_file(self) -> str | None:
        path = self.path
        while path != "/":
            found = lstat(path)
            if found is not None:
                return None if os.path.isdir(path) else path
            path = os.path.dirname(path)
        return None

    def _mode(self) -> int:
        mode = self.raw.get("mode")
        if mode is None:
            return 0
        if mode.isdigit():
            return int(mode, 8)
        kind, full = (stat.S_IFDIR, 0o777) if self.kind == "directory" else (stat.S_IFREG, 0o666)
        start = full & ~self.umask
        if self.found is not None and stat.S_IFMT(self.found.st_mode) == kind:
            start = stat.S_IMODE(self.found.st_mode)
        return int(AnsibleModule._symbolic_mode_to_octal(SimpleNamespace(st_mode=kind | start), mode))

    def _content_differs(self) -> bool:
        found = self.found
        if self.kind == "absent":
            return found is not None
        if self.kind == "directory":
            return found is None
        if self.kind == "link":
            return found is None or os.readlink(self.path) != self.raw["link"]
        if found is None or not stat.S_ISREG(found.st_mode):
            return True
        with open(self.path, "rb") as file:
            self.before = file.read()
        return self.before != self.data

    def _attributes_differ(self) -> bool:
        if self.kind == "absent" or self.found is None:
            return False
        found = attributes_of(self.found)
        if self.kind == "link":
            return (found.uid, found.gid) != (self.wanted.uid, self.wanted.gid)
        return bool(found != self.wanted)

    def diffs(self) -> list[dict[str, Any]]:
        """Describe the planned change."""
        shown: list[dict[str, Any]] = []
        before = self._before_state()
        if self.kind == "file" and self.content_changed:
            if self.found is not None and stat.S_ISLNK(self.found.st_mode):
                shown.append(state_diff(self.dest, before, {"state": "file"}))
            source = self.raw["source"]
            shown.append(content_diff(self.dest, source, self.before, self.data, secret=self.secret))
        elif self.content_changed:
            after = {"state": self.kind, "target": self.raw["link"]} if self.kind == "link" else {"state": self.kind}
            shown.append(state_diff(self.dest, before, after))
        if self.found is not None and self._attributes_differ() and not stat.S_ISLNK(self.found.st_mode):
            after = describe(self.wanted)
            for key, number in (("owner", self.wanted.uid), ("group", self.wanted.gid)):
                after[key] = self.raw[key] if number == -1 else after[key]
            shown.append(state_diff(self.dest, before, after))
        elif self.found is not None and self.kind == "link" and self._attributes_differ():
            after = {"owner": user_name(self.wanted.uid), "group": group_name(self.wanted.gid)}
            shown.append(state_diff(self.dest, before, after))
        return shown

    def _before_state(self) -> dict[str, Any]:
        if self.found is None:
            return {"state": "absent"}
        before: dict[str, Any] = dict(describe(attributes_of(self.found)))
        if stat.S_ISLNK(self.found.st_mode):
            before.update(state="link", target=os.readlink(self.path))
        elif stat.S_ISDIR(self.found.st_mode):
            before["state"] = "directory"
        else:
            before["state"] = "file"
        return before

    def apply(self) -> None:
        """Make the planned change."""
        if self.kind == "absent":
            remove(self.path)
        elif self.kind == "link":
            place_link(self.raw["link"], self.path, self.wanted.uid, self.wanted.gid)
        elif self.staged is not None:
            place(self.staged, self.path)
            self.staged = None
        elif self.kind == "directory" and not os.path.isdir(self.path):
            make_directory(self.path, self.wanted)
        else:
            set_attributes(self.path, self.wanted)


def validate(module: AnsibleModule, entry: Entry) -> None:
    """Run an entry's validator on its staged content."""
    command = entry.raw.get("validate")
    if not command or entry.staged is None:
        return
    words = [word.replace("%s", entry.staged) for word in shlex.split(command)]
    code, out, err = module.run_command(words, handle_exceptions=False)
    if code != 0:
        said = HIDDEN if entry.secret else (err.strip() or out.strip() or "it printed nothing")
        raise EntryError(f"the new content did not pass {command!r} (exit {code}): {said}")


def coming_directories(entries: list[Entry]) -> set[str]:
    """Return the directories that will exist because an entry makes them or one below them."""
    coming: set[str] = set()
    for entry in entries:
        if entry.kind == "directory":
            for path in (entry.dest, entry.path):
                while path != "/":
                    coming.add(path)
                    path = os.path.dirname(path)
    return coming


def plan_all(entries: list[Entry], *, check_mode: bool) -> list[str]:
    """Plan every entry; return what is wrong, a line each."""
    coming = coming_directories(entries)
    problems: list[str] = []
    for entry in entries:
        try:
            entry.plan(coming, check_mode=check_mode)
        except (EntryError, OSError, ValueError) as error:
            problems.append(f"{entry.label}: {_reason(error)}")
    return problems


def apply_all(module: AnsibleModule, entries: list[Entry], done: list[str]) -> None:
    """Directories, then all new contents staged and validated, then everything put in place in the given order."""
    changing = [entry for entry in entries if entry.changed]
    current = changing[0]
    try:
        for current in changing:
            if current.kind == "directory":
                current.apply()
                done.append(current.dest)
        for current in changing:
            if current.kind == "file" and current.content_changed:
                current.staged = stage(current.path, current.data, current.wanted)
                validate(module, current)
        for current in changing:
            if current.kind != "directory":
                current.apply()
                done.append(current.dest)
    except (EntryError, OSError) as error:
        raise EntryError(f"{current.label}: {_reason(error)}") from None
    finally:
        for entry in changing:
            if entry.staged is not None:
                discard(entry.staged)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        become = "; the task needs become: true" if isinstance(error, PermissionError) and os.geteuid() != 0 else ""
        return f"{error.strerror}{where}{become}"
    return str(error)


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    if not module.params["payload"]:
        module.fail_json(msg="files works through its action plugin: set action_plugins in ansible.cfg")
    umask = os.umask(0)
    os.umask(umask)
    try:
        entries = [Entry(raw, umask) for raw in decode_payload(module.params["payload"])]
    except PayloadError as error:
        module.fail_json(msg=f"files: {error}", changed_files=[])
    problems = plan_all(entries, check_mode=module.check_mode)
    if problems:
        text = problems[0] if len(problems) == 1 else "\n".join(["nothing was changed:", *(f"- {p}" for p in problems)])
        module.fail_json(msg=text, changed_files=[])
    changed = [entry.dest for entry in entries if entry.changed]
    result: dict[str, Any] = {"changed": bool(changed), "changed_files": changed}
    if module._diff:
        result["diff"] = [diff for entry in entries if entry.changed for diff in entry.diffs()]
    if not module.check_mode:
        sweep(os.path.dirname(entry.path) for entry in entries if entry.kind in ("file", "link"))
        if changed:
            done: list[str] = []
            try:
                apply_all(module, entries, done)
            except EntryError as error:
                module.fail_json(msg=str(error), changed=bool(done), changed_files=done)
    module.exit_json(**result)


if __name__ == "__main__":
    main()

#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Host side of the `units` module."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: units
short_description: Bring systemd units into their wanted state in one remote call
description:
  - Writes unit files and drop-ins, reloads systemd once if needed, masks, enables, starts, restarts, reloads, stops and
    removes units, in the given order, in one task.
  - A unit is restarted because its running process has not seen the present content of its files, not because an
    earlier task of the same run changed one. For this the module keeps, under C(/var/lib/evenkeel/units), the hashes of
    the files that each unit was last started with. A run that was interrupted between writing the files and restarting
    the unit is therefore finished by the next run, and no handler is needed.
  - A process that systemd or an operator started later than the module did (after a crash or a reboot) has seen every
    file that is older than itself, and is restarted only for newer ones.
  - A unit that was running before the module knew it (a packaged service that C(apt) started with its default
    configuration) is restarted once, if it has files to depend on.
  - A unit that does not start fails the task with one message that holds its name, its result and the last lines of
    its journal. What it was started with is not recorded then, so that the next run tries again.
  - In check mode the module predicts. A unit whose package is not installed yet is not an error there.
options:
  units:
    description: The units, handled in this order. Those with O(units[].state=absent) come first.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: The whole name, such as V(etcd.service), V(patroni@core.service) or V(vacuum@.timer).
        type: str
        required: true
      template:
        description: Name of a template in the C(templates/) of the role or playbook that becomes
          C(/etc/systemd/system/<name>). Left out for a packaged unit.
        type: str
      content:
        description: The text of the unit file, instead of O(units[].template).
        type: str
      drop_in:
        description: A mapping with C(template) or C(content), written to C(/etc/systemd/system/<name>.d/evenkeel.conf).
          Leaving it out does not remove an older one.
        type: dict
        suboptions:
          template:
            description: Name of a template.
            type: str
          content:
            description: The text itself.
            type: str
      vars:
        description: Template variables for this unit only.
        type: dict
      enabled:
        description: Whether the unit starts at boot. Left alone when it is not given. A unit without an C([Install])
          section counts as enabled, as for M(ansible.builtin.systemd_service).
        type: bool
      masked:
        description: Whether the unit is masked. Left alone when it is not given. Masking does not stop a running unit.
        type: bool
      state:
        description:
          - V(started) starts the unit if it does not run, and keeps it on its present files.
          - V(stopped) stops it.
          - V(absent) stops and disables the unit and removes its unit file and drop-in from C(/etc/systemd/system).
          - Left alone when it is not given.
        type: str
        choices: [started, stopped, absent]
      restart:
        description: Whether the module restarts the unit when its running process has not seen the present content of its
          files. V(false) leaves it running and names it in RV(due), for a task that restarts members of a cluster one after
          another; it stays due in later runs until something has restarted it. Starting and reloading are not affected.
        type: bool
        default: true
      restart_on:
        description: Files whose content the process reads when it starts. It is restarted when it has not seen their
          present content. Its unit file and drop-in, and those of its template, always count. A file may not exist yet.
          A link to a directory counts as what it leads to, so that a switched release is seen.
        type: list
        elements: str
      reload_on:
        description: The same, with a reload. A unit that cannot reload is restarted.
        type: list
        elements: str
      requires_path:
        description: While this path does not exist the unit is installed and enabled, but not started.
        type: str
  changed_files:
    description: The C(changed_files) of the M(files) task that wrote these files. In check mode the module needs them
      to know what would have changed. Otherwise they restart a unit whose file was changed by hand, loaded by the
      process and is now put right.
    type: list
    elements: str
  vars:
    description: Variables of all templates. What is expensive to compute is computed once here, not once for each template.
    type: dict
  parallel:
    description: Whether all services that are to be started or restarted are so at the same time, ordered by nothing but their own
      C(After=), and before what else O(units) names. One that does not come up does not keep the others from it.
    type: bool
    default: false
  timeout_seconds:
    description: How long the whole task may wait for systemd.
    type: int
    default: 300
author:
  - Evenkeel contributors (@evenkeel)
attributes:
  check_mode:
    support: full
    description: Predicts what would change.
  diff_mode:
    support: full
    description: A diff for each file, and one for each unit that is enabled, started or restarted, with the reason.
"""

EXAMPLES = r"""
- name: Run etcd
  units:
    changed_files: "{{ __etcd_files.changed_files }}"
    units:
      - name: etcd.service
        drop_in: {template: etcd.conf.j2}
        enabled: true
        state: started
        restart_on: [/etc/etcd/etcd.yml, /etc/evenkeel/pki/host.crt]
      - {name: etcd-snapshot.service, template: etcd-snapshot.service.j2}
      - {name: etcd-snapshot.timer, template: etcd-snapshot.timer.j2, enabled: true, state: started}
      - {name: etcd-old.service, state: absent}
"""

RETURN = r"""
changed_units:
  description: The units that were changed in any way or, in check mode, would be.
  returned: always
  type: list
  elements: str
  sample: [etcd.service]
started:
  description: The units that were started.
  returned: always
  type: list
  elements: str
restarted:
  description: The units that were restarted.
  returned: always
  type: list
  elements: str
reloaded:
  description: The units that were reloaded.
  returned: always
  type: list
  elements: str
due:
  description: The running units with O(units[].restart=false) that need a restart. They alone change nothing.
  returned: always
  type: list
  elements: str
waiting:
  description: The units that were left stopped because their O(units[].requires_path) does not exist.
  returned: always
  type: list
  elements: str
diff:
  description: For each changed file and unit what was and what is, when diffs are asked for.
  returned: in diff mode
  type: list
  elements: dict
"""

import base64
import contextlib
import json
import os
import stat
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_files import PayloadError, decode_payload
from ansible.module_utils.evenkeel_host import (
    Attributes,
    attributes_of,
    content_diff,
    content_hash,
    describe,
    lstat,
    make_directory,
    remove,
    state_diff,
    sweep,
    write_file,
)
from ansible.module_utils.evenkeel_units import (
    CLOCK_MARGIN_SECONDS,
    PROPERTIES,
    UNSEEN,
    Live,
    Plan,
    Record,
    Trigger,
    Wanted,
    definition_paths,
    drop_in_path,
    install_section,
    is_template,
    parse_show,
    plan_unit,
    record_path,
    template_of,
    unit_path,
)

UNIT_ATTRIBUTES = Attributes(0, 0, 0o644)
DIRECTORY_ATTRIBUTES = Attributes(0, 0, 0o755)
RECORD_ATTRIBUTES = Attributes(0, 0, 0o600)
RECORD_DIRECTORY_ATTRIBUTES = Attributes(0, 0, 0o700)
JOURNAL_LINES = 15
QUERY_SECONDS = 30
SETTLE_SECONDS = 0.5

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "units": {
        "type": "list",
        "elements": "dict",
        "options": {
            "name": {"type": "str", "required": True},
            "template": {"type": "str"},
            "content": {"type": "str"},
            "drop_in": {"type": "dict", "options": {"template": {"type": "str"}, "content": {"type": "str"}}},
            "vars": {"type": "dict"},
            "enabled": {"type": "bool"},
            "masked": {"type": "bool"},
            "state": {"type": "str", "choices": ["started", "stopped", "absent"]},
            "restart": {"type": "bool", "default": True},
            "restart_on": {"type": "list", "elements": "str"},
            "reload_on": {"type": "list", "elements": "str"},
            "requires_path": {"type": "str"},
        },
    },
    "changed_files": {"type": "list", "elements": "str"},
    "parallel": {"type": "bool", "default": False},
    "timeout_seconds": {"type": "int", "default": 300},
    "vars": {"type": "dict"},
    "payload": {"type": "str", "no_log": True},
}


class UnitError(Exception):
    """A unit that did not reach its wanted state; the text is for people."""


class Systemd:
    """The systemctl and journalctl of this host, with one time limit over all calls."""

    def __init__(self, timeout_seconds: int) -> None:
        self.timeout_seconds = timeout_seconds
        self.began = time.time()
        self.deadline = time.monotonic() + timeout_seconds
        self.environment = {**os.environ, "LC_ALL": "C", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""}

    def call(self, *words: str) -> tuple[int, str]:
        """Run systemctl and return its exit code and what it said."""
        return self._run(["systemctl", "--no-ask-password", *words], max(self.deadline - time.monotonic(), 0.1))

    def must(self, what: str, *words: str) -> None:
        """Run a systemctl command that is about configuration and must work."""
        code, said = self.call(*words)
        if code != 0:
            raise UnitError(f"systemctl could not {what}: {said or f'exit {code}'}")

    def show(self, names: Sequence[str]) -> dict[str, Live]:
        """Ask about all units at once."""
        if not names:
            return {}
        asked = ["--timestamp=us+utc", f"--property={','.join(PROPERTIES)}", "--", *names]
        code, said = self._run(["systemctl", "show", *asked], QUERY_SECONDS)
        try:
            answers: dict[str, Live] = parse_show(said, names)
        except ValueError as error:
            raise UnitError(f"systemd does not answer as expected ({error}; exit {code}): {said[-500:]}") from None
        return answers

    def journal(self, name: str, invocation: str) -> str:
        """Return the last lines of the unit's present invocation, or else what was said about it in this run."""
        plain = ["journalctl", "--quiet", "--no-pager", "--no-hostname", "--output=short", f"--lines={JOURNAL_LINES}"]
        self._run(["journalctl", "--sync"], QUERY_SECONDS)
        matches = [f"_SYSTEMD_INVOCATION_ID={invocation}", "+", f"INVOCATION_ID={invocation}"] if invocation else []
        # what a process says in its last moment carries its unit, but not always its invocation
        by_unit = [f"_SYSTEMD_UNIT={name}", "+", f"UNIT={name}", f"--since=@{int(self.began)}"]
        _code, lines = self._run([*plain, *matches, *(["+"] if matches else []), *by_unit], QUERY_SECONDS)
        if not lines and matches:
            _code, lines = self._run([*plain, *matches], QUERY_SECONDS)
        return lines or "(nothing)"

    def _run(self, words: list[str], seconds: float) -> tuple[int, str]:
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self.environment,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return -1, f"no end after {round(seconds)} s"
        except FileNotFoundError:
            raise UnitError(f"{words[0]} is not on this host; the units module needs systemd") from None
        return done.returncode, done.stdout.decode("utf-8", "replace").strip()


class Unit:
    """One entry: what is wanted, what is there, what has to be done."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.name: str = raw["name"]
        self.state: str | None = raw.get("state")
        self.wanted = Wanted(
            name=self.name,
            enabled=raw.get("enabled"),
            masked=raw.get("masked"),
            state=self.state,
            restart=raw.get("restart", True),
            restart_on=tuple(raw.get("restart_on") or ()),
            reload_on=tuple(raw.get("reload_on") or ()),
            requires_path=raw.get("requires_path"),
        )
        self.contents = {item["dest"]: base64.b64decode(item["data"]) for item in raw["writes"]}
        self.origins: dict[str, str] = {item["dest"]: item["source"] for item in raw["writes"]}
        self.before: dict[str, bytes | None] = {dest: read(dest) for dest in self.contents}
        self.to_write = [dest for dest, data in self.contents.items() if differs(dest, data, self.before[dest])]
        self.live = Live()
        self.plan = Plan()
        self.reenable = False
        self.restarts_before = 0
        self.removed: list[str] = []
        self.shown: list[dict[str, Any]] = []

    @property
    def changed(self) -> bool:
        """Whether anything about the unit changes."""
        return bool(self.to_write or self.removed) or self.plan.changes or self.outdated

    @property
    def outdated(self) -> bool:
        """Whether systemd runs the unit by an older definition than the one on the disk."""
        return self.state != "absent" and self.live.needs_reload

    @property
    def runs(self) -> bool:
        """Whether systemd can be asked about the unit: not about a template without an instance."""
        return not is_template(self.name)

    def plan_absence(self) -> None:
        """Plan the removal of the unit."""
        found = [path for path in (unit_path(self.name), drop_in_path(self.name)) if is_regular(path)]
        self.removed = found
        self.plan.run = "stop" if self.live.active not in ("inactive", "failed") else ""
        self.plan.disable = self.live.file_state in ("enabled", "enabled-runtime", "linked")

    def make_plan(self, changed_files: set[str], written: set[str], *, check_mode: bool) -> None:
        """Plan the way to the wanted state. `written` are the unit files of the task that change."""
        paths = {*definition_paths(self.name), *self.wanted.restart_on, *self.wanted.reload_on}
        triggers = {path: trigger(path) for path in paths}
        required = self.wanted.requires_path
        limit = self.live.started_at - CLOCK_MARGIN_SECONDS
        fresh = {path for path in changed_files if check_mode or path not in paths or triggers[path].changed_at > limit}
        self.plan = plan_unit(
            self.wanted,
            self.live,
            triggers,
            read_record(self.name),
            definition_changes=any(path in written for path in definition_paths(self.name)),
            changed_files=fresh,
            path_exists=required is None or os.path.exists(required) or (check_mode and required in changed_files),
        )
        dest = unit_path(self.name)
        if self.wanted.enabled and self.live.file_state == "enabled" and dest in self.to_write:
            before = self.before[dest]
            self.reenable = before is not None and install_section(before) != install_section(self.contents[dest])
        self._show_state()

    def _show_state(self) -> None:
        before: dict[str, Any] = {}
        after: dict[str, Any] = {}
        if self.plan.mask or self.plan.unmask:
            before["masked"], after["masked"] = self.live.masked, self.plan.mask
        if self.plan.enable or self.plan.disable:
            before["enabled"], after["enabled"] = self.plan.disable, self.plan.enable
        if self.plan.run:
            before["state"] = self.live.active
            after["state"] = {"start": "started", "stop": "stopped", "reload": "reloaded", "restart": "restarted"}[self.plan.run]
            if self.plan.reasons:
                after["because_of"] = self.plan.reasons
        if self.outdated:
            before["definition"], after["definition"] = "older than its files", "read again"
        if after:
            self.shown.append(state_diff(self.name, before, after))

    def diffs(self) -> list[dict[str, Any]]:
        """Describe everything that changes."""
        files: list[dict[str, Any]] = []
        for dest in self.to_write:
            if self.before[dest] != self.contents[dest]:
                before, after = self.before[dest], self.contents[dest]
                files.append(content_diff(dest, self.origins[dest], before, after, secret=False))
            else:
                found = lstat(dest)
                then = describe(attributes_of(found)) if found else {}
                files.append(state_diff(dest, then, describe(UNIT_ATTRIBUTES)))
        files += [state_diff(path, {"state": "file"}, {"state": "absent"}) for path in self.removed]
        return [*files, *self.shown]

    def write(self) -> None:
        """Write the unit file and the drop-in."""
        for dest in self.to_write:
            directory = os.path.dirname(dest)
            if not os.path.isdir(directory):
                make_directory(directory, DIRECTORY_ATTRIBUTES)
            write_file(dest, self.contents[dest], UNIT_ATTRIBUTES)

    def erase(self) -> None:
        """Remove the unit file, the drop-in, its directory if nothing else is in it, and the record."""
        for path in self.removed:
            remove(path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(drop_in_path(self.name)))
        remove(record_path(self.name))

    def record(self, live: Live) -> None:
        """Keep what the running process has seen."""
        paths = sorted({*definition_paths(self.name), *self.wanted.restart_on, *self.wanted.reload_on})
        files = {path: UNSEEN if path in self.plan.unseen else trigger(path).digest for path in paths}
        if read_record(self.name) == Record(files, live.invocation):
            return
        value = {"invocation": live.invocation, "files": files}
        path = record_path(self.name)
        if not os.path.isdir(os.path.dirname(os.path.dirname(path))):
            make_directory(os.path.dirname(os.path.dirname(path)), DIRECTORY_ATTRIBUTES)
        if not os.path.isdir(os.path.dirname(path)):
            make_directory(os.path.dirname(path), RECORD_DIRECTORY_ATTRIBUTES)
        write_file(path, json.dumps(value, indent=1, sort_keys=True).encode() + b"\n", RECORD_ATTRIBUTES)


def read(path: str) -> bytes | None:
    """Return a regular file's bytes, None when there is none at this place."""
    if not is_regular(path):
        return None
    with open(path, "rb") as file:
        return file.read()


def is_regular(path: str) -> bool:
    """Say whether a file, not a link, is at a path."""
    found = lstat(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def differs(path: str, data: bytes, before: bytes | None) -> bool:
    """Say whether a unit file has another content or other attributes than it shall have."""
    found = lstat(path)
    return found is None or before != data or attributes_of(found) != UNIT_ATTRIBUTES


def trigger(path: str) -> Trigger:
    """Return what a trigger file is now. Links that systemctl made beside the units do not count as files."""
    if path.startswith("/etc/systemd/system/") and not is_regular(path):
        return Trigger("absent")
    directory = os.path.isdir(path)
    digest = f"directory {os.path.realpath(path)}" if directory else content_hash(path)
    times = [0.0]
    for look in (os.lstat,) if directory else (os.lstat, os.stat):
        with contextlib.suppress(OSError):
            times.append(look(path).st_ctime)
    return Trigger(digest, max(times))


def read_record(name: str) -> Record | None:
    """Return what the module kept about a unit; a damaged record counts as none."""
    try:
        with open(record_path(name), encoding="utf-8") as file:
            value = json.load(file)
        return Record(dict(value["files"]), str(value["invocation"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Run:
    """One call of the module on one host."""

    def __init__(self, systemd: Systemd, units: list[Unit], changed_files: set[str], *, check_mode: bool, parallel: bool = False) -> None:
        self.systemd = systemd
        self.units = units
        self.parallel = parallel
        self.changed_files = changed_files
        self.check_mode = check_mode
        self.written = {dest for unit in units for dest in unit.to_write}
        self.done: dict[str, list[str]] = {"started": [], "restarted": [], "reloaded": [], "waiting": []}
        self.touched: list[str] = []

    def look(self) -> None:
        """Ask systemd about every unit and plan."""
        names = [unit.name for unit in self.units if unit.runs]
        answers = self.systemd.show(names)
        unknown: list[str] = []
        provided = {unit.name for unit in self.units if unit_path(unit.name) in unit.contents}
        for unit in self.units:
            unit.live = answers.get(unit.name, Live())
            if unit.state == "absent":
                unit.plan_absence()
                unit._show_state()
                continue
            if unit.runs:
                unit.make_plan(self.changed_files, self.written, check_mode=self.check_mode)
            needs = unit.state == "started" or unit.wanted.enabled
            comes = {unit.name, template_of(unit.name)} & provided
            if needs and unit.runs and not unit.live.known and not comes:
                unknown.append(unit.name)
        if unknown and not self.check_mode:
            names_text = ", ".join(unknown)
            raise UnitError(
                f"this host has no unit {names_text}, and the task gives no content for it. Nothing was changed. "
                "Is the package that brings it installed?"
            )

    def apply(self) -> None:
        """Do what was planned."""
        absent = [unit for unit in self.units if unit.state == "absent"]
        present = [unit for unit in self.units if unit.state != "absent"]
        for unit in absent:
            self._remove(unit)
        failed = [unit.name for unit in absent if unit.live.active == "failed"]
        if failed:
            self.systemd.call("reset-failed", "--", *failed)
        for unit in present:
            if unit.to_write:
                self.touched.append(unit.name)
                unit.write()
        self._configure(present)
        reload = bool(self.written) or any(unit.removed for unit in absent)
        reload = reload or any(unit.outdated for unit in present)
        reload = reload or any(unit.plan.changes and not unit.live.known for unit in present)
        if reload or self._reconfigured(present):
            self.systemd.must("reload its configuration", "daemon-reload")
        self._run_units(present)

    def _remove(self, unit: Unit) -> None:
        if unit.changed:
            self.touched.append(unit.name)
        if unit.plan.run == "stop":
            self._job(unit, "stop")
        if unit.plan.disable:
            self.systemd.must(f"disable {unit.name}", "disable", "--no-reload", "--", unit.name)
        unit.erase()

    def _reconfigured(self, units: list[Unit]) -> bool:
        return any(unit.reenable or unit.plan.enable or unit.plan.disable or unit.plan.mask or unit.plan.unmask for unit in units)

    def _configure(self, units: list[Unit]) -> None:
        for verb in ("unmask", "mask", "disable", "enable"):
            names = [unit.name for unit in units if getattr(unit.plan, verb)]
            if names:
                self.touched += names
                self.systemd.must(f"{verb} {', '.join(names)}", verb, "--no-reload", "--", *names)
        again = [unit.name for unit in units if unit.reenable]
        if again:
            self.systemd.must(f"enable {', '.join(again)} again", "reenable", "--no-reload", "--", *again)

    def _run_units(self, units: list[Unit]) -> None:
        starting = [unit for unit in units if unit.plan.run in ("start", "restart")]
        if starting:  # clears failures and the count of recent starts; an unknown unit is no problem
            self.systemd.call("reset-failed", "--", *[unit.name for unit in starting])
        together = [unit for unit in starting if unit.name.endswith(".service")] if self.parallel else []
        ran, problems = self._run_together(together)
        for index, unit in enumerate(units):
            if unit.plan.waiting:
                self.done["waiting"].append(unit.name)
            if not (unit.plan.run or unit.plan.join) or problems or unit in together:
                continue
            self.touched += [unit.name] if unit.plan.run else []
            try:
                self._run_unit(unit, units[index + 1 :])
                ran += [unit] if unit.plan.run != "stop" else []
            except UnitError as error:
                problems.append(str(error))
        answers = self._settle(ran)
        for unit in ran:  # what did start is recorded even when another unit failed
            try:
                self._judge(unit, answers[unit.name])
            except UnitError as error:
                problems.append(str(error))
                continue
            unit.record(answers[unit.name])
            key = {"start": "started", "restart": "restarted", "reload": "reloaded"}.get(unit.plan.run)
            if key:
                self.done[key].append(unit.name)
        if problems:
            raise UnitError("\n".join(problems))
        self._refresh(units)

    def _run_together(self, units: list[Unit]) -> tuple[list[Unit], list[str]]:
        """Start and restart services at the same time; returns those that came up, and what is wrong with the others."""
        if not units:
            return [], []
        self.touched += [unit.name for unit in units]
        code, said = self.systemd.call("restart", "--", *[unit.name for unit in units])
        answers = self.systemd.show([unit.name for unit in units])
        for unit in units:
            unit.restarts_before = answers[unit.name].restarts
        lost = [unit for unit in units if code != 0 and answers[unit.name].active not in ("active", "reloading")]
        problems = [self._failure(unit, unit.plan.run, answers[unit.name], code, said) for unit in lost]
        return [unit for unit in units if unit not in lost], problems

    def _run_unit(self, unit: Unit, later: list[Unit]) -> None:
        halted: list[str] = []
        if unit.plan.run == "restart" and unit.name.endswith(".socket"):
            halted = self._halt(unit)
        self._job(unit, unit.plan.run or "start")
        if unit.plan.run in ("start", "restart"):  # it may have been in a loop of restarts before: those do not count
            unit.restarts_before = self.systemd.show([unit.name])[unit.name].restarts
        followers = {other.name: other for other in later if other.state == "started"}
        for name in halted:
            if name in followers:
                followers[name].plan.run = "restart"
            else:
                self.systemd.must(f"start {name} after {unit.name}", "start", "--", name)

    def _halt(self, socket: Unit) -> list[str]:
        """Stop the running services of a socket, which systemd refuses to restart under them."""
        answers = self.systemd.show(list(socket.live.triggers))
        halted = [name for name, live in answers.items() if live.running]
        for name in halted:
            self.systemd.must(f"stop {name} before {socket.name}", "stop", "--", name)
        return halted

    def _settle(self, units: list[Unit]) -> dict[str, Live]:
        if any(unit.plan.run in ("start", "restart") and unit.name.endswith(".service") for unit in units):
            time.sleep(SETTLE_SECONDS)  # a simple service counts as started before it has read its configuration
        return self.systemd.show([unit.name for unit in units])

    def _refresh(self, units: list[Unit]) -> None:
        """Bring the records of untouched units up to their present process, which has seen the same files."""
        for unit in units:
            if unit.state == "started" and not unit.plan.run and not unit.plan.join and unit.live.running:
                record = read_record(unit.name)
                if record is None or record.invocation != unit.live.invocation or unit.plan.unseen:
                    unit.record(unit.live)

    def _job(self, unit: Unit, verb: str) -> None:
        code, said = self.systemd.call(verb, "--", unit.name)
        if code == 0:
            return
        raise UnitError(self._failure(unit, verb, self.systemd.show([unit.name])[unit.name], code, said))

    def _failure(self, unit: Unit, verb: str, live: Live, code: int, said: str) -> str:
        if code == -1:
            limit = self.systemd.timeout_seconds
            head = f"{unit.name}: {verb} has not ended within timeout_seconds={limit}; it is {live.active} ({live.sub})"
        else:
            how = "" if live.result in ("", "success") else f", {outcome(live)}"
            head = f"{unit.name}: {verb} failed{how}; systemctl said: {said.splitlines()[0] if said else 'nothing'}"
        return f"{head}\n{self._evidence(unit.name, live)}"

    def _judge(self, unit: Unit, live: Live) -> None:
        if not live.condition and not live.running:
            raise UnitError(
                f"{unit.name}: was not started, because a condition of its unit file is not met (systemctl status {unit.name} names it)"
            )
        ended_again = unit.plan.run in ("start", "restart") and live.restarts > unit.restarts_before
        if live.active == "failed" or live.sub == "auto-restart" or ended_again:
            head = f"{unit.name}: ended at once after {unit.plan.run or 'start'}, {outcome(live)}"
            raise UnitError(f"{head}\n{self._evidence(unit.name, live)}")

    def _evidence(self, name: str, live: Live) -> str:
        lines = "\n".join(f"  {line}" for line in self.systemd.journal(name, live.invocation).splitlines())
        return f"The last lines of its journal:\n{lines}\nMore: journalctl --unit={name}"


def outcome(live: Live) -> str:
    """Say in words how a unit ended."""
    text = f"result {live.result or 'unknown'}"
    how = {"1": "exit status", "2": "signal", "3": "signal (core dumped)"}.get(live.exit_code)
    return f"{text}, {how} {live.exit_status}" if how and live.exit_status not in ("", "0") else text


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    if not module.params["payload"]:
        module.fail_json(msg="units works through its action plugin: set action_plugins in ansible.cfg")
    try:
        payload = decode_payload(module.params["payload"])
        units = [Unit(raw) for raw in payload["units"]]
    except (PayloadError, OSError) as error:
        module.fail_json(msg=f"units: {error}")
    systemd = Systemd(module.params["timeout_seconds"])
    run = Run(systemd, units, set(payload["changed_files"]), check_mode=module.check_mode, parallel=module.params["parallel"])
    diffs: list[dict[str, Any]] = []
    try:
        run.look()
        diffs = [diff for unit in units if unit.changed for diff in unit.diffs()]
        if not module.check_mode:
            sweep(os.path.dirname(dest) for unit in units for dest in unit.contents)
            if any(unit.changed or unit.plan.join for unit in units):
                run.apply()
            else:
                run._refresh(units)
                run.done["waiting"] = [unit.name for unit in units if unit.plan.waiting]
    except (UnitError, OSError) as error:
        touched = [unit.name for unit in units if unit.name in run.touched]
        module.fail_json(msg=str(error), changed=bool(touched), changed_units=touched)
    changed = [unit.name for unit in units if unit.changed]
    run.done["due"] = [unit.name for unit in units if unit.plan.unseen]
    if module.check_mode:
        for verb, key in (("start", "started"), ("restart", "restarted"), ("reload", "reloaded")):
            run.done[key] = [unit.name for unit in units if unit.plan.run == verb]
        run.done["waiting"] = [unit.name for unit in units if unit.plan.waiting]
    result: dict[str, Any] = {"changed": bool(changed), "changed_units": changed, **run.done}
    if module._diff:
        result["diff"] = diffs
    module.exit_json(**result)


if __name__ == "__main__":
    main()

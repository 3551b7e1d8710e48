#!/usr/bin/python3 -IS
"""The start-up steps of an application's processes, run by systemd before the main process.

``prepare`` runs with full privileges and makes the directories of one step. ``run`` runs as the application's user, in
the sandbox of the process, and checks the variables and paths of the step, then runs its command. ``start`` has full
privileges again: it starts the step's tasks and does not wait for them. systemd calls them for one step after another;
the first that fails stops the start with one line. ``--check``, the dry run of a start, tells all that is missing; so does
``--paths``, before site.yml or deploy.yml changes a host, of what they do not bring themselves.

The steps stand in ``/etc/<app>/bootstrap/<process>.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import grp
import json
import os
import pwd
import shlex
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CONFIGURATION = Path("/etc")
SYSTEMCTL = ("/usr/bin/systemctl", "--no-ask-password")
SYSTEMCTL_SECONDS = 10
OK, FAILED, USAGE = 0, 1, 2
ABSENT = b"not-on-this-host"  # as in the unit of the dry run


class BootstrapError(Exception):
    """The process cannot start; the message is the one line that says why."""


@dataclass(frozen=True)
class Directory:
    """A directory that must exist with the application's user and this mode."""

    path: str
    mode: int


@dataclass(frozen=True)
class Step:
    """One step, as the contract has it."""

    name: str
    environment: dict[str, str]
    directories: tuple[Directory, ...]
    writable: tuple[str, ...]
    command: tuple[str, ...]
    start: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """The steps of one process in the order of their names."""

    app: str
    process: str
    user: str
    group: str
    steps: tuple[Step, ...]
    program: str = ""
    credentials: dict[str, str] = field(default_factory=dict)


def load_table(app: str, process: str) -> Table:
    """Read the table that the role wrote."""
    path = CONFIGURATION / app / "bootstrap" / f"{process}.json"
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BootstrapError(
            f"{app} {process}: {path} is missing: it lists the start-up steps; run playbooks/site.yml for this host"
        ) from None
    return read_table(data)


def read_table(data: Mapping[str, Any]) -> Table:
    """The table of one process."""
    steps = [
        Step(
            step["name"],
            dict(step["environment"]),
            tuple(Directory(directory["path"], int(directory["mode"], 8)) for directory in step["directories"]),
            tuple(step["writable"]),
            tuple(step["command"]),
            tuple(step.get("start", ())),
        )
        for step in data["steps"]
    ]
    ordered = tuple(sorted(steps, key=lambda step: step.name))
    program, credentials = data.get("program", ""), dict(data.get("credentials", {}))
    return Table(data["app"], data["process"], data["user"], data["group"], ordered, program, credentials)


def pick(table: Table, name: str) -> Step:
    """One step by its name."""
    for step in table.steps:
        if step.name == name:
            return step
    known = ", ".join(step.name for step in table.steps)
    raise BootstrapError(f"{table.app} {table.process}: there is no step {name}; known are {known}")


# --- what can be missing ----------------------------------------------------------------------------------------------


def missing_variables(step: Step, environment: Mapping[str, str]) -> list[str]:
    """One sentence for each variable that is absent or empty."""
    return [f"variable {name} is not set: {purpose}" for name, purpose in step.environment.items() if not environment.get(name)]


def unwritable(path: str, user: str) -> str | None:
    """Why `user` (who we are) cannot write to the directory, as a sentence."""
    why = "the process writes there"
    try:
        kind = Path(path).stat().st_mode
    except FileNotFoundError:
        return (
            f"directory {path} does not exist: {why}; create it: install -d -o {user} -g {user} -m 0750 {path}, "
            "or list it under directories in app.bootstrap"
        )
    except PermissionError:
        return f"directory {path} cannot be reached by {user}: {why}; give {user} the right x on the directories above"
    if not stat.S_ISDIR(kind):
        return f"{path} is not a directory: {why}; move it away"
    # Not access(2), which does not know about quotas, full disks and the like: S2 wants the truth, so write.
    probe = Path(path) / f".evenkeel-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        probe.unlink()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return f"directory {path} is not writable by {user} ({reason}): {why}; correct it: chown {user} {path}"
    return None


# --- what a step does -------------------------------------------------------------------------------------------------


def make_directory(directory: Directory, uid: int, gid: int) -> None:
    """Make one directory right. Follows no symbolic link: a part of the path may belong to an unprivileged user."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    place = os.open("/", flags)
    parts = [part for part in directory.path.split("/") if part]
    try:
        for number, part in enumerate(parts):
            try:
                deeper = os.open(part, flags, dir_fd=place)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):  # another process of the application starts at the same time
                    os.mkdir(part, 0o700, dir_fd=place)
                deeper = os.open(part, flags, dir_fd=place)
                if number < len(parts) - 1:  # one on the way: whose it is, its own parent says
                    parent = os.fstat(place)
                    os.fchown(deeper, parent.st_uid, parent.st_gid)
                    os.fchmod(deeper, 0o755)
            os.close(place)
            place = deeper
        status = os.fstat(place)
        if (status.st_uid, status.st_gid) != (uid, gid):
            os.fchown(place, uid, gid)
        if stat.S_IMODE(status.st_mode) != directory.mode:
            os.fchmod(place, directory.mode)
    finally:
        os.close(place)


def prepare(table: Table, step: Step) -> None:
    """The privileged part of a step."""
    uid, gid = pwd.getpwnam(table.user).pw_uid, grp.getgrnam(table.group).gr_gid
    for directory in step.directories:
        try:
            make_directory(directory, uid, gid)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise BootstrapError(
                f"{label(table, step)}: directory {directory.path} cannot be made ({reason}): the process needs it "
                f"with owner {table.user} and mode {directory.mode:04o}; correct it: "
                f"install -d -o {table.user} -g {table.group} -m {directory.mode:04o} {directory.path}"
            ) from None


def program_of(command: Sequence[str]) -> str:
    """The path of a command's program: in the release, unless it is absolute."""
    return command[0] if command[0].startswith("/") else str(Path.cwd() / "venv" / "bin" / command[0])


def run_command(table: Table, step: Step) -> None:
    """Run the step's command in the release; its own output goes to the journal as it is."""
    words = [word.replace("{credentials}", os.environ.get("CREDENTIALS_DIRECTORY", "")) for word in step.command]
    argv = [program_of(words), *words[1:]]
    shown = shlex.join(step.command)
    try:
        code = subprocess.run(argv, stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        raise BootstrapError(
            f"{label(table, step)}: {shown} cannot be run ({error.strerror}): {argv[0]}; "
            "correct the command in app.bootstrap or deploy a release that has it"
        ) from None
    if code:
        end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise BootstrapError(f"{label(table, step)}: {shown} {end}; its output stands above")


def start(table: Table, step: Step) -> None:
    """Start the tasks of a step afresh, and do not wait: they hold the start up neither by their work nor by their failure.

    Afresh, because one that still works for an earlier release, or has been given up, would not see the present one.
    """
    for unit in step.start:
        # the count of its tries begins anew; nothing to do for a unit that has never run
        subprocess.run([*SYSTEMCTL, "reset-failed", "--", unit], capture_output=True, timeout=SYSTEMCTL_SECONDS, check=False)
        try:
            done = subprocess.run(
                [*SYSTEMCTL, "--no-block", "restart", "--", unit],
                capture_output=True,
                text=True,
                timeout=SYSTEMCTL_SECONDS,
                check=False,
            )
            problem = done.stderr.strip().rpartition("\n")[2] if done.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"systemd did not answer within {SYSTEMCTL_SECONDS} s"
        if problem:
            print(
                f"{label(table, step)}: {unit} was not started ({problem.rstrip('.')}); {table.process} starts without it. "
                f"When the cause is gone: systemctl start {unit}",
                file=sys.stderr,
            )


def label(table: Table, step: Step) -> str:
    """The beginning of each message."""
    return f"{table.app} {table.process}: step {step.name}"


def run(table: Table, step: Step) -> None:
    """The unprivileged part of a step; the first thing that is missing ends it."""
    for sentence in missing_variables(step, os.environ):
        raise BootstrapError(f"{label(table, step)}: {sentence}")
    for path in step.writable:
        sentence_or_none = unwritable(path, table.user)
        if sentence_or_none:
            raise BootstrapError(f"{label(table, step)}: {sentence_or_none}")
    if step.command:
        run_command(table, step)


def missing_paths(table: Table, step: Step) -> list[str]:
    """One sentence for each directory that is not writable, and that the start itself does not put right before."""
    made = {directory.path: directory.mode for step in table.steps for directory in step.directories}
    paths = [path for path in step.writable if path not in made or is_right(path, made[path], table.user)]
    return [sentence for path in paths if (sentence := unwritable(path, table.user))]


def is_right(path: str, mode: int, user: str) -> bool:
    """Whether the start would leave the directory as it is."""
    try:
        found = Path(path).lstat()
        return stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == mode and found.st_uid == pwd.getpwnam(user).pw_uid
    except OSError:
        return False


def missing_programs(table: Table, step: Step | None = None) -> list[str]:
    """One sentence for a program that the release does not have."""
    command = step.command if step else (table.program,)
    program = program_of(command) if command and command[0] else ""
    if not program or os.access(program, os.X_OK):
        return []
    what = f"app.bootstrap.{table.process}.{step.name}" if step else f"app.processes.{table.process}"
    return [f"program {program} cannot be run: correct the command in {what}, or deploy a release that has it"]


def no_credential(table: Table, name: str) -> str:
    """The sentence for one that is missing."""
    where = f"app.processes.{table.process}"
    return f"credential {name} is not there: {table.credentials[name]} does not exist; make it, or correct credentials in {where}"


def missing_credentials(table: Table) -> list[str]:
    """One sentence for each credential that is not there. The unit of the dry run has a word in its place (`SetCredential=`)."""
    folder = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"))
    return [
        no_credential(table, name) for name in table.credentials if not (folder / name).is_file() or (folder / name).read_bytes() == ABSENT
    ]


def check(table: Table) -> list[str]:
    """All that the start would miss, found as the process itself: by its user, in its sandbox, with what it is given."""
    here = f"{table.app} {table.process}"
    result = [f"{here}: {sentence}" for sentence in missing_credentials(table)]
    for step in table.steps:
        sentences = missing_variables(step, os.environ) + missing_paths(table, step)
        if released():
            sentences += missing_programs(table, step)
        result += [f"{label(table, step)}: {sentence}" for sentence in sentences]
    if not released():
        return [*result, f"{here}: no release is deployed on this host; run playbooks/deploy.yml"]
    return result + [f"{here}: {sentence}" for sentence in missing_programs(table)]


def released() -> bool:
    """Whether the working directory, which the unit has set, is a release."""
    return (Path.cwd() / "venv").is_dir()


def run_check(table: Table) -> int:
    """Print all that is missing, and change nothing."""
    missing = check(table)
    for sentence in missing:
        print(sentence)
    if missing:
        return FAILED
    print(f"{table.app} {table.process}: nothing is missing")
    return OK


def run_paths(tables: Sequence[Table]) -> int:
    """As root: print what will be missing on this host once the suite has done its part, and change nothing.

    Variables, directories of the contract and what lies below /etc/evenkeel are the suite's own part.
    """
    missing = [
        f"{table.app} {table.process}: {no_credential(table, name)}"
        for table in tables
        for name, path in table.credentials.items()
        if not path.startswith("/etc/evenkeel/") and not Path(path).exists()
    ]
    try:
        for table in tables[:1]:  # all are of one application
            become(table.user, table.group)
    except KeyError:
        tables = []  # a host that has not been converged yet
    missing += [f"{label(table, step)}: {sentence}" for table in tables for step in table.steps for sentence in missing_paths(table, step)]
    for sentence in dict.fromkeys(missing):
        print(sentence)
    return FAILED if missing else OK


def become(user: str, group: str) -> None:
    """Give up root's privileges."""
    uid, gid = pwd.getpwnam(user).pw_uid, grp.getgrnam(group).gr_gid
    os.setgroups([gid])
    os.setgid(gid)
    os.setuid(uid)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="bootstrap.py", description="Start-up steps of an application's processes.")
    verbs = result.add_mutually_exclusive_group(required=True)
    verbs.add_argument("--prepare", action="store_true", help="make the directories of the step (as root)")
    verbs.add_argument("--run", action="store_true", help="check and run the step (as the application's user)")
    verbs.add_argument("--start", action="store_true", help="start the tasks of the step, without waiting (as root)")
    verbs.add_argument("--check", action="store_true", help="print all that the start would miss (in the unit of the dry run)")
    verbs.add_argument("--paths", action="store_true", help="print which paths are missing for the tables on standard input (as root)")
    result.add_argument("app")
    result.add_argument("process", nargs="?")
    result.add_argument("step", nargs="?", help="this step only")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the verb."""
    options = parser().parse_args(argv)
    try:
        if options.paths:
            return run_paths([read_table(table) for table in json.load(sys.stdin)])
        if not options.process:
            raise BootstrapError("name the process, and the step if only one is wanted")
        if os.geteuid() == 0 and not (options.prepare or options.start):
            raise BootstrapError(
                f"{options.app}: root may write everywhere, so this says nothing; "
                f"type: systemctl start {options.app}-{options.process}-bootstrap-check; "
                f"journalctl -u {options.app}-{options.process}-bootstrap-check -n 20"
            )
        table = load_table(options.app, options.process)
        if options.check:
            return run_check(table)
        for step in [pick(table, options.step)] if options.step else table.steps:
            (prepare if options.prepare else start if options.start else run)(table, step)
    except BootstrapError as error:
        print(error, file=sys.stderr)
        return FAILED
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

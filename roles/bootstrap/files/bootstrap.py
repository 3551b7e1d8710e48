#!/usr/bin/python3 -IS
"""The start-up steps of an application's processes, run by systemd before the main process.

``prepare`` runs with full privileges and makes the directories of one step. ``run`` runs as the application's user, in
the sandbox of the process, and checks the variables and paths of the step, then runs its command. ``start`` has full
privileges again: it starts the step's tasks and does not wait for them. systemd calls them for one step after another;
the first that fails stops the start with one line. ``--list`` tells all that is missing.

The steps stand in ``/etc/<app>/bootstrap/<process>.json``.
"""

from __future__ import annotations

import argparse
import grp
import json
import os
import pwd
import shlex
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CONFIGURATION = Path("/etc")
SYSTEMCTL = ("/usr/bin/systemctl", "--no-ask-password")
SYSTEMCTL_SECONDS = 10
OK, FAILED, USAGE = 0, 1, 2


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
    own_environment: frozenset[str] = frozenset()


def load_table(app: str, process: str) -> Table:
    """Read the table that the role wrote."""
    path = CONFIGURATION / app / "bootstrap" / f"{process}.json"
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BootstrapError(
            f"{app} {process}: {path} is missing: it lists the start-up steps; run playbooks/site.yml for this host"
        ) from None
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
    own = frozenset(data.get("own_environment", ()))
    return Table(data["app"], data["process"], data["user"], data["group"], ordered, own)


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


def run_command(table: Table, step: Step) -> None:
    """Run the step's command in the release; its own output goes to the journal as it is."""
    words = [word.replace("{credentials}", os.environ.get("CREDENTIALS_DIRECTORY", "")) for word in step.command]
    program = words[0]
    argv = [program if program.startswith("/") else str(Path.cwd() / "venv" / "bin" / program), *words[1:]]
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


def list_missing(tables: Sequence[Table]) -> list[str]:
    """All that is missing for all steps, without changing anything or running any command."""
    result = []
    for table in tables:
        declared = {directory.path for step in table.steps for directory in step.directories}
        for step in table.steps:
            sentences = missing_variables(step, {**os.environ, **dict.fromkeys(table.own_environment, "set by its unit")})
            # A directory that a step will make need not be writable yet.
            paths = [path for path in step.writable if path not in declared or Path(path).exists()]
            sentences += [sentence for path in paths if (sentence := unwritable(path, table.user))]
            result += [f"{label(table, step)}: {sentence}" for sentence in sentences]
    return result


def run_list(app: str, processes: Sequence[str]) -> int:
    """Print all that is missing. A directory that the start itself makes is not."""
    folder = CONFIGURATION / app / "bootstrap"
    names = list(processes) or sorted(path.stem for path in folder.glob("*.json"))
    tables = [load_table(app, name) for name in names]
    missing = list_missing(tables)
    for sentence in missing:
        print(sentence)
    if missing:
        return FAILED
    print(f"{app}: nothing is missing for {', '.join(names) or 'any process'}")
    return OK


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="bootstrap.py", description="Start-up steps of an application's processes.")
    verbs = result.add_mutually_exclusive_group(required=True)
    verbs.add_argument("--prepare", action="store_true", help="make the directories of the step (as root)")
    verbs.add_argument("--run", action="store_true", help="check and run the step (as the application's user)")
    verbs.add_argument("--start", action="store_true", help="start the tasks of the step, without waiting (as root)")
    verbs.add_argument("--list", action="store_true", help="print all that is missing; exit code 1 if anything is")
    result.add_argument("app")
    result.add_argument("process", nargs="?", help="with --list: this process only")
    result.add_argument("step", nargs="?", help="this step only")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the verb."""
    options = parser().parse_args(argv)
    try:
        if os.geteuid() == 0 and not (options.prepare or options.start):
            raise BootstrapError(
                f"{options.app}: root may write everywhere, so this says nothing; "
                f"type: {options.app}-run /usr/local/lib/evenkeel/bootstrap.py --list {options.app}"
            )
        if options.list:
            return run_list(options.app, [options.process] if options.process else [])
        if not options.process:
            raise BootstrapError("name the process, and the step if only one is wanted")
        table = load_table(options.app, options.process)
        for step in [pick(table, options.step)] if options.step else table.steps:
            (prepare if options.prepare else start if options.start else run)(table, step)
    except BootstrapError as error:
        print(error, file=sys.stderr)
        return FAILED
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/python3 -IS
"""Run a command of a release as the application's user, with the environment and secrets of its processes.

Installed as ``<app>-run``. The command runs as a transient unit: systemd reads the environment files, so that no secret
passes through this program, its arguments or the shell. Standard input, output and the exit code are passed through.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CONFIGURATION = Path("/etc")
USAGE = 2
CANNOT_RUN = 127


class RunError(Exception):
    """The command cannot be started; the message says why and what to type."""


def release_directory(settings: Mapping[str, Any], release: str) -> Path:
    """Where the release lives."""
    if release == "current":
        directory = Path(settings["current"])
        if not directory.exists():
            raise RunError(f"{directory} does not exist: nothing is deployed here yet; run playbooks/deploy.yml")
        return directory.resolve()
    if "/" in release or release in {".", ".."}:
        raise RunError(f'"{release}" is not the id of a release')
    directory = Path(settings["releases"]) / release
    if not directory.is_dir():
        known = ", ".join(sorted(path.name for path in Path(settings["releases"]).glob("*/"))) or "none"
        raise RunError(f"release {release} is not on this host; here are: {known}")
    return directory


def find_program(release: Path, name: str) -> str:
    """The program of the release, else one of the system."""
    if name.startswith("/"):
        return name
    for folder in (release / "venv" / "bin", Path("/usr/local/bin"), Path("/usr/bin"), Path("/usr/sbin")):
        candidate = folder / name
        if os.access(candidate, os.X_OK):
            return str(candidate)
    raise RunError(f"{name} is neither in {release / 'venv' / 'bin'} nor among the system's programs")


def systemd_run(
    settings: Mapping[str, Any], release: Path, command: Sequence[str], timeout: int, room: Mapping[str, Any] | None = None
) -> list[str]:
    """The command line for systemd-run. room: what differs in the closed room of a rehearsal, {unit, environment, properties}."""
    room = room or {"environment": {}, "properties": []}
    properties = [
        f"User={settings['user']}",
        f"Group={settings['group']}",
        f"WorkingDirectory={release}",
        f"RuntimeMaxSec={timeout}",
        "KillMode=mixed",
        *(f"EnvironmentFile={path}" for path in settings["environment_files"]),
        *settings["properties"],
        *room["properties"],
    ]
    path = f"{release}/venv/bin:/usr/local/bin:/usr/bin:/bin"
    argv = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", f"--setenv=PATH={path}"]
    argv += [f"--unit={room['unit']}"] if "unit" in room else []
    argv += [f"--setenv={name}={value}" for name, value in sorted({**settings["environment"], **room["environment"]}.items())]
    argv += [f"--property={item}" for item in properties]
    # systemd would replace $NAME in the arguments by the variable's value.
    words = [find_program(release, command[0]), *command[1:]]
    return [*argv, "--", *(word.replace("$", "$$") for word in words)]


def parser(name: str) -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog=name,
        description="Run a command of a release as the application's user, with the environment of its processes.",
    )
    result.add_argument("--release", default="current", metavar="ID", help="which release; default: the current one")
    result.add_argument("--timeout", type=int, default=3600, metavar="SECONDS", help="end it after so long; default 3600")
    result.add_argument("--room", type=Path, metavar="FILE", help="within the closed room of a rehearsal, as its program describes it")
    result.add_argument("command", nargs=argparse.REMAINDER, help="a program of the release's venv, or an absolute path")
    return result


def replace_by(words: Sequence[str]) -> NoReturn:
    """Become another program."""
    os.execvp(words[0], list(words))


def main(argv: Sequence[str]) -> int:
    """Replace this process by systemd-run."""
    name = Path(argv[0]).name
    options = parser(name).parse_args(list(argv[1:]))
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    try:
        if not command:
            raise RunError(f"which command? For example: {name} python -m django --version")
        if os.geteuid() != 0:
            raise RunError(f"only root may read the secrets of the application; type: sudo {name} …")
        table = CONFIGURATION / name.removesuffix("-run") / "run.json"
        settings = json.loads(table.read_text(encoding="utf-8"))
        room = json.loads(options.room.read_text(encoding="utf-8")) if options.room else None
        words = systemd_run(settings, release_directory(settings, options.release), command, options.timeout, room)
    except RunError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return CANNOT_RUN
    except OSError as error:
        print(f"{name}: {error}; run playbooks/site.yml for this host", file=sys.stderr)
        return CANNOT_RUN
    replace_by(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv))

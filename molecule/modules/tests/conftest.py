"""Runs tasks on the host of group `modules` and tells what came of them."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
INVENTORY = os.environ.get("EVENKEEL_MODULES_INVENTORY", str(ROOT / "molecule/modules/inventory"))
SETTINGS = {
    "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
    "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
    "ANSIBLE_JSON_INDENT": "0",
    "ANSIBLE_FORCE_COLOR": "0",
    "ANSIBLE_NOCOLOR": "1",
}


@functools.cache
def forks() -> multiprocessing.context.ForkServerContext:
    """Processes that have Ansible loaded already: a hundred plays cost half the time of as many programs."""
    os.environ.update(SETTINGS)  # which Ansible reads when it is loaded
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "conftest", "ansible.cli.playbook", "ansible.executor.playbook_executor"])
    return context


def ansible_playbook(arguments: list[str], output: str) -> None:
    """Be ansible-playbook, in a process of its own."""
    from ansible.cli.playbook import main

    os.chdir(ROOT)
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["ansible-playbook", *arguments]
    sys.exit(main())


@dataclass(frozen=True)
class Outcome:
    """The result of each task, in order, and everything that was printed."""

    results: list[dict[str, Any]]
    text: str

    @property
    def last(self) -> dict[str, Any]:
        return self.results[-1]


class Play:
    """A folder with templates and files, and the way to run tasks with them on the host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("templates", "files"):
            (folder / name).mkdir()

    def source(self, kind: str, name: str, text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        (self.folder / kind / name).write_bytes(data)

    def run(
        self,
        *tasks: Mapping[str, Any],
        check: bool = False,
        variables: Mapping[str, Any] | None = None,
        arguments: tuple[str, ...] = (),
        fails: bool = False,
    ) -> Outcome:
        """Run tasks in one play. Unless `fails`, every task must succeed."""
        play = {"hosts": "modules", "gather_facts": False, "become": True, "tasks": list(tasks)}
        playbook = self.folder / "play.yml"
        playbook.write_text(yaml.safe_dump([{**play, "vars": dict(variables or {})}], allow_unicode=True))
        output = self.folder / "output"
        command = ["-i", INVENTORY, str(playbook), "--diff", *arguments, *(["--check"] if check else [])]
        process = forks().Process(target=ansible_playbook, args=(command, str(output)))
        process.start()
        process.join(300)
        over = process.exitcode is not None
        if not over:
            process.kill()  # or the tests would wait for it at their end
        text = output.read_text()
        assert over, text
        start = text.find('{"custom_stats"')
        assert start >= 0, text
        plays = json.JSONDecoder().raw_decode(text[start:])[0]["plays"]
        results = [next(iter(task["hosts"].values())) for each in plays for task in each["tasks"] if task["hosts"]]
        assert (process.exitcode != 0) == fails, text
        return Outcome(results, text)

    def files(self, *entries: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        return self.run({"files": {"files": list(entries)}}, **options).last

    def units(self, *entries: Mapping[str, Any], changed_files: list[str] | None = None, **options: Any) -> dict[str, Any]:
        return self.run({"units": {"units": list(entries), "changed_files": changed_files or []}}, **options).last

    def shell(self, script: str) -> str:
        """Run a shell script on the host and return what it printed."""
        command = [*connection(), f"sudo sh -c {shlex.quote(script)}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
        return done.stdout.strip("\n")


@functools.cache
def connection() -> list[str]:
    """Ask Ansible once how it reaches the host; a plain ssh is many times faster for what is only a preparation."""
    with tempfile.TemporaryDirectory() as folder:
        text = "{{ [ansible_ssh_common_args | default(''), ansible_host | default(inventory_hostname)] | to_json }}"
        outcome = Play(Path(folder)).run({"ansible.builtin.debug": {"msg": text}})
    answer = outcome.last["msg"]
    arguments, address = json.loads(answer) if isinstance(answer, str) else answer
    return ["ssh", *shlex.split(arguments), "-o", "BatchMode=yes", address]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(tmp_path)


@pytest.fixture
def place(play: Play) -> str:
    """An empty folder on the host, with an odd name."""
    path = "/srv/evk tests/ü'q"
    quoted = path.replace("'", "'\\''")
    play.shell(f"rm -rf '{quoted}'; mkdir -p '{quoted}'")
    return path

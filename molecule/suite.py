"""ansible-playbook as a user of the suite runs it, for the tests of all scenarios."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATE = Path(os.environ.get("EVENKEEL_STATE") or Path.home() / ".local/state/evenkeel")
RELEASES = STATE / "releases/drydock"


@dataclass(frozen=True)
class Run:
    """What a playbook run printed and how it ended; counts are summed over all hosts of the recap."""

    code: int
    output: str

    def count(self, what: str) -> int:
        recap = self.output.rpartition("PLAY RECAP")[2]
        return sum(int(number) for number in re.findall(rf"\b{what}=(\d+)", recap))

    @property
    def text(self) -> str:
        """The output in one line, so that folded sentences can be found."""
        return " ".join(self.output.split())


def command(name: str, *arguments: str, inventory: Path) -> list[str]:
    """The words that a person types."""
    return ["ansible-playbook", "-i", str(inventory), f"playbooks/{name}.yml", *arguments]


def environment() -> dict[str, str]:
    """The environment of the checkout, without colours."""
    return {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"}


def playbook(name: str, *arguments: str, inventory: Path, timeout: float = 900) -> Run:
    """Run a playbook of the suite from the checkout, as the README says."""
    done = subprocess.run(
        command(name, *arguments, inventory=inventory),
        cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, env=environment(),
    )  # fmt: skip
    return Run(done.returncode, done.stdout + done.stderr)


def build_release(folder: Path, inventory: Path, **changes: str) -> str:
    """Build a release of a commit in which some files of Drydock have other texts; returns its id.

    changes: path below the repository -> text. The release stays the newest one until another is named.
    """
    checkout = folder / "checkout"
    if not checkout.exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
    for path, text in changes.items():
        (checkout / path).write_text(text)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", str(checkout), "add", "."], check=True)
    subprocess.run(["git", "-C", str(checkout), *identity, "commit", "-q", "--allow-empty", "-m", "Change some files"], check=True)
    run = playbook("release", "-e", f"repository={checkout}", inventory=inventory)
    assert run.code == 0, run.output
    newest = max(RELEASES.glob("*.tar"), key=lambda path: path.stat().st_mtime)
    return newest.name.removesuffix(".tar")


def remove_release(release: str) -> None:
    """Remove an archive and what belongs to it from the controller."""
    for path in RELEASES.glob(f"{release}.*"):
        path.unlink()

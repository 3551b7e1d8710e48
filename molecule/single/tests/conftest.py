"""The host, the platform's addresses and secrets, and ansible-playbook as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import testinfra

ROOT = Path(__file__).resolve().parents[3]
STATE = Path(os.environ.get("EVENKEEL_STATE") or Path.home() / ".local/state/evenkeel")
INVENTORY = ROOT / "molecule/inventory"
KEPT = STATE / "inventories/molecule"  # what the controller keeps of the platform
ADDRESS = "10.87.2.11"


@dataclass(frozen=True)
class Run:
    """What a playbook run printed and how it ended; counts are summed over all hosts of the recap."""

    code: int
    output: str

    def count(self, what: str) -> int:
        recap = self.output.rpartition("PLAY RECAP")[2]
        return sum(int(number) for number in re.findall(rf"\b{what}=(\d+)", recap))


def playbook(name: str, *arguments: str, inventory: Path = INVENTORY) -> Run:
    """Run a playbook of the suite from the checkout, as the README says."""
    command = ["ansible-playbook", "-i", str(inventory), f"playbooks/{name}.yml", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"},
    )  # fmt: skip
    return Run(done.returncode, done.stdout + done.stderr)


def secret(name: str) -> str:
    return (KEPT / "secrets" / name).read_text().split()[0]


def submit(user: requests.Session, url: str, body: dict[str, str]) -> requests.Response:
    """Start a major action as a patient person does: told that it is too soon (U3), wait for as long as the answer says."""
    while (answer := user.post(url, json=body, timeout=30)).status_code == 429:
        time.sleep(int(answer.headers["Retry-After"]))
    return answer


@pytest.fixture(scope="session")
def host() -> testinfra.host.Host:
    return testinfra.get_host("ssh://single", ssh_config=str(STATE / "labs/molecule/ssh_config"))


@pytest.fixture(scope="session")
def url() -> str:
    return f"https://{ADDRESS}"


@pytest.fixture(scope="session")
def ca() -> str:
    return str(KEPT / "pki/ca.crt")


@pytest.fixture
def web(ca: str) -> requests.Session:
    """A client that trusts the platform's CA and nothing else."""
    session = requests.Session()
    session.verify = ca
    session.trust_env = False
    return session


@pytest.fixture
def user(web: requests.Session, url: str) -> requests.Session:
    """The same, logged in as the demo user through the form."""
    page = web.get(f"{url}/login", timeout=30)
    token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.text)
    assert token, page.text[:500]
    form = {"username": "demo", "password": secret("app_demo_password"), "csrfmiddlewaretoken": token.group(1)}
    answer = web.post(f"{url}/login", data=form, headers={"Referer": f"{url}/login"}, timeout=30, allow_redirects=False)
    assert answer.status_code == 302, answer.text[:500]
    web.headers.update({"X-CSRFToken": web.cookies["csrftoken"], "Referer": url})
    return web

"""The host, the platform's addresses and secrets, and ansible-playbook as a user runs it."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
import requests
import testinfra

sys.path.append(str(Path(__file__).resolve().parents[2]))

import suite
from suite import ROOT, STATE, Run

INVENTORY = ROOT / "molecule/inventory"
KEPT = STATE / "inventories/molecule"  # what the controller keeps of the platform
ADDRESS = "10.87.2.11"


def playbook(name: str, *arguments: str, inventory: Path = INVENTORY) -> Run:
    """Run a playbook of the suite on the host `single`."""
    return suite.playbook(name, *arguments, inventory=inventory)


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

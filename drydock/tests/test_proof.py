"""Q8 under faults, with figures; and that the proof of it can fail: each safeguard taken out is noticed."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from browser import Browser
from platform_servers import PASSWORD, Servers, wait_for
from proof import harness, ledger
from proof.faults import TESTS, Faults, ProofServers
from proof.ledger import Acceptance, Findings, Ledger, Person

LEASE_SECONDS = 3
# As `make proof` does it, on a tenth of the jobs.
SMALL = {
    "kill_worker": 1,
    "kill_busy_worker": 2,
    "kill_worker_child": 1,
    "kill_worker_parent": 1,
    "freeze_busy_worker": 1,
    "kill_redis": 1,
    "kill_persistent_redis": 1,
    "flush_redis": 2,
    "restart_plugins_at_once": 1,
    "kill_relay": 1,
    "kill_web": 1,
}


@pytest.fixture(scope="module")
def platform() -> Iterator[ProofServers]:
    """A platform that may be broken, with a lease so short that its end is soon seen."""
    servers = ProofServers(lease_seconds=LEASE_SECONDS, workers=("proof-1", "proof-2"))
    try:
        servers.start_all()
        yield servers
    finally:
        servers.stop_all()


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


def accepted(platform: ProofServers, book: Ledger, number: int, **body: object) -> Person:
    """Accept some jobs of a certain form."""
    person = platform.person(f"prover-{uuid.uuid4().hex[:8]}")
    book.write(*({"key": uuid.uuid4().hex, "kind": "proof", "body": body} for _ in range(number)))
    Acceptance(person, book).run("proof", 0)
    assert len(book.accepted) == number
    return person


def test_q8_accepted_jobs_survive_every_fault(platform: ProofServers, book: Ledger) -> None:
    report = harness.run(platform, SMALL, jobs=400, file=book.path)
    sys.stdout.write(report.table())
    assert report.broken() == []
    assert (report.findings.done, report.findings.failed) == (392, 8)
    assert report.findings.reasons == {"it was asked to fail": 8}
    injected = {name: count for name, count in report.faults.items() if name in SMALL}
    assert injected == SMALL
    assert report.worker_sigkills >= 4
    assert report.leases_expired >= 1, "no worker was lost with a job in hand: the faults did not bite"


# --- Each safeguard is needed, and its absence is noticed -------------------------------------------------------------


def after_a_lost_worker(platform: ProofServers, book: Ledger) -> Findings:
    """Kill a worker with a job in hand."""
    person = accepted(platform, book, 2, work_ms=2000)
    faults = Faults(platform)
    wait_for("both workers at work", lambda: all(platform.holds(name) for name in platform.workers))
    faults.inject("kill_worker")
    return ledger.check(person, book, wait_seconds=LEASE_SECONDS + 15)


def after_a_frozen_worker(platform: ProofServers, book: Ledger) -> Findings:
    """Freeze a worker with a job in hand until another one has done the job."""
    person = accepted(platform, book, 1, work_ms=2000)
    name = wait_for("a worker at work", lambda: next((n for n in platform.workers if platform.holds(n)), None))
    faults = Faults(platform)
    held = faults.catch(name)
    assert held
    ledger.check(person, book, wait_seconds=60)
    faults.thaw(name, held)
    wait_for("the late worker's end", lambda: late_worker_ended(platform, name, str(held[0])))
    return ledger.check(person, book, wait_seconds=5)


def late_worker_ended(platform: ProofServers, name: str, job: str) -> bool:
    """Say whether a worker gave its job up, or has done what it should not."""
    effects = platform.sql(
        "plugins", "SELECT 1 FROM proof_request r JOIN proof_effect ON request_id = r.id WHERE job_id = %s", job
    )
    return len(effects) > 1 or f"job {job}: attempt 1 was overtaken" in platform.log(name)


def after_lost_bells(platform: ProofServers, book: Ledger) -> Findings:
    """Empty the broker when it has rung for everything and no worker has heard it."""
    for name in platform.workers:
        platform.stop(name)
    try:
        person = accepted(platform, book, 10, work_ms=1)
        unrung = "SELECT 1 FROM jobs_job WHERE kind = 'proof' AND state = 'queued' AND bells = 0"
        wait_for("every bell", lambda: not platform.sql("plugins", unrung))
        Faults(platform).inject("flush_redis")
    finally:
        for name in platform.workers:
            platform.start_worker("proof", name=name)
    return ledger.check(person, book, wait_seconds=30)


@pytest.fixture
def broken_relay(platform: ProofServers, request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a relay that lacks a duty; afterwards the real one."""
    platform.stop("relay")
    platform.start_relay("broken_relay", "--without", request.param)
    yield
    platform.stop("relay")
    platform.start_relay()
    wait_for("the end of all jobs", lambda: not platform.sql("plugins", harness.OPEN)[0][0], 90)


@pytest.fixture
def unfenced(platform: ProofServers) -> Iterator[None]:
    """Run workers that lack the fence; afterwards real ones."""
    for app in ("proof.unfenced", "drydock.celery"):
        for name in platform.workers:
            platform.kill(name)
            platform.start_worker("proof", name=name, app=app)
        if app == "proof.unfenced":
            yield


def test_a_lost_worker_loses_no_job(platform: ProofServers, book: Ledger) -> None:
    assert after_a_lost_worker(platform, book).broken() == []


@pytest.mark.parametrize("broken_relay", ["reaper"], indirect=True)
@pytest.mark.usefixtures("broken_relay")
def test_without_the_reaper_the_proof_finds_losses(platform: ProofServers, book: Ledger) -> None:
    assert len(after_a_lost_worker(platform, book).lost) == 1


def test_lost_bells_lose_no_job(platform: ProofServers, book: Ledger) -> None:
    assert after_lost_bells(platform, book).broken() == []


@pytest.mark.parametrize("broken_relay", ["second-bell"], indirect=True)
@pytest.mark.usefixtures("broken_relay")
def test_without_second_bells_the_proof_finds_losses(platform: ProofServers, book: Ledger) -> None:
    assert len(after_lost_bells(platform, book).lost) == 10


def test_a_late_worker_has_no_effect(platform: ProofServers, book: Ledger) -> None:
    assert after_a_frozen_worker(platform, book).broken() == []


@pytest.mark.usefixtures("unfenced")
def test_without_the_fence_the_proof_finds_double_effects(platform: ProofServers, book: Ledger) -> None:
    assert len(after_a_frozen_worker(platform, book).effects_doubled) == 1


# --- The ledger as a command, against the platform's own kinds --------------------------------------------------------


def run_ledger(servers: Servers, person: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "proof.ledger", *arguments, "--base", servers.url, "--ca", str(servers.ca)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(TESTS), "LEDGER_PASSWORD": PASSWORD}
    return subprocess.run(
        [*command, "--username", person], env=environment, capture_output=True, text=True, timeout=150, check=False
    )


def test_the_ledger_checks_a_platform_by_http_alone(
    servers: Servers, sign_in: Callable[..., Browser], tmp_path: Path
) -> None:
    person, file = sign_in().name, str(tmp_path / "ledger.jsonl")
    for kind, number in (("export", "6"), ("document", "2")):
        ended = run_ledger(servers, person, "accept", file, "--kind", kind, "--number", number)
        assert ended.returncode == 0, ended.stderr
    ended = run_ledger(servers, person, "check", file, "--wait", "120")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    assert (report["accepted"], report["done"], report["lost"], report["broken"]) == (8, 8, [], [])


def test_the_ledger_says_what_was_lost(servers: Servers, sign_in: Callable[..., Browser], tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    book, key = Ledger(file), uuid.uuid4().hex
    book.write({"key": key, "kind": "export", "body": {"format": "csv"}})
    book.write({"key": key, "location": f"/api/exports/{uuid.uuid4()}", "at": 0})
    ended = run_ledger(servers, sign_in().name, "check", str(file), "--wait", "0")
    assert ended.returncode == 1
    assert [line.split(" (")[0] for line in json.loads(ended.stdout)["broken"]] == ["1 lost", "1 accepted twice"]

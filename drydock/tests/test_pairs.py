"""Any one of everything may die: PostgreSQL's primary, Redis's master, a web tier, a relay, a worker."""

import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from browser import Browser
from pair_servers import NODES, RELAYS, SENTINELS, PairServers
from platform_servers import PASSWORD, wait_for
from proof import ledger
from proof.ledger import Acceptance, Ledger

RATE = 15
HEALED_SECONDS = 60
JOBS = "SELECT count(*) FROM proof_request WHERE finished IS NULL"


@pytest.fixture(scope="module")
def pairs() -> Iterator[PairServers]:
    servers = PairServers()
    try:
        servers.start_all()
        yield servers
    finally:
        servers.stop_all()


def ready(pairs: PairServers) -> bool:
    """Say whether each web tier has what it needs (but the object storage, which is not part of this)."""
    return all(list(pairs.browser(name).get("/ready").json["missing"]) == ["s3"] for name in ("web", "web-2"))


def survives(pairs: PairServers, tmp_path: Path, fault: Callable[[], None], *, jobs: int = 60) -> None:
    """Accept jobs through both web tiers while something fails; none is lost, none is done twice."""
    person = pairs.person(f"prover-{uuid.uuid4().hex[:8]}")
    book = Ledger(tmp_path / "ledger.jsonl")
    with ThreadPoolExecutor(1) as background:
        accepting = background.submit(Acceptance(person, book).run, "proof", jobs, per_second=RATE)
        wait_for("the first acceptances", lambda: len(book.accepted) > jobs // 3)
        failed = time.monotonic()
        fault()
        wait_for("both workers taking what is sent", pairs.consuming, HEALED_SECONDS)
        consuming = time.monotonic() - failed
        wait_for("the platform being ready", lambda: ready(pairs), HEALED_SECONDS)
        whole = time.monotonic() - failed
        accepting.result()
    findings = ledger.check(person, book, wait_seconds=HEALED_SECONDS)
    worst = max(findings.delays)
    sys.stdout.write(f"workers again after {consuming:.1f} s, ready after {whole:.1f} s, latest job {worst:.1f} s\n")
    assert findings.broken() == []
    assert findings.accepted == jobs


# --- Redis: three nodes, three Sentinels. The last of these tests leaves two of each ----------------------------------


@pytest.fixture
def whole(pairs: PairServers) -> Iterator[PairServers]:
    """Give the platform with all its Redis nodes, and put it together again afterwards."""
    yield pairs
    for name in NODES:
        if name in pairs.processes:
            pairs.signal_all(name, signal.SIGCONT)
        else:
            pairs.start_node(name)
    wait_for("all nodes being there again", lambda: all(pairs.complete(name) for name in SENTINELS), 90)


def moved(pairs: PairServers, old: str) -> None:
    wait_for("another master", lambda: pairs.master(SENTINELS[1]) != old)


def test_q8_jobs_survive_a_planned_failover_of_redis(whole: PairServers, tmp_path: Path) -> None:
    def hand_over() -> None:
        old = whole.master()
        whole.sentinel().execute_command("SENTINEL", "FAILOVER", "main")
        moved(whole, old)

    survives(whole, tmp_path, hand_over)


def test_a_redis_that_takes_no_writes_ends_no_worker(whole: PairServers, tmp_path: Path) -> None:
    def lose_the_replicas() -> None:
        replicas = [name for name in NODES if name != whole.master()]
        for name in replicas:
            whole.kill(name)
        wait_for("refused writes", lambda: whole.relay("/ping/proof-1")[0] == 503)
        for name in replicas:
            whole.start_node(name)

    survives(whole, tmp_path, lose_the_replicas)
    for name in whole.workers:
        assert whole.processes[name].poll() is None


def test_q8_jobs_survive_a_redis_master_that_is_frozen(whole: PairServers, tmp_path: Path) -> None:
    def freeze() -> None:
        old = whole.master()
        whole.signal_all(old, signal.SIGSTOP)
        moved(whole, old)

    survives(whole, tmp_path, freeze)


def test_q8_jobs_survive_the_loss_of_the_redis_master_and_its_sentinel(pairs: PairServers, tmp_path: Path) -> None:
    def lose_a_host() -> None:
        old = pairs.master()
        pairs.kill(SENTINELS[0])
        pairs.kill(old)
        moved(pairs, old)

    survives(pairs, tmp_path, lose_a_host)


def test_no_password_is_logged(pairs: PairServers) -> None:
    for name in (*pairs.workers, *RELAYS, "web", "web-2"):
        said = pairs.log(name)
        assert PASSWORD not in said
        assert quote(PASSWORD, safe="") not in said


# --- Two web tiers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def visitor(pairs: PairServers) -> Browser:
    """Give somebody who has signed in through the first web tier."""
    person = pairs.person("visitor")
    browser = pairs.browser("web")
    browser.name = person.username
    assert browser.login("visitor", PASSWORD).url.endswith("/")
    return browser


@pytest.fixture
def elsewhere(pairs: PairServers, visitor: Browser) -> Iterator[Browser]:
    """Let the same browser be sent to the second web tier from now on."""
    first, visitor.base = visitor.base, pairs.browser("web-2").base
    yield visitor
    visitor.base = first


def test_who_has_signed_in_at_one_web_is_known_at_the_other(visitor: Browser, pairs: PairServers) -> None:
    page = visitor.get("/documents/new")
    assert page.status == 200
    form = visitor.csrf()
    visitor.base = pairs.browser("web-2").base
    assert visitor.get("/documents/").url.endswith("/documents/")
    # A form of the first web is taken by the second.
    assert visitor.csrf() == form
    answer = visitor.post("/api/proof", {})
    assert answer.status == 202
    visitor.base = pairs.browser("web").base
    assert visitor.get(answer.headers["Location"]).status == 200


def test_a_key_that_one_web_has_taken_the_other_knows(visitor: Browser, pairs: PairServers) -> None:
    key, answers = uuid.uuid4().hex, []
    for name in ("web", "web-2"):
        visitor.base = pairs.browser(name).base
        answers.append(visitor.post("/api/proof", {}, **{"Idempotency-Key": key}).headers["Location"])
    assert answers[0] == answers[1]


# --- Two worker hosts -------------------------------------------------------------------------------------------------


def test_a_relay_pings_each_worker_of_its_host(pairs: PairServers) -> None:
    for name in pairs.workers:
        status, said = pairs.relay(f"/ping/{name}")
        assert (status, said["ok"]) == (200, True)
        assert said["worker"].startswith(f"{name}@")
    assert pairs.relay("/ping/proof-1", token="wrong")[0] == 401
    assert pairs.relay("/ping/")[0] == 404
    assert pairs.relay("/nonsense")[0] == 404


def test_h3_a_worker_that_consumes_nothing_is_not_well_although_another_one_is(pairs: PairServers) -> None:
    pairs.signal_all("proof-1", signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(4) as pool:
            silent = [pool.submit(pairs.relay, "/ping/proof-1") for _ in range(3)]
            started = time.monotonic()
            # Meanwhile the relay answers others.
            assert pairs.relay("/health")[0] == 200
            assert pairs.relay("/ping/proof-2")[0] == 200
            assert time.monotonic() - started < 4
            assert not silent[0].done()
            for answer in silent:
                assert answer.result()[0] == 503
                assert "no worker answered" in answer.result()[1]["error"]
    finally:
        pairs.signal_all("proof-1", signal.SIGCONT)
    wait_for("the worker answering again", lambda: pairs.relay("/ping/proof-1")[0] == 200)


def test_h3_a_worker_that_is_busy_is_well(pairs: PairServers, visitor: Browser) -> None:
    for _ in pairs.workers:
        assert visitor.post("/api/proof", {"work_ms": 7000}).status == 202
    wait_for("both at work", lambda: all(pairs.holds(name) for name in pairs.workers))
    status, said = pairs.relay("/ping/proof-1")
    assert (status, said["jobs"]) == (200, 1)
    wait_for("the end of both jobs", lambda: pairs.sql("plugins", JOBS) == [(0,)])


def test_q8_two_relays_ring_once_and_one_is_enough(pairs: PairServers, visitor: Browser) -> None:
    rung = (
        "SELECT sum(j.attempt), count(*), max(j.bells) FROM jobs_job j JOIN proof_request r ON r.job_id = j.uuid"
        " WHERE r.id = ANY(%s)"
    )
    made = [visitor.post("/api/proof", {"work_ms": 1}).json["id"] for _ in range(30)]
    wait_for("the end of all jobs", lambda: pairs.sql("plugins", JOBS) == [(0,)])
    assert pairs.sql("plugins", rung, made) == [(30, 30, 1)]
    pairs.kill(RELAYS[0])
    try:
        visitor.post("/api/proof", {"work_ms": 1})
        wait_for("the end of the job", lambda: pairs.sql("plugins", JOBS) == [(0,)], 10)
    finally:
        pairs.start_relay()
    wait_for("the relay answering", lambda: pairs.relay("/health")[0] == 200)


# --- PostgreSQL: a primary and its standby. The last test: it leaves one of the two -----------------------------------


def test_q8_jobs_survive_the_loss_of_the_primary(pairs: PairServers, visitor: Browser, tmp_path: Path) -> None:
    told: list[tuple[int, str | None]] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.1):
            answer = visitor.post("/api/proof", {"work_ms": 1})
            told.append((answer.status, answer.headers["Retry-After"]))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        survives(pairs, tmp_path, pairs.fail_over)
    finally:
        over.set()
        thread.join()
    # An answer for every request: accepted, or when to try again. A standby that takes over at once makes nobody wait.
    assert {(202, None)} <= set(told) <= {(202, None), (503, "5")}
    assert '"traceback"' not in pairs.log("web")
    wait_for("the end of all jobs", lambda: pairs.sql("plugins", JOBS) == [(0,)])

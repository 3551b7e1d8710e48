"""The job table: accepted with its cause, claimed once, finished behind its fence."""

import io
import math
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from django.core.management import call_command
from django.db import IntegrityError, OperationalError, connections, transaction
from django.db.models import Sum

from browser import Browser
from drydock import redis_client
from drydock.jobs import context, engine, kinds, relay, tasks
from drydock.jobs.kinds import Kind
from drydock.jobs.models import Heartbeat, Job, Latency, Tally
from platform_servers import Servers, wait_for

pytestmark = pytest.mark.usefixtures("servers")
PAST = "2020-01-01T00:00Z"


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kind]:
    """Give a kind of job of its own, whose bells nobody hears."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    registered = Kind(
        name, "plugins", name, run=lambda _: None, failed=lambda *_: None, time_limit_seconds=60, max_attempts=2
    )
    monkeypatch.setitem(kinds._registered, name, registered)
    yield registered
    jobs().filter(kind=name).delete()


def jobs() -> "engine.models.QuerySet[Job]":
    return Job.objects.using("plugins")


def accept(kind: Kind, **more: object) -> Job:
    with transaction.atomic(using="plugins"):
        return engine.accept(kind.name, {}, idempotency_key=uuid.uuid4().hex, **more)  # type: ignore[arg-type]


def claimed(kind: Kind) -> Job:
    job = engine.claim(kind, accept(kind).uuid, worker="w1")
    assert job is not None
    return job


def now(job: Job) -> Job:
    return jobs().get(uuid=job.uuid)


def counted(kind: Kind) -> dict[str, int]:
    rows = Tally.objects.using("plugins").filter(subject=kind.name).values("event").annotate(total=Sum("count"))
    return {row["event"]: row["total"] for row in rows}


def changed(kind: Kind, monkeypatch: pytest.MonkeyPatch, **values: object) -> Kind:
    new = Kind(**{**vars(kind), **values})
    monkeypatch.setitem(kinds._registered, kind.name, new)
    return new


def test_a_job_is_accepted_only_together_with_its_cause(kind: Kind) -> None:
    with pytest.raises(RuntimeError, match="in the transaction"):
        engine.accept(kind.name, {}, idempotency_key="x")
    with pytest.raises(ZeroDivisionError), transaction.atomic(using="plugins"):
        lost = engine.accept(kind.name, {}, idempotency_key=uuid.uuid4().hex)
        raise ZeroDivisionError
    assert not jobs().filter(uuid=lost.uuid).exists()


def test_an_acceptance_wakes_the_relay_at_its_commit(kind: Kind) -> None:
    with connections["plugins"].cursor() as cursor:
        cursor.execute(f"LISTEN {engine.CHANNEL}")
    heard = connections["plugins"].connection.notifies(timeout=5, stop_after=1)
    accept(kind)
    assert [notice.channel for notice in heard] == [engine.CHANNEL]


def test_the_same_key_is_accepted_once(kind: Kind) -> None:
    key = uuid.uuid4().hex
    with transaction.atomic(using="plugins"):
        engine.accept(kind.name, {}, idempotency_key=key)
    with pytest.raises(IntegrityError), transaction.atomic(using="plugins"):
        engine.accept(kind.name, {}, idempotency_key=key)


def test_a_job_remembers_the_request_that_caused_it(kind: Kind) -> None:
    with context.bound(request="r1"):
        job = accept(kind)
    assert (job.request_id, accept(kind).request_id) == ("r1", "")


def test_of_many_workers_one_gets_the_job(kind: Kind) -> None:
    job = accept(kind)

    def claim(_: int) -> bool:
        try:
            return engine.claim(kind, job.uuid) is not None
        finally:
            connections.close_all()

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(claim, range(8))) == [False] * 7 + [True]


def test_a_job_for_later_is_not_claimed_now(kind: Kind) -> None:
    later = accept(kind, run_after=engine._from_now(60))
    assert engine.claim(kind, later.uuid) is None
    assert relay.ring("plugins") >= 0
    assert now(later).bells == 0


def test_a_lost_lease_is_returned_and_its_first_holder_is_fenced_off(kind: Kind) -> None:
    first = claimed(kind)
    assert engine.claim(kind, first.uuid) is None
    jobs().filter(uuid=first.uuid).update(lease_until=engine._from_now(-1))
    engine.reap("plugins")
    assert (now(first).state, now(first).reason) == ("queued", "attempt 1 was lost with its worker w1")
    second = engine.claim(kind, first.uuid, worker="w2")
    assert second is not None
    assert second.attempt == 2
    assert not engine.renew(kind, first)
    with pytest.raises(engine.Fenced), engine.finishing(kind, first.uuid, first.attempt):
        raise AssertionError("the effect of a late worker")
    with engine.finishing(kind, second.uuid, second.attempt):
        pass
    assert now(first).state == "done"
    with pytest.raises(engine.Fenced):
        engine.fail(kind, second, "twice")
    assert counted(kind) == {"lease expired": 1, "done": 1}


def test_how_long_a_job_took_outlives_it(kind: Kind) -> None:
    job = claimed(kind)
    jobs().filter(uuid=job.uuid).update(created=engine._from_now(-45), started=engine._from_now(-43))
    with engine.finishing(kind, job.uuid, job.attempt):
        pass
    late = claimed(kind)
    jobs().filter(uuid=late.uuid).update(created=engine._from_now(-7200))
    engine.fail(kind, late, "too late")
    jobs().filter(kind=kind.name).delete()
    rows = Latency.objects.using("plugins").filter(kind=kind.name).order_by("state", "until")
    assert [(row.state, row.until, row.le, row.count) for row in rows] == [
        ("done", "end", 60, 1), ("done", "start", 2.5, 1),
        ("failed", "end", math.inf, 1), ("failed", "start", math.inf, 1),
    ]  # fmt: skip
    assert 45 <= rows[0].seconds < 60


def test_an_operator_can_let_a_waiting_job_run_now(kind: Kind) -> None:
    later = accept(kind, run_after=engine._from_now(3600))
    jobs().filter(uuid=later.uuid).update(bells=7)
    assert engine.run_now("plugins", later.uuid)
    assert now(later).bells == 0
    assert engine.claim(kind, later.uuid)
    assert not engine.run_now("plugins", later.uuid), "it runs already"


def test_the_lines_of_the_lease_thread_say_which_job_they_are_about(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(engine, "renew", lambda *_: seen.append(context.fields()))
    job = claimed(changed(kind, monkeypatch, lease_seconds=0.3))
    with context.bound(**context.of(job)), engine.lease_kept(kinds.get(kind.name), job):
        wait_for("a renewal", lambda: seen, 10)
    assert seen[0] == {"job": str(job.uuid), "kind": kind.name, "attempt": "1"}


def test_an_effect_that_fails_leaves_the_job_running(kind: Kind) -> None:
    job = claimed(kind)
    with pytest.raises(ZeroDivisionError), engine.finishing(kind, job.uuid, job.attempt):
        raise ZeroDivisionError
    assert now(job).state == "running"


def test_attempts_are_capped_and_a_dead_job_says_why(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    kind = changed(kind, monkeypatch, failed=lambda _, reason: told.append(reason))
    job = accept(kind)
    for _ in range(kind.max_attempts):
        assert engine.claim(kind, job.uuid, worker="w9")
        jobs().filter(uuid=job.uuid).update(lease_until=engine._from_now(-1))
        engine.reap("plugins")
    assert (now(job).state, now(job).reason) == ("dead", "gave up: it lost its worker 2 times, last w9")
    assert told == [now(job).reason]
    assert counted(kind) == {"lease expired": 2, "dead": 1}


def test_a_job_of_an_unknown_kind_holds_nobody_up(kind: Kind) -> None:
    job = claimed(kind)
    jobs().filter(uuid=job.uuid).update(kind="gone", attempt=2, lease_until=engine._from_now(-60))
    engine.reap("plugins")
    assert now(job).state == "running", "another release may know it"
    jobs().filter(uuid=job.uuid).update(lease_until=PAST)
    engine.reap("plugins")
    wait_for("the job being buried, by us or by the relay", lambda: now(job).state == "dead", 10)
    jobs().filter(uuid=job.uuid).delete()


def test_a_deferred_job_waits_longer_each_time_and_is_given_up_in_the_end(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = changed(kind, monkeypatch, max_deferrals=2, max_attempts=1)
    job, waits = accept(kind), []
    for _ in range(3):
        taken = engine.claim(kind, job.uuid)
        assert taken is not None
        engine.defer(kind, taken, "nobody is free")
        row = jobs().extra(select={"wait": "extract(epoch from run_after - now())"}).get(uuid=job.uuid)
        waits.append(float(row.wait))
        jobs().filter(uuid=job.uuid).update(run_after=PAST)
    assert now(job).state == "dead"
    assert now(job).reason == "gave up after 3 tries: nobody is free"
    assert 1 < waits[0] < 3 < waits[1] < 5
    assert counted(kind) == {"deferred": 2, "dead": 1}


def test_a_lease_is_kept_while_its_worker_works_and_no_longer(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = changed(kind, monkeypatch, lease_seconds=0.9)
    job = claimed(kind)
    first = now(job).lease_until
    with engine.lease_kept(kind, job):
        wait_for("the lease being renewed", lambda: now(job).lease_until > first, 10)
    wait_for("the lease running out", lambda: engine.reap("plugins") and now(job).state == "queued", 10)


def test_past_the_time_limit_the_lease_thread_ends_the_job(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "GRACE_SECONDS", 0)
    kind = changed(kind, monkeypatch, time_limit_seconds=0.2, time_limit_reason="too slow")
    job = claimed(kind)
    with engine.lease_kept(kind, job):
        wait_for("the job being ended", lambda: now(job).state == "failed", 10)
    assert now(job).reason == "too slow"


def raises(error: BaseException) -> object:
    def run(_: Job) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (engine.Failure("no such thing"), "failed", "no such thing"),
        (engine.Again("not now"), "queued", "not now"),
        (SoftTimeLimitExceeded(), "failed", "it took longer than its time limit"),
        (OperationalError("gone\naway"), "queued", "the database did not answer: gone"),
        (ValueError("a mistake"), "failed", "ValueError: a mistake"),
        (None, "failed", "its code ended without a result"),
    ],
)
def test_however_a_job_ends_its_row_says_so(
    kind: Kind, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, state: str, reason: str
) -> None:
    kind = changed(kind, monkeypatch, run=raises(error) if error else lambda _: None)
    job = claimed(kind)
    tasks.perform(kind, job)
    assert (now(job).state, now(job).reason) == (state, reason)


def test_an_overtaken_worker_ends_quietly(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(job: Job) -> None:
        jobs().filter(uuid=job.uuid).update(attempt=2)
        with engine.finishing(kind, job.uuid, job.attempt):
            raise AssertionError("an effect")

    kind = changed(kind, monkeypatch, run=overtaken)
    job = claimed(kind)
    tasks.perform(kind, job)
    assert (now(job).state, now(job).attempt) == ("running", 2)


# --- The relay --------------------------------------------------------------------------------------------------------


def bells(kind: Kind) -> int:
    from drydock.celery import app

    with app.connection_for_write() as connection:
        return int(connection.default_channel.queue_declare(queue=kind.queue).message_count)


@pytest.fixture
def own_relay(kind: Kind, monkeypatch: pytest.MonkeyPatch, servers: Servers) -> Iterator[Kind]:
    """Ring only from this test, on a queue that no worker serves."""
    from kombu import Exchange, Queue

    from drydock.celery import app

    monkeypatch.setitem(app.amqp.queues, kind.queue, Queue(kind.queue, Exchange("drydock"), routing_key=kind.queue))
    servers.stop("relay")
    yield kind
    servers.start_relay()


def test_a_bell_is_rung_again_until_the_job_is_claimed(own_relay: Kind) -> None:
    job = accept(own_relay)
    relay.ring("plugins")
    assert (bells(own_relay), now(job).bells) == (1, 1)
    relay.ring("plugins")
    assert bells(own_relay) == 1, "not before its time"
    jobs().filter(uuid=job.uuid).update(bell_after=PAST)
    relay.ring("plugins")
    assert (bells(own_relay), now(job).bells) == (2, 2)
    assert engine.claim(own_relay, job.uuid)
    jobs().filter(uuid=job.uuid).update(bell_after=PAST)
    relay.ring("plugins")
    assert bells(own_relay) == 2


def test_bells_do_not_pile_up(own_relay: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "WINDOW", 3)
    for _ in range(5):
        accept(own_relay)
    relay.ring("plugins")
    jobs().filter(kind=own_relay.name).update(bell_after=PAST)
    relay.ring("plugins")
    assert bells(own_relay) == 3


def test_a_job_of_a_kind_that_this_release_lacks_waits_for_one_that_has_it(own_relay: Kind) -> None:
    known, unknown = accept(own_relay), accept(own_relay)
    jobs().filter(uuid=unknown.uuid).update(kind=f"{own_relay.name}-newer")
    relay.ring("plugins")
    assert (now(known).bells, now(unknown).bells) == (1, 0)
    jobs().filter(uuid=unknown.uuid).update(kind=own_relay.name)


def test_several_relays_ring_once_for_each_job(own_relay: Kind) -> None:
    for _ in range(20):
        accept(own_relay)

    def ring(_: int) -> int:
        try:
            return relay.ring("plugins")
        finally:
            connections.close_all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ring, range(4)))
    assert bells(own_relay) == 20


def test_a_broker_that_fails_leaves_the_job_due(own_relay: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    from drydock.celery import app

    def away(*_: object, **__: object) -> None:
        raise ConnectionError("no broker")

    job = accept(own_relay)
    monkeypatch.setattr(app, "send_task", away)
    with pytest.raises(relay.BrokerError):
        relay.ring("plugins")
    assert now(job).bells == 0
    monkeypatch.undo()


def test_the_relay_goes_on_when_a_pass_fails() -> None:
    passes: list[str] = []

    def duty(database: str) -> int:
        passes.append(database)
        if len(passes) == 1:
            raise ZeroDivisionError
        return 0

    running = relay.Relay(databases=["plugins"], duties=(duty,))
    thread = threading.Thread(target=running.run)
    thread.start()
    wait_for("a second pass", lambda: len(passes) > 1, 10)
    running.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert running.stalled() == []


@pytest.mark.usefixtures("own_relay")
def test_the_relay_leaves_a_heartbeat_while_its_passes_succeed() -> None:
    beats = Heartbeat.objects.using("plugins").filter(name=relay.HEARTBEAT)
    beats.delete()

    def run(*duties: object, until: str, condition: object) -> None:
        running = relay.Relay(databases=["plugins"], duties=duties)  # type: ignore[arg-type]
        thread = threading.Thread(target=running.run)
        thread.start()
        wait_for(until, condition, 10)  # type: ignore[arg-type]
        running.stop()
        thread.join(10)

    passes: list[str] = []

    def failing(database: str) -> int:
        passes.append(database)
        raise ZeroDivisionError

    run(failing, until="a second pass", condition=lambda: len(passes) > 1)
    assert not beats.exists()
    run(until="a heartbeat", condition=beats.exists)


def test_the_relay_says_when_it_is_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    running = relay.Relay(databases=["plugins"], duties=())
    monkeypatch.setattr(relay, "STALLED_SECONDS", -1)
    assert running.stalled() == ["plugins"]


@pytest.mark.parametrize("command", ["relay", "processor"])
def test_where_to_listen_is_said_in_one_line_when_it_cannot_be(servers: Servers, command: str) -> None:
    wrong = servers.drydock(command, "--listen", "8001")
    assert "'8001' is not ADDRESS:PORT, as in 127.0.0.1:8001" in wrong.stderr
    taken = f"127.0.0.1:{servers.ports['relay']}"
    busy = servers.drydock(command, "--listen", taken)
    assert busy.stderr == f"CommandError: cannot listen on {taken}: Address already in use\n"


def test_q8_a_broker_that_was_emptied_takes_the_next_bells(servers: Servers, sign_in: Callable[..., Browser]) -> None:
    """Its routes are gone as well as its messages, and nobody's connection has noticed."""
    person = sign_in()
    redis_client.client().flushall()
    export = person.post("/api/exports", {"format": "csv"}).headers["Location"]
    wait_for("the export", lambda: person.get(export).json["state"] == "ready", 60)
    servers.ping()


def test_q4_the_last_jobs_of_each_queue_are_kept(kind: Kind, settings_kept: int) -> None:
    for state in ("done", "failed", "dead"):
        for number in range(3):
            job = accept(kind)
            jobs().filter(uuid=job.uuid).update(state=state, finished=f"2026-01-0{number + 1}T00:00Z")
    waiting = accept(kind)
    engine.prune("plugins")
    left = sorted(jobs().filter(kind=kind.name, finished__isnull=False).values_list("state", "finished__day"))
    # Two done ones, and two of those that were not done, whatever they are called.
    assert [row for row in left if row[0] == "done"] == [("done", 2), ("done", 3)]
    assert [day for state, day in left if state != "done"] == [3, 3]
    assert len(left) == 2 * settings_kept
    assert now(waiting).state == "queued"


@pytest.mark.usefixtures("settings_kept")
def test_q4_what_would_be_removed_is_told_first_and_then_exactly_that_is_removed(kind: Kind) -> None:
    for _ in range(5):
        jobs().filter(uuid=accept(kind).uuid).update(state="done", finished="2026-01-01T00:00Z")

    def said(*arguments: str) -> str:
        output = io.StringIO()
        call_command("prune_jobs", *arguments, stdout=output)
        return output.getvalue().splitlines()[-1]

    before = jobs().count()
    told = re.fullmatch(r"changed jobs: would remove (\d+) finished jobs", said("--dry-run"))
    assert told
    assert jobs().count() == before, "a dry run removes nothing"
    assert said() == f"changed jobs: removed {told[1]} finished jobs"
    assert jobs().filter(kind=kind.name).count() == 2
    assert said() == "unchanged jobs: no more than are kept"


@pytest.fixture
def settings_kept() -> Iterator[int]:
    from django.test import override_settings

    with override_settings(JOBS_KEPT_FOR_EACH_QUEUE=2):
        yield 2


def test_the_workers_are_told_of_no_unknown_task(servers: Servers) -> None:
    assert "unregistered task" not in servers.log("export") + servers.log("latex.compile")

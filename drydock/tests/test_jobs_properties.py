"""The engine as a state machine: whatever its callers do, in whatever order, the promises about jobs hold.

Several workers hold claims of different age on the same jobs; time passes in jumps (the jobs' times are set back). A
small model says what must happen; after each step the table is compared with it and with the step before.
"""

import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import pytest
from django.db import connections, transaction
from django.db.models import F, QuerySet, Sum
from django.db.models.functions import Now
from django.test import override_settings
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from kombu import Exchange, Queue

from drydock.celery import app
from drydock.jobs import engine, kinds, relay
from drydock.jobs.kinds import Kind
from drydock.jobs.models import Job, Tally
from platform_servers import Servers

T = TypeVar("T")
KEPT = 3
FOLLOWS = {
    "queued": {"queued", "running"},
    "running": {"running", "queued", "done", "failed", "dead"},
    "done": {"done"},
    "failed": {"failed"},
    "dead": {"dead"},
}
OVER = {"done", "failed", "dead"}


@dataclass(frozen=True)
class Held:
    """A worker's idea that a job is its own."""

    job: Job


@dataclass
class Known:
    """What the model knows of a job."""

    row: dict[str, Any]
    effects: int = 0
    told: list[str] = field(default_factory=list)


class Jobs(RuleBasedStateMachine):
    """Every move that the web tier, workers and relays can make."""

    jobs: Bundle[uuid.UUID] = Bundle("jobs")
    held: Bundle[Held] = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[uuid.UUID, Known] = {}
        self.counts: Counter[str] = Counter()
        self.kind = Kind(
            f"property-{uuid.uuid4().hex[:8]}", "plugins", "property", run=lambda _: None, failed=self.told,
            time_limit_seconds=60, max_attempts=2, max_deferrals=2,
        )  # fmt: skip
        kinds._registered[self.kind.name] = self.kind
        self.others = ThreadPoolExecutor(3)

    def teardown(self) -> None:
        """Bring every job to its end, as a platform that works again would, and remove everything."""
        try:
            self.everything_ends()
        finally:
            all_three = threading.Barrier(3)
            list(self.others.map(lambda _: (all_three.wait(10), connections.close_all()), range(3)))
            self.others.shutdown()
            self.rows().delete()
            Tally.objects.using("plugins").filter(subject=self.kind.name).delete()
            del kinds._registered[self.kind.name]

    # --- What the rules are made of -----------------------------------------------------------------------------------

    def rows(self) -> QuerySet[Job]:
        return Job.objects.using("plugins").filter(kind=self.kind.name)

    def row(self, job: uuid.UUID) -> dict[str, Any] | None:
        """Return a job as it is now; None when it is pruned."""
        return self.rows().filter(uuid=job).annotate(now=Now()).values().first()

    def told(self, job: Job, reason: str) -> None:
        self.known[job.uuid].told.append(reason)

    def elsewhere(self, move: Callable[[], T]) -> T:
        """Make a move from another process's place: on a connection of its own."""
        return self.others.submit(move).result(20)

    def holds(self, held: Held) -> bool:
        """Say whether a claim is still good."""
        row = self.row(held.job.uuid)
        return row is not None and row["state"] == "running" and row["attempt"] == held.job.attempt

    def fenced(self, held: Held, move: Callable[[], None]) -> bool:
        """Make a move that only the holder may make; say whether it was made. It must be refused to everybody else."""
        if self.holds(held):
            move()
            return True
        with pytest.raises(engine.Fenced):
            move()
        return False

    # --- Accepting and claiming ---------------------------------------------------------------------------------------

    @rule(target=jobs, later=st.sampled_from([None, 30]))
    def accept(self, later: int | None) -> uuid.UUID:
        run_after = None if later is None else engine._from_now(later)
        with transaction.atomic(using="plugins"):
            job = engine.accept(self.kind.name, {}, idempotency_key=uuid.uuid4().hex, run_after=run_after)
        self.known[job.uuid] = Known(self.row(job.uuid) or {})
        return job.uuid

    @rule(target=held, job=jobs, worker=st.sampled_from(["w1", "w2"]))
    def claim(self, job: uuid.UUID, worker: str) -> Any:
        row = self.row(job)
        free = row is not None and row["state"] == "queued" and row["run_after"] <= row["now"]
        claimed = engine.claim(self.kind, job, worker=worker)
        assert (claimed is not None) == free
        return Held(claimed) if claimed else multiple()

    @rule(target=held, job=jobs)
    def several_claim(self, job: uuid.UUID) -> Any:
        row = self.row(job)
        free = row is not None and row["state"] == "queued" and row["run_after"] <= row["now"]
        claims = list(self.others.map(lambda name: engine.claim(self.kind, job, worker=name), ["w1", "w2", "w3"]))
        won = [claimed for claimed in claims if claimed]
        assert len(won) == free
        return multiple(*(Held(claimed) for claimed in won))

    # --- A holder's moves, also of one that lost its claim long ago ---------------------------------------------------

    @rule(held=held, progress=st.sampled_from([None, -1, 50, 101]))
    def renew(self, held: Held, progress: int | None) -> None:
        good = self.holds(held)
        assert engine.renew(self.kind, held.job, progress=progress) == good

    @rule(held=held)
    def finish(self, held: Held) -> None:
        def move() -> None:
            with engine.finishing(self.kind, held.job.uuid, held.job.attempt):
                self.known[held.job.uuid].effects += 1

        if self.fenced(held, move):
            self.counts["done"] += 1

    @rule(held=held)
    def finish_and_crash(self, held: Held) -> None:
        good = self.holds(held)
        with (
            pytest.raises(ZeroDivisionError if good else engine.Fenced),
            engine.finishing(self.kind, held.job.uuid, held.job.attempt),
        ):
            raise ZeroDivisionError

    @rule(held=held, job=jobs)
    def finish_while_others_reap_claim_and_ring(self, held: Held, job: uuid.UUID) -> None:
        """The commit comes last: whatever the others do meanwhile, they do not get this job."""

        def move() -> None:
            with engine.finishing(self.kind, held.job.uuid, held.job.attempt):
                self.known[held.job.uuid].effects += 1
                self.elsewhere(self.reap)
                assert self.elsewhere(lambda: engine.claim(self.kind, held.job.uuid)) is None
                self.elsewhere(lambda: engine.claim(self.kind, job))  # … and dies with it
                self.elsewhere(lambda: relay.ring("plugins"))

        if self.fenced(held, move):
            self.counts["done"] += 1

    @rule(held=held)
    def fail(self, held: Held) -> None:
        if self.fenced(held, lambda: engine.fail(self.kind, held.job, "no such thing")):
            self.counts["failed"] += 1

    @rule(held=held)
    def defer(self, held: Held) -> None:
        last = held.job.deferred >= self.kind.max_deferrals
        if self.fenced(held, lambda: engine.defer(self.kind, held.job, "not now")):
            self.counts["dead" if last else "deferred"] += 1

    @rule(target=held, held=held, late_move=st.sampled_from(["finish", "finish_and_crash", "fail", "defer"]))
    def overtake(self, held: Held, late_move: str) -> Any:
        """The lease runs out, another worker gets the job, and the first one, which does not know, makes a move."""
        self.time_passes(31)
        self.reap()
        self.each_step_was_allowed()
        taken = self.claim(held.job.uuid, "w3")
        self.each_step_was_allowed()
        getattr(self, late_move)(held)
        return taken

    @rule(target=held, held=held)
    def defer_and_take_again(self, held: Held) -> Any:
        """What was put back on purpose is taken again, and has as many lives as before."""
        self.defer(held)
        self.time_passes(100)
        self.each_step_was_allowed()
        return self.claim(held.job.uuid, "w3")

    @rule(held=consumes(held))
    def die(self, held: Held) -> None:
        """A worker is killed: nobody makes its moves any more."""

    # --- The relay's moves, and time ----------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1, 6, 31, 100]))
    def time_passes(self, seconds: int) -> None:
        back = timedelta(seconds=seconds)
        self.rows().update(
            **{name: F(name) - back for name in ("run_after", "bell_after", "lease_until", "created", "finished")}
        )
        for known in self.known.values():
            if known.row.get("finished"):
                known.row["finished"] -= back

    @rule()
    def reap(self) -> None:
        lost = self.rows().filter(state="running", lease_until__lt=Now())
        before = {row["uuid"]: row["attempt"] - row["deferred"] for row in lost.values()}
        engine.reap("plugins")
        after = dict(self.rows().filter(uuid__in=before).values_list("uuid", "state"))
        for job, lives in before.items():
            if after[job] == "running":
                continue  # its row was locked: somebody is finishing it
            assert after[job] == ("dead" if lives >= self.kind.max_attempts else "queued")
            self.counts["lease expired"] += 1
            self.counts["dead"] += after[job] == "dead"

    @rule()
    def ring(self) -> None:
        due = self.rows().filter(state="queued", bell_after__lte=Now())
        before = dict(due.values_list("uuid", "bells"))
        relay.ring("plugins")
        after = dict(self.rows().filter(uuid__in=before).values_list("uuid", "bells"))
        assert after == {job: bells + 1 for job, bells in before.items()}

    @rule()
    def broker_forgets(self) -> None:
        with app.connection_for_write() as connection:
            connection.default_channel.queue_purge("property")

    @rule()
    def prune(self) -> None:
        over = self.rows().filter(state__in=OVER).order_by("-finished", "uuid")
        kept = {
            *list(over.filter(state="done").values_list("uuid", flat=True)[:KEPT]),
            *list(over.exclude(state="done").values_list("uuid", flat=True)[:KEPT]),
        }
        with override_settings(JOBS_KEPT_FOR_EACH_QUEUE=KEPT):
            engine.prune("plugins")
        assert set(self.rows().filter(state__in=OVER).values_list("uuid", flat=True)) == kept
        for job in [job for job, known in self.known.items() if known.row["state"] in OVER and job not in kept]:
            self.judge(self.known.pop(job))

    # --- What holds after every step ----------------------------------------------------------------------------------

    @invariant()
    def each_step_was_allowed(self) -> None:
        rows = {row["uuid"]: row for row in self.rows().annotate(now=Now()).values()}
        assert rows.keys() == self.known.keys(), "a job came from nowhere, or is gone before it was over"
        for job, row in rows.items():
            known = self.known[job]
            before = known.row
            assert row["state"] in FOLLOWS[before["state"]]
            assert row["attempt"] >= before["attempt"]
            assert row["attempt"] <= row["max_attempts"] + row["deferred"]
            assert row["deferred"] <= self.kind.max_deferrals
            if before["state"] in OVER:
                changed = {name for name in row if name not in TIMES and row[name] != before[name]}
                assert not changed, f"a job that was over was changed: {changed}"
                assert row["finished"] == before["finished"]
            self.reachable(row)
            known.row = row
            self.judge(known)

    def reachable(self, row: dict[str, Any]) -> None:
        """Somebody will come for a job that is not over: a bell, or the reaper."""
        if row["state"] == "queued":
            rings_in = row["bell_after"] - max(row["now"], row["run_after"])
            assert rings_in <= timedelta(seconds=relay.MOST_BELL_SECONDS)
            assert row["run_after"] - row["now"] <= timedelta(seconds=72)
        elif row["state"] == "running":
            assert row["lease_until"] - row["now"] <= timedelta(seconds=self.kind.lease_seconds)
        else:
            assert row["finished"] is not None
            assert row["lease_until"] is None

    def judge(self, known: Known) -> None:
        """Done is one effect and nothing else; a failure is told once, with its reason."""
        state = known.row["state"]
        assert known.effects == (state == "done")
        assert known.told == ([known.row["reason"]] if state in ("failed", "dead") else [])
        assert known.row["reason"] or state not in ("failed", "dead")

    @invariant()
    def tallies_add_up(self) -> None:
        rows = Tally.objects.using("plugins").filter(subject=self.kind.name).values("event").annotate(all=Sum("count"))
        assert {row["event"]: row["all"] for row in rows} == {name: n for name, n in self.counts.items() if n}

    def everything_ends(self) -> None:
        """Nothing is stuck: by the relay's moves, a worker that answers bells, and time, every job is over soon."""
        self.time_passes(100)
        self.ring()
        for _ in range(10):
            self.time_passes(100)
            self.broker_forgets()
            self.reap()
            self.ring()
            for job in list(self.bells()):
                claimed = engine.claim(self.kind, job)
                self.each_step_was_allowed()
                if claimed:
                    self.finish(Held(claimed))
            self.each_step_was_allowed()
            if not self.rows().exclude(state__in=OVER).exists():
                break
        assert not self.rows().exclude(state__in=OVER).exists()
        self.tallies_add_up()

    def bells(self) -> Iterator[str]:
        """Take the bells out of the broker, as a worker does."""
        with app.connection_for_write() as connection:
            while message := connection.default_channel.basic_get("property", no_ack=True):
                kind_name, job = message.decode()[0]
                if kind_name == self.kind.name:
                    yield job


TIMES = {"now", "run_after", "bell_after", "created", "finished"}


@pytest.fixture
def alone(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no other relay make moves of its own."""
    monkeypatch.setitem(app.amqp.queues, "property", Queue("property", Exchange("drydock"), routing_key="property"))
    servers.stop("relay")
    yield
    servers.start_relay()


@pytest.mark.usefixtures("alone")
def test_q8_the_promises_hold_in_every_order_of_moves() -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    chosen = settings(
        max_examples=25, stateful_step_count=40, deadline=None, database=None, suppress_health_check=checks
    )
    run_state_machine_as_test(Jobs, settings=chosen)

"""The job table: accepted with its cause, claimed once, finished behind its fence."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.db import IntegrityError, connections, transaction

from drydock.jobs import engine
from drydock.jobs.models import Job
from platform_servers import Servers

pytestmark = pytest.mark.usefixtures("servers")
# Nobody serves the queue of this kind's task, so that the tests have the job to themselves.
KIND = engine.Kind("test", "plugins", "export", "drydock.nobody", max_attempts=2, lease_seconds=60)


@pytest.fixture
def rung(monkeypatch: pytest.MonkeyPatch) -> list[uuid.UUID]:
    bells: list[uuid.UUID] = []
    monkeypatch.setattr(engine, "ring", lambda _, job: bells.append(job))
    return bells


def accept() -> Job:
    with transaction.atomic(using="plugins"):
        return engine.accept(KIND, {}, idempotency_key=uuid.uuid4().hex)


def state(job: Job) -> str:
    return Job.objects.using("plugins").get(uuid=job.uuid).state


def test_the_bell_rings_after_the_commit_and_never_after_a_rollback(rung: list[uuid.UUID]) -> None:
    with transaction.atomic(using="plugins"):
        job = engine.accept(KIND, {}, idempotency_key=uuid.uuid4().hex)
        assert rung == []
    assert rung == [job.uuid]
    with pytest.raises(ZeroDivisionError), transaction.atomic(using="plugins"):
        lost = engine.accept(KIND, {}, idempotency_key=uuid.uuid4().hex)
        raise ZeroDivisionError
    assert rung == [job.uuid]
    assert not Job.objects.using("plugins").filter(uuid=lost.uuid).exists()


def test_a_job_is_accepted_only_together_with_its_cause() -> None:
    with pytest.raises(RuntimeError, match="in the transaction"):
        engine.accept(KIND, {}, idempotency_key="x")


def test_a_broker_that_is_away_does_not_undo_an_acceptance(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise ConnectionError("no broker")

    monkeypatch.setattr(engine, "ring", away)
    assert state(accept()) == "queued"


def test_the_same_key_is_accepted_once(rung: list[uuid.UUID]) -> None:
    key = uuid.uuid4().hex
    with transaction.atomic(using="plugins"):
        engine.accept(KIND, {}, idempotency_key=key)
    with pytest.raises(IntegrityError), transaction.atomic(using="plugins"):
        engine.accept(KIND, {}, idempotency_key=key)
    assert len(rung) == 1


def test_of_many_workers_one_gets_the_job(rung: list[uuid.UUID]) -> None:
    accept()

    def claim(_: int) -> bool:
        try:
            return engine.claim(KIND, rung[0]) is not None
        finally:
            connections.close_all()

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(claim, range(8))) == [False] * 7 + [True]


@pytest.mark.usefixtures("rung")
def test_a_lease_that_ran_out_is_claimed_again_and_its_first_holder_is_fenced_off() -> None:
    job = accept()
    first = engine.claim(KIND, job.uuid)
    assert first is not None
    assert engine.claim(KIND, job.uuid) is None
    Job.objects.using("plugins").filter(uuid=job.uuid).update(lease_until="2020-01-01T00:00Z")
    second = engine.claim(KIND, job.uuid)
    assert second is not None
    assert (first.attempt, second.attempt) == (1, 2)
    assert not engine.finish(KIND, job.uuid, first.attempt, Job.State.FAILED, "late")
    assert state(job) == "running"
    assert engine.finish(KIND, job.uuid, second.attempt, Job.State.DONE)
    assert state(job) == "done"
    assert not engine.finish(KIND, job.uuid, second.attempt, Job.State.FAILED, "twice")


@pytest.mark.usefixtures("rung")
def test_attempts_are_capped() -> None:
    job = accept()
    for _ in range(KIND.max_attempts):
        assert engine.claim(KIND, job.uuid) is not None
        Job.objects.using("plugins").filter(uuid=job.uuid).update(lease_until="2020-01-01T00:00Z")
    assert engine.claim(KIND, job.uuid) is None


def test_the_export_worker_is_told_of_no_unknown_task(servers: Servers) -> None:
    assert "unregistered task" not in servers.log("export")

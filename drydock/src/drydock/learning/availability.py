"""Availability: computed from what learners did, by a job or a command, and never by a read."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from django.db import connections, transaction
from django.db.models import QuerySet
from django.db.models.functions import Now

from drydock.accounts.models import User
from drydock.jobs import engine
from drydock.learning import rules
from drydock.learning.models import Attempt, Availability, Photo, Unit

KIND = "availability"
EVERYBODY = "all"
BATCH = 500
# Any number that nobody else uses: whoever holds it is the only one who writes availability.
LOCK = 0x0A7A_11AB


@dataclass(frozen=True)
class Drift:
    """A unit that is not as open or locked for a learner as it should be."""

    user_id: int
    username: str
    unit_id: int
    unit: str
    should_be_open: bool

    def __str__(self) -> str:
        """Say who, which unit, what is and what should be."""
        states = ("locked", "open") if self.should_be_open else ("open", "locked")
        return f"{self.username}: {self.unit}: {states[0]} → {states[1]}"


def ask_for(users: Sequence[int] | None, cause: str) -> None:
    """Accept the job that recomputes availability (None: everybody's), in the transaction of its cause."""
    engine.accept(KIND, {"users": EVERYBODY if users is None else list(users)}, idempotency_key=cause)


def unit_rules() -> dict[int, rules.Rule]:
    """Return what each unit asks for."""
    requires: dict[int, set[int]] = defaultdict(set)
    for unit, required in Unit.requires.through.objects.values_list("from_unit_id", "to_unit_id"):
        requires[unit].add(required)
    return {
        unit: rules.Rule(frozenset(requires[unit]), needs_photo)
        for unit, needs_photo in Unit.objects.order_by().values_list("pk", "needs_photo")
    }


def drifts(users: Sequence[int] | None = None) -> Iterator[Drift]:
    """Find what is not as it should be, for these people or for everybody; changes nothing."""
    asked = unit_rules()
    slugs = dict(Unit.objects.order_by().values_list("pk", "slug"))
    people = User.objects.order_by("pk") if users is None else User.objects.filter(pk__in=users).order_by("pk")
    last = 0
    while batch := dict(people.filter(pk__gt=last).values_list("pk", "username")[:BATCH]):
        last = max(batch)
        answered = _units_of(Attempt.objects.filter(user__in=batch, correct=True))
        approved = _units_of(Photo.objects.filter(user__in=batch, state=Photo.State.APPROVED))
        rows = Availability.objects.filter(user__in=batch).values_list("user_id", "unit_id", "open")
        recorded = {(user, unit): is_open for user, unit, is_open in rows}
        for user, username in batch.items():
            should = rules.open_units(asked, answered[user], approved[user])
            for unit, rule in asked.items():
                if rules.shown_open(rule, recorded.get((user, unit))) != (unit in should):
                    yield Drift(user, username, unit, slugs[unit], unit in should)


def recompute(users: Sequence[int] | None = None) -> list[Drift]:
    """Make availability what it should be, in the caller's transaction; return what was not.

    One at a time: who computed from older facts must not write after who computed from newer ones.
    """
    with connections["core"].cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
    found = list(drifts(users))
    _write(found)
    return found


def repair(users: Sequence[int] | None = None) -> list[Drift]:
    """Recompute outside of any job, and count what was repaired."""
    with transaction.atomic(using="core"):
        found = recompute(users)
        if found:
            engine.tally("core", KIND, "drift repaired", len(found))
    return found


def look(users: Sequence[int] | None = None) -> list[Drift]:
    """Find the drift in a transaction in which PostgreSQL refuses every write."""
    with transaction.atomic(using="core"):
        with connections["core"].cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        return list(drifts(users))


def _write(found: Iterable[Drift]) -> None:
    rows = [
        Availability(user_id=drift.user_id, unit_id=drift.unit_id, open=drift.should_be_open, since=Now())
        for drift in found
    ]
    Availability.objects.bulk_create(
        rows, BATCH, update_conflicts=True, unique_fields=["user", "unit"], update_fields=["open", "since"]
    )


def _units_of(facts: QuerySet[Attempt] | QuerySet[Photo]) -> dict[int, set[int]]:
    units: dict[int, set[int]] = defaultdict(set)
    for user, unit in facts.order_by().values_list("user_id", "unit_id").distinct():
        units[user].add(unit)
    return units

"""Which units are passed and which are open: pure functions of what a learner has done."""

from collections.abc import Mapping, Set
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """What a unit asks for: units to pass before it, and perhaps an approved photo."""

    requires: frozenset[int] = frozenset()
    needs_photo: bool = False


def passed(rules: Mapping[int, Rule], answered: Set[int], approved: Set[int]) -> frozenset[int]:
    """Return the units with a correct attempt and, where one is needed, an approved photo."""
    return frozenset(
        unit for unit, rule in rules.items() if unit in answered and (unit in approved or not rule.needs_photo)
    )


def open_units(rules: Mapping[int, Rule], answered: Set[int], approved: Set[int]) -> frozenset[int]:
    """Return the units that should be open: all that they require is passed."""
    done = passed(rules, answered, approved)
    return frozenset(unit for unit, rule in rules.items() if rule.requires <= done)


def shown_open(rule: Rule, recorded: bool | None, *, staff: bool = False) -> bool:
    """Say whether a unit is open as readers see it: as recorded. Staff see all.

    Where nothing is recorded (a new person, a new unit), it is open if it requires nothing: that holds for everybody.
    """
    return staff or (not rule.requires if recorded is None else recorded)

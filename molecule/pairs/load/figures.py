"""The arithmetic of a run: gaps between acknowledged writes, numbers that are missing, requests that failed. No clock, no network."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Request:
    """One HTTP request as its client saw it; `failure` is empty when it got what it asked for."""

    began: float
    seconds: float
    failure: str = ""


@dataclass(frozen=True)
class Comparison:
    """What was acknowledged beside what is there."""

    acknowledged: int
    lost: list[int] = field(default_factory=list)
    # There more than once.
    doubled: list[int] = field(default_factory=list)
    # Tried, never acknowledged, and there all the same: allowed, for its writer was never told "no".
    unacknowledged: list[int] = field(default_factory=list)
    # There, and nobody has ever written it.
    strange: list[int] = field(default_factory=list)


def compare(acknowledged: Collection[int], tried: Collection[int], present: Iterable[int]) -> Comparison:
    """Compare the writer's notes with the table."""
    found = Counter(present)
    return Comparison(
        acknowledged=len(acknowledged),
        lost=sorted(set(acknowledged) - found.keys()),
        doubled=sorted(number for number, times in found.items() if times > 1),
        unacknowledged=sorted((found.keys() - set(acknowledged)) & set(tried)),
        strange=sorted(found.keys() - set(tried) - set(acknowledged)),
    )


def longest_gap(times: Sequence[float], began: float, ended: float) -> float:
    """The longest time without an acknowledgement that overlaps the window; `times` ascend.

    A gap counts whole, also where it began before the window or ended after it. Without a later acknowledgement it lasts until
    the window's end.
    """
    first, last = max(0, bisect_right(times, began) - 1), bisect_left(times, ended)
    inside = [*times[first : last + 1]]
    if not inside or inside[0] > began:
        inside.insert(0, began)
    if inside[-1] < ended:
        inside.append(ended)
    return max(after - before for before, after in pairwise(inside))


def usual_gap(times: Sequence[float]) -> float:
    """The median time between two acknowledgements; 0 with fewer than two."""
    return median(after - before for before, after in pairwise(times)) if len(times) > 1 else 0.0


def interruption(times: Sequence[float], began: float, ended: float) -> float:
    """How long writing stood still at most: the longest gap beyond the usual one."""
    return max(0.0, longest_gap(times, began, ended) - usual_gap(times))


def within(times: Iterable[float], began: float, ended: float) -> int:
    """How many of the moments lie in the window."""
    return sum(began <= moment < ended for moment in times)


def of_window(requests: Iterable[Request], began: float, ended: float) -> dict[str, Any]:
    """What the requests that were under way in a window came to."""
    there = [each for each in requests if each.began < ended and each.began + each.seconds >= began]
    failures = Counter(each.failure for each in there if each.failure)
    return {
        "requests": len(there),
        "failed": sum(failures.values()),
        "failures": dict(sorted(failures.items())),
        "slowest_seconds": round(max((each.seconds for each in there), default=0.0), 2),
    }


def back_since(seen: Sequence[tuple[float, bool]], steady_seconds: float) -> float | None:
    """The moment from which everything was well without a break, once it has been for so many seconds; None before.

    seen: when it was looked at, and whether all was well; ascending.
    """
    since: float | None = None
    for moment, well in seen:
        since = (moment if since is None else since) if well else None
    return since if since is not None and seen[-1][0] - since >= steady_seconds else None

"""What is wrong with the hosts themselves, before anything is changed: unreachable, one machine under two names, clocks apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

# Groups whose members stand in for one another.
REDUNDANT = ("postgresql_core", "postgresql_plugins", "etcd", "redis", "web", "worker", "proxy")


def _and(names: Iterable[str]) -> str:
    words = list(names)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def reason(answer: Mapping[str, Any]) -> str:
    """Why a host did not answer, in the words of ssh."""
    return " ".join(str(answer.get("msg") or "no answer").split()).rpartition("to the host via ssh: ")[2]


def _unreachable(answers: Mapping[str, Mapping[str, Any]]) -> str:
    lost = {host: reason(answer) for host, answer in answers.items() if "boot_id" not in answer}
    if not lost:
        return ""
    first = next(iter(lost))
    others = ",".join(["all", *(f"!{host}" for host in lost)])
    return (
        f"{_and(lost)} cannot be asked ({first}: {lost[first][:200]}). Switch on what is off and see that ssh {first} works; "
        f"only site.yml can go on without {'it' if len(lost) == 1 else 'them'}: --limit '{others}'"
    )


def _one_machine(answers: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> str:
    for one, other in combinations(answers, 2):
        if answers[one]["boot_id"] != answers[other]["boot_id"]:
            continue
        if answers[one]["machine_id"] == answers[other]["machine_id"]:
            return (
                f"{one} and {other} are one machine under two names, which would write over each other's settings. Correct ansible_host "
                "of one of them in the inventory, or name the machine once and put it into both groups"
            )
        shared = [group for group in REDUNDANT if one in groups.get(group, []) and other in groups.get(group, [])]
        if shared:
            return (
                f"{one} and {other} of group {shared[0]} run on one kernel, as containers of one machine: when that is lost, both are. "
                f"Move one of them to another machine"
            )
    return ""


def _clocks_apart(answers: Mapping[str, Mapping[str, Any]], tolerance_seconds: float) -> str:
    offsets = {host: float(answer["clock_offset_seconds"]) for host, answer in answers.items()}
    errors = {host: float(answer["clock_error_seconds"]) for host, answer in answers.items()}

    def surely_apart(gap: float, *hosts: str) -> bool:
        return abs(gap) - sum(errors[host] for host in hosts) > tolerance_seconds

    def gap_of(host: str, reference: float) -> str:
        gap = offsets[host] - reference
        return f"{host} is {abs(gap):.0f} s {'ahead of' if gap > 0 else 'behind'}"

    def refused(told: str, where: str) -> str:
        return (
            f"clocks are apart: {told}; more than {tolerance_seconds:g} s make certificates, leases and timers unreliable. "
            f"{where} type: timedatectl; systemctl restart systemd-timesyncd"
        )

    # the controller has a vote on what time it is, and no more
    middle = sorted([*offsets.values(), 0.0])[(len(offsets) + 1) // 2]
    wrong = [host for host, offset in offsets.items() if surely_apart(offset - middle, host)]
    low, high = min(offsets, key=lambda host: offsets[host]), max(offsets, key=lambda host: offsets[host])
    if wrong:
        return refused(f"{_and(gap_of(host, middle) for host in wrong)} the others", f"On {_and(wrong)}")
    if surely_apart(offsets[high] - offsets[low], low, high):
        return refused(f"{gap_of(high, offsets[low])} {low}", "On both")
    if all(surely_apart(offset, host) for host, offset in offsets.items()):
        return refused(f"{gap_of(high, 0)} this machine's" + (", and so are all others" if len(offsets) > 1 else ""), "Here and there")
    return ""


def hosts_problem(answers: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]], tolerance_seconds: float) -> str:
    """What is wrong with the hosts, in one sentence; empty when nothing is.

    answers: result of the action `host_identity` by host (of one that cannot be reached: `msg`). groups: the inventory's groups.
    tolerance_seconds: how far clocks may be apart. Only what is certain counts: the time that the question took is taken off.
    """
    return _unreachable(answers) or _one_machine(answers, groups) or _clocks_apart(answers, float(tolerance_seconds))


class FilterModule:
    """The filter of the preflight of hosts."""

    def filters(self) -> dict[str, Any]:
        return {"hosts_problem": hosts_problem}

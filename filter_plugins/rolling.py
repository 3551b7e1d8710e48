"""In which order hosts are taken out of service, one after another, without taking a pair or a majority away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Groups whose members stand in for one another: never two of one group at a time. Web hosts and proxies count as one, because a proxy
#: that is away while a web host comes back would not hear of it.
STAND_INS = {
    **{group: group for group in ("etcd", "postgresql_core", "postgresql_plugins", "redis", "object_storage", "worker")},
    "web": "edge",
    "proxy": "edge",
}


def rolling_batches(hosts: Sequence[str], groups: Mapping[str, Sequence[str]], canary: str = "") -> list[list[str]]:
    """Batches of `hosts`: first one host alone, the canary, then as few batches as keep a member of each group in service.

    canary: its name; the first worker when it is empty, for what a worker holds another one does. Raises AnsibleFilterError when the
    canary is none of `hosts`.
    """
    if canary and canary not in hosts:
        from ansible.errors import AnsibleFilterError

        raise AnsibleFilterError(f"canary '{canary}' is none of the hosts: {', '.join(hosts)}")
    first = canary or next((host for host in groups.get("worker", []) if host in hosts), hosts[0])
    batches: list[list[str]] = []
    taken: list[set[str]] = []
    for host in hosts:
        if host == first:
            continue
        mine = {kind for group, kind in STAND_INS.items() if host in groups.get(group, [])}
        place = next((number for number, others in enumerate(taken) if not mine & others), len(batches))
        if place == len(batches):
            batches.append([])
            taken.append(set())
        batches[place].append(host)
        taken[place] |= mine
    return [[first], *batches]


class FilterModule:
    """Gives the filter to Ansible."""

    def filters(self) -> dict[str, Any]:
        return {"rolling_batches": rolling_batches}

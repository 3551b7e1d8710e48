"""Hosts leave service one after another, and a pair or a majority never does."""

from __future__ import annotations

import random

import pytest
from ansible.errors import AnsibleFilterError

from filter_plugins import rolling

GROUPS = {
    "postgresql_core": ["db-1", "db-2"],
    "etcd": ["q-1", "q-2", "q-3"],
    "redis": ["q-1", "q-2", "q-3"],
    "web": ["web-1", "web-2"],
    "worker": ["worker-1", "worker-2"],
}
HOSTS = ["db-1", "db-2", "q-1", "q-2", "q-3", "web-1", "web-2", "worker-1", "worker-2"]


def test_the_canary_goes_alone_then_few_batches() -> None:
    assert rolling.rolling_batches(HOSTS, GROUPS) == [
        ["worker-1"],
        ["db-1", "q-1", "web-1", "worker-2"],
        ["db-2", "q-2", "web-2"],
        ["q-3"],
    ]
    assert rolling.rolling_batches(HOSTS, GROUPS, "q-3")[0] == ["q-3"]
    assert rolling.rolling_batches(["all-in-one"], {group: ["all-in-one"] for group in GROUPS}) == [["all-in-one"]]


def test_a_canary_that_is_no_host_is_refused() -> None:
    with pytest.raises(AnsibleFilterError, match="canary 'web-9' is none of the hosts"):
        rolling.rolling_batches(HOSTS, GROUPS, "web-9")


@pytest.mark.parametrize("seed", range(50))
def test_every_host_goes_once_and_no_two_stand_ins_together(seed: int) -> None:
    chance = random.Random(seed)
    groups = {group: chance.sample("abcdefgh", chance.randint(0, 5)) for group in rolling.STAND_INS}
    edge = groups["web"] + groups["proxy"]
    hosts = list("abcdefgh")
    batches = rolling.rolling_batches(hosts, groups)
    assert sorted(host for batch in batches for host in batch) == hosts
    for batch in batches:
        for members in (*groups.values(), edge):
            assert len(set(batch) & set(members)) <= 1

"""The bench of deploys: its inventory is one that the suite takes, and its table says what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import deploys
from conftest import ROOT, load
from deploys import Cost

topology = load(ROOT / "filter_plugins/topology.py").topology


def test_the_inventory_has_all_that_a_platform_needs() -> None:
    wanted = deploys.hosts(4)["all"]
    groups = {name: list(group["hosts"]) for name, group in wanted["children"].items()}
    addresses = {name: host["ansible_host"] for name, host in wanted["hosts"].items()}
    found = topology({**groups, "all": list(addresses)}, addresses)
    assert [member["name"] for member in found["web"]["members"]] == ["web-1", "web-2", "web-3", "web-4"]


def test_the_table_has_ratios_in_one_run_and_growth_over_the_fewest_hosts() -> None:
    def row(deploy: float, rolling: float, rollback: float, halves: float) -> dict[str, list[Cost]]:
        named = {"deploy": deploy, "plain, a quarter at a time": rolling, "rollback": rollback, "plain, half at a time": halves}
        # medians, not means: the second round was disturbed
        return {name: [Cost(seconds, 10.0), Cost(seconds * 9, 90.0), Cost(seconds, 10.0)] for name, seconds in named.items()}

    text = deploys.table(deploys.medians({1: row(40, 20, 30, 20), 8: row(100, 80, 60, 40)}))
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]] == [
        ["1", "40", "20", "2.0", "30", "20", "1.5", "10", "10"],
        ["8", "100", "80", "1.2", "60", "40", "1.5", "10", "10"],
        ["8 ÷ 1", "2.5", "4.0", "", "2.0", "2.0", "", "1.0", "1.0"],
    ]

"""How much memory a PostgreSQL cluster takes."""

from __future__ import annotations

import pytest
from conftest import ROOT, load

postgresql_memory = load(ROOT / "filter_plugins/postgresql.py").postgresql_memory


@pytest.mark.parametrize(
    ("memory_mb", "shared_buffers", "effective_cache_size", "maintenance_work_mem", "work_mem"),
    [
        (512, "128MB", "384MB", "32MB", "4MB"),
        (3915, "896MB", "2688MB", "224MB", "8MB"),  # 4 GiB, as a host reports them
        (15990, "3968MB", "11904MB", "992MB", "39MB"),  # 16 GiB
        (257_000, "16384MB", "192384MB", "2048MB", "128MB"),  # bounds
        (64, "64MB", "96MB", "32MB", "4MB"),
    ],
)
def test_shares(memory_mb: int, shared_buffers: str, effective_cache_size: str, maintenance_work_mem: str, work_mem: str) -> None:
    assert postgresql_memory(memory_mb, 100) == {
        "shared_buffers": shared_buffers,
        "effective_cache_size": effective_cache_size,
        "maintenance_work_mem": maintenance_work_mem,
        "work_mem": work_mem,
    }


@pytest.mark.parametrize("gib", [1, 2, 4, 8, 16, 32, 64, 128])
def test_some_mebibytes_more_after_another_boot_change_nothing(gib: int) -> None:
    reported = round(gib * 1024 * 0.975)  # what the kernel leaves of it
    assert len({str(postgresql_memory(reported + wobble, 100)) for wobble in range(-8, 9)}) == 1


def test_more_connections_get_less_each() -> None:
    assert postgresql_memory(15990, 300)["work_mem"] == "13MB"

"""The platform of pairs under steady load, for as long as the tests last."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from load.places import ROOT, Platform
from load.run import Run, keep


@pytest.fixture(scope="session")
def platform() -> Platform:
    return Platform.of(ROOT / "molecule/pairs/inventory")


@pytest.fixture(scope="session")
def run(platform: Platform) -> Iterator[Run]:
    """The load; it goes on from the first test that wants it until `over`."""
    one = Run(platform)
    try:
        one.start()
        yield one
    finally:
        one.close()


@pytest.fixture(scope="session")
def over(run: Run) -> Run:
    """The same after its end, when it is known what became of everything; its figures are kept."""
    run.stop()
    print(f"figures: {keep(run.result())}")
    return run

"""Users of a platform while it is delivered to: they look at pages and ask for documents and exports."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from load.browsing import Browsing
from load.jobs import Jobs, Outcome
from load.places import Platform

JOBS_LIMIT_SECONDS = 300


@dataclass
class Load:
    """What users do, and what they met."""

    browsing: Browsing
    jobs: Jobs

    def failures(self) -> list[str]:
        return [each.failure for each in list(self.browsing.requests) if each.failure]

    def over(self) -> Outcome:
        """End it, and see what became of everything that was accepted."""
        self.browsing.stop()
        self.jobs.stop()
        return self.jobs.outcome(JOBS_LIMIT_SECONDS)


@contextlib.contextmanager
def users(platform: Platform, requests_per_second: float, jobs_per_minute: float, people: int = 3) -> Iterator[Load]:
    """Steady users for as long as the context is open; each of the people asks for so few jobs that the rate limit never counts."""
    password = platform.secret("app_demo_password")
    names = [f"deliver-{int(time.time()):x}-{number}" for number in range(people)]
    made = " && ".join(f"drydock-run drydock ensure_user --username {name} --password-env DRYDOCK_DEMO_PASSWORD" for name in names)
    platform.ssh(platform.hosts_of("web")[0], made, limit_seconds=60 * people)
    with tempfile.TemporaryDirectory() as folder:
        browsing = Browsing(platform, names[0], password, requests_per_second)
        one = Load(browsing, Jobs(platform, names, password, Path(folder), jobs_per_minute))
        one.browsing.start()
        one.jobs.start()
        try:
            yield one
        finally:
            one.browsing.stop()
            one.jobs.stop()

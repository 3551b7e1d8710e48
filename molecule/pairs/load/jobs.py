"""People who ask for documents and exports, each under an idempotency key until it is accepted; and what became of what was."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .places import ROOT, Platform

sys.path.append(str(ROOT / "drydock/tests"))
from proof import ledger

#: One in so many is a document; exports cost less. Documents are in cluster core, exports in plugins.
DOCUMENT_EVERY = 4
#: Keys of each person that are asked for once more at the end; more would meet the rate limit, and take minutes.
ASKED_AGAIN = 2


@dataclass
class Outcome:
    """What became of all that was accepted. A location is a job's address."""

    accepted: int = 0
    done: int = 0
    failed: int = 0
    #: Never accepted, however long they were asked for.
    refused: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    #: Not as promised in another way, and in which.
    wrong: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    worst_seconds: float = 0.0


class Jobs:
    """So many people that the rate limit never counts, who take turns."""

    def __init__(self, platform: Platform, usernames: list[str], password: str, folder: Path, per_minute: float) -> None:
        self.period_seconds = 60 / per_minute
        self.people = []
        for name in usernames:
            person = ledger.Person(platform.url, str(platform.ca), name, password)
            self.people.append(ledger.Acceptance(person, ledger.Ledger(folder / f"{name}.jsonl"), patience_seconds=180))
        self.refused: list[str] = []
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(64)
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        # the ledger's times are the wall clock's
        self._offset = time.time() - time.monotonic()

    def start(self) -> None:
        for each in self.people:
            each.person.sign_in()
        self._thread.start()

    def stop(self) -> None:
        """Ask for nothing new, and wait until all that was asked for is accepted or given up."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(self.period_seconds):
            acceptance = self.people[number % len(self.people)]
            # the turns of people and of kinds differ, so that everybody asks for both
            kind = "document" if (number + number // len(self.people)) % DOCUMENT_EVERY == 0 else "export"
            key = f"{acceptance.person.username}-{number}"
            entry: dict[str, Any] = {"key": key, "kind": kind, "body": ledger.KINDS[kind][1](number)}
            acceptance.ledger.write(entry)
            self._pool.submit(self._ask, acceptance, entry)
            number += 1

    def _ask(self, acceptance: ledger.Acceptance, entry: dict[str, Any]) -> None:
        try:
            acceptance.ask(entry)
        except (*ledger.UNREACHABLE, RuntimeError) as error:
            self.refused.append(f"{entry['key']}: {error}")

    def accepted(self) -> dict[str, float]:
        """Each accepted job's location, and when it was accepted."""
        return {entry["location"]: entry["at"] - self._offset for each in self.people for entry in list(each.ledger.accepted.values())}

    def outcome(self, wait_seconds: float) -> Outcome:
        """Wait until everything that was accepted is over, and see what became of it; after `stop`."""
        total = Outcome(refused=self.refused)
        deadline = time.monotonic() + wait_seconds
        for each in self.people:
            found = ledger.check(each.person, each.ledger, wait_seconds=max(10.0, deadline - time.monotonic()), asked_twice=ASKED_AGAIN)
            total.accepted += found.accepted
            total.done += found.done
            total.failed += found.failed
            total.lost += found.lost
            kinds = {"has no result": found.effects_missing, "has more than one result": found.effects_doubled,
                     "failed without a reason": found.unexplained,
                     "got another answer when its key was sent again": found.accepted_twice}  # fmt: skip
            total.wrong |= {location: how for how, locations in kinds.items() for location in locations}
            for reason, times in found.reasons.items():
                total.reasons[reason] = total.reasons.get(reason, 0) + times
            total.worst_seconds = max(total.worst_seconds, *found.delays, 0.0)
        return total

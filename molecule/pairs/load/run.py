"""A run: steady load, one fault after another, and what each of them cost."""

from __future__ import annotations

import json
import os
import platform as machine
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .browsing import Browsing
from .faults import Fault
from .figures import Comparison, back_since, interruption, of_window, within
from .jobs import Jobs, Outcome
from .places import CLUSTERS, ROOT, STATE, NotInTimeError, Platform, until
from .writing import BrokerWriter, ClusterWriter, Writer

WRITES_PER_SECOND = 25
BROKER_WRITES_PER_SECOND = 10
REQUESTS_PER_SECOND = 8
JOBS_PER_MINUTE = 15
PEOPLE = 4
#: Undisturbed, before the first fault: the measure for the others.
CALM_SECONDS = 10
#: All must have been well for so long before the platform counts as whole again.
STEADY_SECONDS = 3
WHOLE_LIMIT_SECONDS = 240
SERVING_LIMIT_SECONDS = 120
JOBS_LIMIT_SECONDS = 300


@dataclass
class Window:
    """One fault: when it happened, and what it cost."""

    title: str
    hit: str
    began: float
    ended: float = 0.0
    promise: tuple[str, float] | None = None
    #: From the moment when what was taken away is there again; of what comes back by itself, from the fault itself.
    whole_after_seconds: float = 0.0
    interruption_seconds: dict[str, float] = field(default_factory=dict)
    write_errors: dict[str, int] = field(default_factory=dict)
    commits: dict[str, int] = field(default_factory=dict)
    http: dict[str, Any] = field(default_factory=dict)


class Run:
    """The load, and the faults during it."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.clusters = {cluster: ClusterWriter(platform, cluster, WRITES_PER_SECOND) for cluster in CLUSTERS}
        self.broker = BrokerWriter(platform, BROKER_WRITES_PER_SECOND)
        self.writers: list[Writer] = [*self.clusters.values(), self.broker]
        self.folder = tempfile.TemporaryDirectory(prefix="evenkeel-proof-")
        self.users = [f"proof-{int(time.time()):x}-{number}" for number in range(PEOPLE)]
        password = platform.secret("app_demo_password")
        self.jobs = Jobs(platform, self.users, password, Path(self.folder.name), JOBS_PER_MINUTE)
        self.browsing = Browsing(platform, self.users[0], password, REQUESTS_PER_SECOND)
        self.parts: list[Writer | Browsing | Jobs] = [*self.writers, self.browsing, self.jobs]
        self.windows: list[Window] = []
        self.findings: dict[str, Comparison] = {}
        self.outcome: Outcome | None = None
        self.began = self.ended = 0.0

    # --- the load ---

    def start(self) -> None:
        """Make the people and the tables, start, and look on until the load runs well."""
        until("the platform to be well", lambda: not self._note_unwell(), WHOLE_LIMIT_SECONDS, 2)
        app = self.platform.app["name"]
        made = " && ".join(f"{app}-run {app} ensure_user --username {name} --password-env DRYDOCK_DEMO_PASSWORD" for name in self.users)
        self.platform.ssh(self.platform.hosts_of("web")[0], made, limit_seconds=180)
        for cluster in self.clusters.values():
            cluster.prepare()
        self.began = time.monotonic()
        for part in self.parts:
            part.start()
        time.sleep(CALM_SECONDS)
        for writer in self.writers:
            if writer.errors or not writer.times:
                raise NotInTimeError(f"writer {writer.name} does not get through even undisturbed: {writer.errors[:1]}")

    def stop(self) -> None:
        """End the load and see what became of everything that was promised."""
        self.ended = time.monotonic()
        self.browsing.stop()
        self.jobs.stop()
        for writer in self.writers:
            writer.stop()
        self.findings = {cluster: writer.findings() for cluster, writer in self.clusters.items()}
        self.outcome = self.jobs.outcome(JOBS_LIMIT_SECONDS)
        self.outcome.wrong |= self._made_without_need()

    def close(self) -> None:
        """Leave nothing behind."""
        for part in self.parts:
            part.stop()
        for writer in self.clusters.values():
            writer.drop()
        self.folder.cleanup()

    def _made_without_need(self) -> dict[str, str]:
        """Documents and exports beyond what was accepted and what was asked for without an answer."""
        names = "SELECT id FROM accounts_user WHERE username = ANY(%s)"
        ids = [row[0] for row in self.clusters["core"].ask(names, self.users)]
        ((documents,),) = self.clusters["core"].ask("SELECT count(*) FROM documents_document WHERE owner_id = ANY(%s)", ids)
        ((exports,),) = self.clusters["plugins"].ask("SELECT count(*) FROM exports_export WHERE owner_id = ANY(%s)", ids)
        asked = sum(len(each.ledger.asked) for each in self.jobs.people)
        return {f"{documents + exports} documents and exports": f"were made for {asked} wishes"} if documents + exports > asked else {}

    # --- faults ---

    def _note_unwell(self) -> list[str]:
        self.last_unwell = self.platform.unwell()
        return self.last_unwell

    def _serving(self, since: float) -> bool:
        """Whether everybody is served again: a write to each within the last second, and a page asked for after `since`."""
        now = time.monotonic()
        writes = all(writer.times and writer.times[-1] > now - 1 for writer in self.writers)
        return writes and any(not each.failure and each.began > since for each in self.browsing.requests[-50:])

    def inflict(self, fault: Fault) -> Window:
        """Let one fault happen, wait until the platform is whole again, and count."""
        until("the platform to be well", lambda: not self._note_unwell(), WHOLE_LIMIT_SECONDS, 2)
        window = Window(fault.title, "", time.monotonic(), promise=fault.promise)
        with fault.inflict(self.platform) as window.hit:
            over = time.monotonic()
            if fault.lasts_seconds:
                time.sleep(fault.lasts_seconds)
                until("everybody to be served again", lambda: self._serving(over), SERVING_LIMIT_SECONDS)
                over = time.monotonic()
        seen: list[tuple[float, bool]] = []
        while (back := back_since(seen, STEADY_SECONDS)) is None:
            if time.monotonic() > over + WHOLE_LIMIT_SECONDS:
                told = f"not whole again {WHOLE_LIMIT_SECONDS} s after: {fault.title} ({window.hit}): {self.last_unwell}"
                raise NotInTimeError(f"{told}\n{self.platform.evidence(self.last_unwell)}")
            moment = time.monotonic()
            seen.append((moment, not self._note_unwell()))
            time.sleep(max(0.0, moment + 1 - time.monotonic()))
        window.ended = time.monotonic()
        window.whole_after_seconds = max(0.0, back - over)
        self._count(window)
        self.windows.append(window)
        return window

    def _count(self, window: Window) -> None:
        began, ended = window.began, window.ended
        for writer in self.writers:
            window.interruption_seconds[writer.name] = round(interruption(list(writer.times), began, ended), 2)
            window.write_errors[writer.name] = within((when for when, _ in list(writer.errors)), began, ended)
        found = [writer.findings() for writer in self.clusters.values()]
        window.commits = {
            "acknowledged": sum(within(list(writer.times), began, ended) for writer in self.clusters.values()),
            "lost": sum(len(each.lost) for each in found),
            "doubled": sum(len(each.doubled) for each in found),
        }
        window.http = of_window(list(self.browsing.requests), began, ended)

    # --- the result ---

    def result(self) -> dict[str, Any]:
        """Everything that was counted, for a file; after `stop`."""
        outcome = self.outcome or Outcome()
        accepted = self.jobs.accepted()
        faults = []
        for window in self.windows:
            took = {location for location, moment in accepted.items() if window.began <= moment < window.ended}
            row = {key: value for key, value in asdict(window).items() if key not in ("began", "ended")}
            row["seconds"] = round(window.ended - window.began, 1)
            row["whole_after_seconds"] = round(window.whole_after_seconds, 1)
            row["jobs"] = {"accepted": len(took), "lost": len(took & set(outcome.lost)), "wrong": len(took & outcome.wrong.keys())}
            faults.append(row)
        whole = of_window(self.browsing.requests, self.began, self.ended)
        return {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": {"cores": os.cpu_count(), "processor": processor(), "hosts": len(self.platform.topology["addresses"])},
            "seconds": round(self.ended - self.began),
            "load": {
                "writes_per_second": WRITES_PER_SECOND,
                "requests_per_second": REQUESTS_PER_SECOND,
                "jobs_per_minute": JOBS_PER_MINUTE,
            },
            "faults": faults,
            "commits": {
                "acknowledged": sum(each.acknowledged for each in self.findings.values()),
                "lost": sum(len(each.lost) for each in self.findings.values()),
                "doubled": sum(len(each.doubled) for each in self.findings.values()),
                "strange": sum(len(each.strange) for each in self.findings.values()),
                "unacknowledged": sum(len(each.unacknowledged) for each in self.findings.values()),
            },
            "jobs": asdict(outcome) | {"worst_seconds": round(outcome.worst_seconds, 1)},
            "http": whole,
        }

    def broken(self) -> list[str]:
        """The promises that were not kept, each in a sentence; after `stop`."""
        told = []
        for cluster, found in self.findings.items():
            kinds = {"acknowledged commits are lost": found.lost, "commits are there twice": found.doubled,
                     "rows are there that nobody wrote": found.strange}  # fmt: skip
            told += [f"cluster {cluster}: {len(rows)} {what} (for example number {rows[0]})" for what, rows in kinds.items() if rows]
        outcome = self.outcome or Outcome()
        told += [f"{what} {how}" for what, how in outcome.wrong.items()]
        kinds_of_jobs = {"accepted jobs are not over": outcome.lost, "jobs were never accepted": outcome.refused}
        return told + [f"{len(rows)} {what} (for example {rows[0]})" for what, rows in kinds_of_jobs.items() if rows]


def commit() -> str:
    """The checkout's commit, with a plus when it has changes."""
    said = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return said.stdout.strip()


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), machine.machine())


def keep(result: dict[str, Any]) -> Path:
    """Write a result into the state folder; return where."""
    folder = STATE / "failover"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path

#!/usr/bin/python3 -IS
"""Backups, driven from the repository host.

evenkeel-backup now CLUSTER --type TYPE      a backup into every repository
evenkeel-backup list [CLUSTER] [--json]      what there is, and to which times it can be restored
evenkeel-backup verify [CLUSTER]             are the files in the repositories what was written?
evenkeel-backup plan CLUSTER… --time TIME    which backup a restore would begin with; --name POINT, --latest
evenkeel-backup scratch CLUSTER --time TIME  a copy beside, for reading; --drop removes it
evenkeel-backup rehearsal CLUSTER            a copy for the rehearsal of migrations, as standard input says; --locks, --drop
evenkeel-backup drill CLUSTER                restore the newest backup, check its content, remove it again
evenkeel-backup prepare, metrics             for site.yml and the timer

It calls pgBackRest, which does the work; its configuration is below /etc/pgbackrest, this program's is /etc/evenkeel/backup.json.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import grp
import itertools
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

SETTINGS = Path("/etc/evenkeel/backup.json")
METRICS = Path("/var/lib/evenkeel/metrics")
TYPES = ("full", "diff", "incr")
SEGMENT_BYTES = 16 * 1024 * 1024
# Beside the size of the database: WAL that is replayed, and what a file system wants for itself.
SPARE_BYTES = 1024**3
FORK_SECONDS = 30
START_SECONDS = 12 * 3600
# Settings that recovery needs at least as high as on the server that wrote the WAL, and pg_controldata's names for them
RECOVERY_SETTING = re.compile(r"\s*(restore_command|recovery_\w+)\b")
REPLAY_SETTINGS = {
    "max_connections": "max_connections setting",
    "max_worker_processes": "max_worker_processes setting",
    "max_wal_senders": "max_wal_senders setting",
    "max_prepared_transactions": "max_prepared_xacts setting",
    "max_locks_per_transaction": "max_locks_per_xact setting",
}
LAST_COMMIT = """
SELECT CASE WHEN current_setting('track_commit_timestamp') = 'off' THEN 'unknown'
  ELSE coalesce((pg_last_committed_xact()).timestamp::text, 'unknown') END
"""
COUNT_ROWS = """
SELECT format('%I.%I', schemaname, tablename), (xpath('/row/c/text()',
  query_to_xml(format('SELECT count(*) AS c FROM ONLY %I.%I', schemaname, tablename), false, true, '')))[1]::text
FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1
"""

# Locks that make users wait, weakest first: writers wait for all, readers for the last
USERS_WAIT = ("ShareLock", "ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock")
SAMPLE_SECONDS = 0.05
# A table that the transaction itself has made is not seen from here
SAMPLE_LOCKS = """
SELECT extract(epoch FROM clock_timestamp()), locks.virtualtransaction, locks.mode, format('%I.%I', space.nspname, held.relname),
  regexp_replace(activity.application_name, '[^ -~]', '?', 'g')
FROM pg_locks AS locks JOIN pg_class AS held ON held.oid = locks.relation JOIN pg_namespace AS space ON space.oid = held.relnamespace
  JOIN pg_stat_activity AS activity ON activity.pid = locks.pid
WHERE locks.locktype = 'relation' AND locks.granted AND locks.mode ~ '^(Share|ShareRowExclusive|Exclusive|AccessExclusive)Lock$'
  AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND held.relkind IN ('r', 'p', 'm')
  AND space.nspname !~ '^pg_' AND activity.backend_type = 'client backend'
UNION ALL SELECT extract(epoch FROM clock_timestamp()), '', '', '', ''
"""
MIGRATION = "evenkeel migrate "  # what a session calls itself while it applies a migration; the migration's name follows
SILENT_SECONDS = 30  # a watch that has said nothing for so long has ended, or had no turn
YOUNG_SECONDS = 60  # a copy so young is somebody's, who is about to come


class BackupError(Exception):
    """Something that people must put right; the text is for them."""


# --- what the repositories say -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backup:
    """One backup of a cluster in one repository."""

    label: str
    type: str
    repository: str
    started: float
    stopped: float
    wal_first: str
    wal_last: str
    lsn_stop: int
    size: int
    stored: int
    failed: bool  # pages with a wrong checksum were found while it was made

    @property
    def timeline(self) -> int:
        """The timeline on which it ended."""
        return int(self.wal_last[:8], 16)


@dataclass(frozen=True)
class Holding:
    """What one repository holds of one cluster. `problem` is why it cannot be read or used."""

    repository: str
    number: int
    backups: tuple[Backup, ...] = ()
    archive: str = ""  # directory of the WAL
    wal_max: str = ""
    history: tuple[tuple[int, int], ...] = ()  # earlier timelines and the LSN at which each was left
    archived: float = 0.0  # when the newest WAL came
    problem: str = ""
    missing: bool = False  # it can be read, and knows nothing of the cluster yet

    @property
    def usable(self) -> list[Backup]:
        """The backups from which the present timeline can be reached, oldest first.

        After a restore to an earlier time, those that were made between that time and the restore lead into an abandoned future.
        """
        left = dict(self.history)

        def on_path(backup: Backup) -> bool:
            return backup.timeline == self.present or backup.lsn_stop <= left.get(backup.timeline, -1)

        return [backup for backup in self.backups if on_path(backup)]

    @property
    def present(self) -> int:
        """The timeline that the cluster writes now."""
        newest = int(self.wal_max[:8], 16) if self.wal_max else 0
        return max([newest, *(timeline + 1 for timeline, _ in self.history)])

    @property
    def reaches(self) -> int:
        """The LSN that recovery with all WAL gets to, at least: that of the newest segment or, without one yet, of the newest timeline."""
        if self.wal_max and int(self.wal_max[:8], 16) == self.present:
            return segment_start(self.wal_max)
        return self.history[-1][1] if self.history else 0


def lsn(text: str) -> int:
    """An LSN such as 0/30000F8 as a number."""
    high, low = text.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def lsn_text(number: int) -> str:
    """The same number as an LSN."""
    return f"{number >> 32:X}/{number & 0xFFFFFFFF:X}"


def segment_start(wal: str) -> int:
    """The LSN with which a WAL segment begins."""
    return (int(wal[8:16], 16) << 32) + int(wal[16:24], 16) * SEGMENT_BYTES


def parse_history(text: str) -> tuple[tuple[int, int], ...]:
    """The lines of a timeline history file: which timelines were left, and where."""
    rows = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return tuple((int(row[0]), lsn(row[1])) for row in rows)


def parse_info(answer: Sequence[Mapping[str, Any]], cluster: str, repositories: Mapping[str, str]) -> list[Holding]:
    """Read pgBackRest's `info`; repositories: number to name."""
    stanza = next((each for each in answer if each["name"] == cluster), None) or {}
    said = {str(each["key"]): each["status"] for each in stanza.get("repo", [])}
    holdings = []
    for number, name in repositories.items():
        status = said.get(number, {"code": 1, "message": "nothing is known of it"})
        if status["code"] not in (0, 2):
            problem = str(status["message"]).strip().splitlines()[0]
            holdings.append(Holding(name, int(number), problem=problem, missing=status["code"] in (1, 3)))
            continue
        database = {each["id"]: each for each in stanza.get("db", []) if str(each["repo-key"]) == number}
        current = max(database, default=0)
        backups = [
            Backup(
                label=each["label"],
                type=each["type"],
                repository=name,
                started=float(each["timestamp"]["start"]),
                stopped=float(each["timestamp"]["stop"]),
                wal_first=each["archive"]["start"],
                wal_last=each["archive"]["stop"],
                lsn_stop=lsn(each["lsn"]["stop"]),
                size=int(each["info"]["size"]),
                stored=int(each["info"]["repository"].get("delta", 0)),
                failed=bool(each.get("error")),
            )
            for each in stanza.get("backup", [])
            if str(each["database"]["repo-key"]) == number and each["database"]["id"] == current
        ]
        archive: Mapping[str, Any] = next(
            (
                each
                for each in stanza.get("archive", [])
                if str(each["database"]["repo-key"]) == number and each["database"]["id"] == current
            ),
            {},
        )
        holdings.append(
            Holding(
                name,
                int(number),
                tuple(sorted(backups, key=lambda backup: backup.stopped)),
                str(archive.get("id") or ""),
                str(archive.get("max") or ""),
            )
        )
    return holdings


# --- what a restore would begin with -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Where a restore shall end: at a time (UTC, as a timestamp), at a named restore point, or at the newest that there is."""

    kind: str
    text: str = ""
    at: float = 0.0

    def options(self) -> list[str]:
        """pgBackRest's options for it."""
        if self.kind == "latest":
            return ["--type=default"]
        return [f"--type={self.kind}", f"--target={self.text}"]


def shown(moment: float) -> str:
    """A time for people."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S+00")


def time_target(text: str) -> Target:
    """Read a time that a person typed. One without a zone means something else to the next person."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise BackupError(f"'{text}' is no time. Write it like 2026-11-22 03:14:00+00") from None
    if moment.tzinfo is None:
        raise BackupError(f"the time '{text}' has no zone. Write '{text.strip()}+00' if you mean UTC, or your own offset such as +03")
    utc = moment.astimezone(UTC)
    return Target("time", utc.strftime("%Y-%m-%d %H:%M:%S.%f+00"), utc.timestamp())


def restorable(holding: Holding) -> tuple[float, float] | None:
    """From when to when this repository can restore."""
    usable = holding.usable
    return (usable[0].stopped, max(holding.archived, usable[-1].stopped)) if usable else None


def choose(cluster: str, holdings: Sequence[Holding], target: Target) -> tuple[Holding, Backup]:
    """The backup with which a restore begins: the newest before the target, from the first repository that reaches it.

    When a restore point was made, only the WAL knows: the oldest backup reaches it, if anything does.
    """
    ranges = {holding.repository: restorable(holding) for holding in holdings}
    if not any(ranges.values()):
        problems = "; ".join(f"{holding.repository}: {holding.problem or 'no backup'}" for holding in holdings)
        raise BackupError(f"there is no backup of {cluster} to restore from ({problems})")
    for holding in holdings:
        span = ranges[holding.repository]
        if span is None:
            continue
        if target.kind != "time":
            return holding, holding.usable[-1 if target.kind == "latest" else 0]
        before = [backup for backup in holding.usable if backup.stopped <= target.at]
        if before and target.at <= span[1]:
            return holding, before[-1]
    told = "; ".join(
        f"repository {name} " + (f"from {shown(span[0])} to {shown(span[1])}" if span else "not at all") for name, span in ranges.items()
    )
    raise BackupError(f"{cluster} cannot be restored to {shown(target.at)}. Possible is: {told}")


# --- text for people and for the node exporter -------------------------------------------------------------------------


def amount(count: float) -> str:
    """Bytes for people."""
    for size, unit in ((1024**4, "TB"), (1024**3, "GB"), (1024**2, "MB"), (1024, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def span_text(seconds: float) -> str:
    """A duration for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def table(cluster: str, holdings: Sequence[Holding]) -> str:
    """Every backup of a cluster, and from when to when it can be restored."""
    lines = []
    for holding in holdings:
        span = restorable(holding)
        head = f"restorable from {shown(span[0])} to {shown(span[1])}" if span else holding.problem or "no backup yet"
        lines.append(f"{cluster} in repository {holding.repository}: {head}")
        usable = {backup.label for backup in holding.usable}
        for backup in holding.backups:
            note = "" if backup.label in usable else "  (leads to an abandoned timeline)"
            note += "  PAGES WITH WRONG CHECKSUMS" if backup.failed else ""
            lines.append(
                f"  {shown(backup.stopped)}  {backup.type:<4}  {span_text(backup.stopped - backup.started):>7}  {amount(backup.size):>9}"
                f"  {amount(backup.stored):>9} stored  {backup.wal_first} - {backup.wal_last}  {backup.label}{note}"
            )
    return "\n".join(lines)


def prometheus(metrics: Iterable[tuple[str, str, Mapping[str, str], float]]) -> str:
    """Gauges in the text format: (name, help, labels, value); rows of one name belong together."""
    lines: list[str] = []
    named: dict[str, list[str]] = {}
    helps: dict[str, str] = {}
    for name, text, labels, value in metrics:
        helps.setdefault(name, text)
        label = ",".join(f'{key}="{each}"' for key, each in labels.items())
        named.setdefault(name, []).append(f"{name}{{{label}}} {value:.3f}".removesuffix(".000"))
    for name, rows in named.items():
        lines += [f"# HELP {name} {helps[name]}", f"# TYPE {name} gauge", *rows]
    return "\n".join(lines) + "\n"


def backup_metrics(clusters: Mapping[str, Sequence[Holding]]) -> str:
    """What the repositories hold, as metrics. A repository that holds nothing has no series: its absence is the alarm."""
    rows: list[tuple[str, str, Mapping[str, str], float]] = []
    for cluster, holdings in clusters.items():
        for holding in holdings:
            labels = {"cluster": cluster, "repository": holding.repository}
            rows.append(("evenkeel_backup_repository_usable", "1 when the repository can be read.", labels, float(not holding.problem)))
            for kind in TYPES:
                made = [backup for backup in holding.backups if backup.type == kind]
                if made:
                    name = "evenkeel_backup_newest_timestamp_seconds"
                    rows.append((name, "When the newest backup of this type ended.", {**labels, "type": kind}, made[-1].stopped))
            span = restorable(holding)
            if not span:
                continue
            last = holding.backups[-1]
            rows += [
                ("evenkeel_backup_duration_seconds", "How long the newest backup took.", labels, last.stopped - last.started),
                ("evenkeel_backup_database_bytes", "Size of the cluster in the newest backup.", labels, last.size),
                ("evenkeel_backup_stored_bytes", "What the newest backup added to the repository.", labels, last.stored),
                ("evenkeel_backup_restorable_from_timestamp_seconds", "The earliest time that can be restored.", labels, span[0]),
                ("evenkeel_backup_restorable_to_timestamp_seconds", "When the newest WAL came.", labels, span[1]),
            ]
    return prometheus(rows)


def write_metrics(name: str, text: str) -> None:
    """Replace a file of metrics in one step."""
    new = METRICS / f".{name}.new"
    new.write_text(text, encoding="utf-8")
    new.chmod(0o644)
    new.replace(METRICS / name)


# --- pgBackRest ----------------------------------------------------------------------------------------------------------


def last_error(text: str) -> str:
    """What pgBackRest complained about, without times and line breaks."""
    found = re.findall(r"ERROR: (?:\[\d+\]: )?(.*)", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return str(found[-1] if found else (lines or ["it said nothing"])[-1]).rstrip(": ")


def complaints(said: str) -> list[str]:
    """The lines of pgBackRest's `verify` that are not good news."""
    return [line.strip() for line in said.splitlines() if re.search(r"status: (?!ok|valid)|(missing|invalid|other): [1-9]", line)]


def fatal(log: Path) -> str:
    """Why a server ended, from its log: the first that killed it, not those who came too early."""
    said = re.findall(r"(?:FATAL|PANIC):\s+(.*)", log.read_text(errors="replace") if log.exists() else "")
    return next((line for line in said if not line.startswith("the database system is")), "it does not say why")


class Suite:
    """The platform's backups as /etc/evenkeel/backup.json describes them."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.repositories: dict[str, str] = settings["repositories"]  # number to name
        self.clusters: dict[str, dict[str, Any]] = settings["clusters"]
        self.directory = Path(settings["directory"])
        self.binaries = Path(settings["binaries"])
        self.groups: list[str] = settings["groups"]  # who may read the host's key, and write metrics
        self.lost_rows: int = settings["lost_rows"]

    def call(self, command: str, cluster: str, *options: str, path: str = "", config: str = "repository") -> str:
        """Run pgBackRest; return what it printed."""
        argv = ["pgbackrest", f"--config=/etc/pgbackrest/{config}.conf", f"--stanza={cluster}", *options, command]
        argv += [path] if path else []
        done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise BackupError(last_error(done.stderr + done.stdout))
        return done.stdout

    def listing(self, cluster: str, number: int, path: str) -> dict[str, Any]:
        """A directory of a repository: name to type, size and time."""
        said: dict[str, Any] = json.loads(self.call("repo-ls", cluster, f"--repo={number}", "--output=json", path=path))
        return said

    def holdings(self, cluster: str) -> list[Holding]:
        """What the repositories hold of a cluster."""
        answer = json.loads(self.call("info", cluster, "--output=json"))
        return [self.with_archive(cluster, holding) for holding in parse_info(answer, cluster, self.repositories)]

    def with_archive(self, cluster: str, holding: Holding) -> Holding:
        """The same, with what only its archive knows: timelines, and when the newest WAL came."""
        if holding.problem or not holding.wal_max:
            return holding
        place = f"archive/{cluster}/{holding.archive}"
        try:
            histories = sorted(name for name in self.listing(cluster, holding.number, place) if name.endswith(".history"))
            text = self.call("repo-get", cluster, f"--repo={holding.number}", path=f"{place}/{histories[-1]}") if histories else ""
            files = self.listing(cluster, holding.number, f"{place}/{holding.wal_max[:16]}")
        except BackupError as error:
            return Holding(holding.repository, holding.number, problem=str(error))
        archived = max((float(each["time"]) for name, each in files.items() if name.startswith(holding.wal_max)), default=0.0)
        known = {**asdict(holding), "backups": holding.backups, "history": parse_history(text), "archived": archived}
        return Holding(**known)

    # --- what a person or a timer asks for

    def now(self, cluster: str, kind: str) -> None:
        """A backup into every repository; the second is made although the first failed."""
        failures = []
        with self.alone(cluster, "backup"):
            for number, name in self.repositories.items():
                began = time.monotonic()
                try:
                    self.backup(cluster, number, kind)
                except BackupError as error:
                    failures.append(f"into repository {name}: {error}")
                    continue
                made = next(each for each in self.holdings(cluster) if each.repository == name).backups[-1]
                print(
                    f"{cluster}: {made.type} backup {made.label} of {amount(made.size)} in repository {name}, "
                    f"{amount(made.stored)} stored, {span_text(time.monotonic() - began)}",
                    flush=True,
                )
        self.metrics()
        if failures:
            raise BackupError(
                f"no {kind} backup of {cluster} {'; '.join(failures)}. Older backups are as they were; the next run of the timer tries "
                "again. Look: evenkeel-backup list"
            )

    def backup(self, cluster: str, number: str, kind: str) -> None:
        """One backup into one repository, read from the standby where there is one."""
        options = [f"--repo={number}", f"--type={kind}"]
        if len(self.clusters[cluster]["members"]) > 1:
            try:
                self.call("backup", cluster, *options, "--backup-standby")
                return
            except BackupError as error:
                if "standby" not in str(error):
                    raise
                print(f"{cluster}: no standby to read from ({error}): the primary it is", flush=True)
        self.call("backup", cluster, *options)

    @contextlib.contextmanager
    def alone(self, cluster: str, what: str) -> Iterator[None]:
        """Hold the lock of what must not run twice at a time for a cluster; wait for it."""
        with (self.directory / f"{what}-{cluster}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{cluster}: another {what} runs; this one waits for it", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def sweep(self) -> None:
        """Remove what an interrupted rehearsal has left, unless somebody has one, or makes one, of any cluster."""
        copies = [Rehearsal(self, cluster) for cluster in self.clusters]
        with contextlib.ExitStack() as held, contextlib.suppress(BlockingIOError):
            for copy in copies:
                file = held.enter_context((self.directory / f"rehearsal-{copy.cluster}.lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left = [copy for copy in copies if copy.place.exists()]
            for copy in left if not any(each.in_use() for each in left) else []:
                copy.remove()
                print(f"{copy.cluster}: the copy of a rehearsal that has ended is removed", flush=True)

    def metrics(self) -> None:
        """Write what the repositories hold for the node exporter."""
        write_metrics("backup.prom", backup_metrics({cluster: self.holdings(cluster) for cluster in self.clusters}))

    def prepare(self) -> dict[str, Any]:
        """Create what is missing for the clusters in the repositories. One that cannot be read is left alone.

        {changed: whether something was missing, without_backup: names of the clusters that lack a backup in a repository}
        """
        changed, without_backup = False, []
        for cluster in self.clusters:
            holdings = self.holdings(cluster)
            missing = [holding.repository for holding in holdings if holding.missing]
            if missing:
                self.call("stanza-create", cluster)
                print(f"{cluster}: made ready in repository {' and '.join(missing)}")
                changed = True
            if any(holding.missing or not (holding.problem or holding.backups) for holding in holdings):
                without_backup.append(cluster)
        return {"changed": changed, "without_backup": without_backup}

    def verify(self, cluster: str) -> list[str]:
        """What is wrong with the repositories' files, and with the way that WAL takes into them."""
        problems = []
        for number, name in self.repositories.items():
            try:
                said = self.call("verify", cluster, f"--repo={number}", "--output=text", "--verbose")
            except BackupError as error:
                said = f"status: error: {error}"
            bad = complaints(said)
            print(f"{cluster} in repository {name}: {'; '.join(bad) if bad else 'every file is what was written'}", flush=True)
            problems += [f"{cluster} in repository {name}: {line}" for line in bad[:1]]
        try:
            self.call("check", cluster)
            print(f"{cluster}: a segment of WAL went into every repository just now", flush=True)
        except BackupError as error:
            problems.append(f"{cluster}: WAL does not reach the repositories: {error}")
        return problems

    def plan(self, clusters: Sequence[str], target: Target) -> dict[str, Any]:
        """Which backups a restore of these clusters would begin with."""
        chosen: dict[str, Any] = {}
        for cluster in clusters:
            holdings = self.holdings(cluster)
            holding, backup = choose(cluster, holdings, target)
            span = restorable(holding)
            assert span is not None
            chosen[cluster] = {
                "repository": holding.repository,
                "number": holding.number,
                "backup": backup.label,
                "backup_ended": shown(backup.stopped),
                "size": backup.size,
                "timeline": holding.present,
                "reaches": holding.reaches,
                "from": shown(span[0]),
                "to": shown(span[1]),
            }
        return {"target": asdict(target), "clusters": chosen}

    # --- copies beside

    def scratch(self, cluster: str, target: Target) -> None:
        """A copy beside, for a person to read."""
        plan = self.plan([cluster], target)["clusters"][cluster]
        copy = Copy(self, cluster, "scratch")
        with self.alone(cluster, "scratch"):
            copy.remove()
            copy.make(plan["number"], plan["backup"], plan["size"], target)
            reached = copy.ask(LAST_COMMIT)
        print(
            f"A copy of {cluster} at {target.text or 'its newest state'} runs beside: backup {plan['backup']} of repository "
            f"{plan['repository']}, last commit {reached}.\n"
            f"  read:    psql -h {copy.place} -U postgres -l\n"
            f"  remove:  evenkeel-backup scratch {cluster} --drop"
        )

    def rehearsal(self, cluster: str, room: Room) -> dict[str, Any]:
        """A copy of the newest backup with all WAL, for a rehearsal: {certificate, at (when it was ready), backup, backup_ended, reached}.

        One that an interrupted rehearsal left is removed; one in use is left alone.
        """
        plan = self.plan([cluster], Target("latest"))["clusters"][cluster]
        with self.alone(cluster, "rehearsal"):
            copy = Rehearsal(self, cluster, room)
            if copy.in_use():
                raise BackupError(
                    f"another rehearsal has the copy of {cluster} on this host: wait for its end; what was interrupted is given up a "
                    f"minute later, or at once by typing here: evenkeel-backup rehearsal {cluster} --drop"
                )
            copy.remove()
            try:
                copy.make(plan["number"], plan["backup"], plan["size"], Target("latest"))
            except BaseException:
                copy.remove()
                raise
            return {
                "certificate": (copy.place / "copy.crt").read_text(),
                "at": time.time(),
                "backup": plan["backup"],
                "backup_ended": plan["backup_ended"],
                "reached": copy.ask(LAST_COMMIT),
            }

    def drill(self, cluster: str) -> None:
        """Prove that the newest backup restores; the repositories take turns."""
        with self.alone(cluster, "drill"):
            Drill(self, cluster).run()


# --- a restored copy beside ----------------------------------------------------------------------------------------------


class Copy:
    """A cluster restored below the state directory. It listens on a socket only, and never sends WAL anywhere."""

    def __init__(self, suite: Suite, cluster: str, purpose: str) -> None:
        self.suite = suite
        self.cluster = cluster
        self.place = suite.directory / f"{purpose}-{cluster}"
        self.data = self.place / "pgdata"
        self.port = 5432  # in the name of its socket

    def program(self, name: str) -> str:
        """Path of one of PostgreSQL's programs."""
        return str(self.suite.binaries / name)

    def make(self, number: int, label: str, size: int, target: Target) -> None:
        """Restore, recover to the target, and start."""
        free = shutil.disk_usage(self.suite.directory).free
        needed = int(size * 1.1) + SPARE_BYTES
        if free < needed:
            raise BackupError(
                f"a copy of {self.cluster} needs {amount(needed)} below {self.suite.directory}, and {amount(free)} are free. "
                "Nothing was restored"
            )
        self.data.mkdir(parents=True, mode=0o700)
        self.place.chmod(0o700)
        options = [f"--repo={number}", f"--set={label}", f"--pg1-path={self.data}", f"--tablespace-map-all={self.place}/tablespaces"]
        if target.kind != "latest":
            options.append("--target-action=promote")
        self.suite.call("restore", self.cluster, *options, *target.options(), config="scratch")
        self.configure()
        self.start()

    def configure(self) -> None:
        """Settings of its own: nothing of the production server's but what recovery needs."""
        control = subprocess.run([self.program("pg_controldata"), str(self.data)], capture_output=True, text=True, check=True).stdout
        known = dict(re.findall(r"^(.+?):\s+(.+)$", control, re.MULTILINE))
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.place),
            "hba_file": str(self.place / "pg_hba.conf"),
            "ident_file": str(self.place / "pg_ident.conf"),
            "archive_mode": "off",
            "hot_standby": "off",
            "fsync": "off",
            "full_page_writes": "off",
            "autovacuum": "off",
            "shared_buffers": "128MB",
            "track_commit_timestamp": known.get("track_commit_timestamp setting", "off"),
            "timezone": "UTC",
            # a subscription would connect to its publisher
            "max_logical_replication_workers": "0",
            **{name: known[title] for name, title in REPLAY_SETTINGS.items()},
        }
        (self.place / "postgresql.conf").write_text("".join(f"{name} = '{value}'\n" for name, value in settings.items()))
        (self.place / "pg_hba.conf").write_text("local all all trust\n")
        (self.place / "pg_ident.conf").write_text("")
        own = self.data / "postgresql.auto.conf"  # what ALTER SYSTEM has set in production goes before all of the above
        own.write_text("".join(line for line in own.read_text().splitlines(keepends=True) if RECOVERY_SETTING.match(line)))

    def start(self) -> None:
        """Start; ends when recovery has ended, or failed. Until then nobody is let in, so pg_ctl cannot tell."""
        log = self.place / "log"
        argv = [self.program("pg_ctl"), "-D", str(self.data), "-l", str(log), "-W", "-s"]
        argv += ["-o", f"-c config_file={self.place}/postgresql.conf", "start"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise BackupError(f"the restored copy of {self.cluster} does not start: {done.stderr.strip()}")
        status = [self.program("pg_ctl"), "-D", str(self.data), "status"]
        began, runs = time.monotonic(), False
        while time.monotonic() < began + START_SECONDS:
            time.sleep(0.5)
            with contextlib.suppress(BackupError):
                if self.ask("SELECT pg_is_in_recovery()") == "f":
                    return
            ran, runs = runs, subprocess.run(status, capture_output=True, check=False).returncode == 0
            if not runs and (ran or time.monotonic() > began + FORK_SECONDS):
                raise BackupError(f"the restored copy of {self.cluster} does not come up: {fatal(log)}")
        raise BackupError(f"the restored copy of {self.cluster} still recovers after {span_text(START_SECONDS)}")

    def psql(self, database: str) -> list[str]:
        """The command line of a client that prints rows."""
        return [self.program("psql"), "-XAtq", "-F", "\t", "-h", str(self.place), "-p", str(self.port), "-U", "postgres", "-d", database]

    def ask(self, sql: str, database: str = "postgres") -> str:
        """The answer to a query."""
        done = subprocess.run([*self.psql(database), "-c", sql], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackupError(f"the restored copy of {self.cluster} does not answer: {done.stderr.strip().splitlines()[-1]}")
        return done.stdout.rstrip("\n")

    def ended_at(self) -> int:
        """The LSN at which recovery ended: where the timeline that it opened begins."""
        newest = max(self.data.glob("pg_wal/*.history"), key=lambda path: path.name)
        return parse_history(newest.read_text())[-1][1]

    def remove(self) -> None:
        """Stop it if it runs, and remove all of it."""
        if (self.data / "postmaster.pid").exists():
            argv = [self.program("pg_ctl"), "-D", str(self.data), "-m", "immediate", "-s", "-w", "stop"]
            subprocess.run(argv, capture_output=True, check=False)
        if self.place.exists():
            shutil.rmtree(self.place)


@dataclass(frozen=True)
class Room:
    """Who may use a copy that is made for a rehearsal: the application's user, in its database, from one host."""

    database: str
    user: str
    address: str  # of this host, where the copy listens
    port: int
    client: str  # address of the host with the application
    names: tuple[str, ...]  # names and addresses of the cluster's members, as which the copy presents itself


class Rehearsal(Copy):
    """A copy that an application host uses through TLS in place of the cluster. Who holds which lock in it is written down."""

    def __init__(self, suite: Suite, cluster: str, room: Room | None = None) -> None:
        super().__init__(suite, cluster, "rehearsal")
        self.room = room
        self.port = room.port if room else 5432
        self.samples = self.place / "locks"

    def make(self, number: int, label: str, size: int, target: Target) -> None:
        """Restore, recover and start, and watch its locks from then on."""
        super().make(number, label, size, target)
        assert self.room is not None
        (self.place / "room.json").write_text(json.dumps(asdict(self.room)))
        with self.samples.open("w") as file:  # it ends with the server
            argv = self.psql(self.room.database)
            watch = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=file, stderr=file, text=True, start_new_session=True)
        assert watch.stdin is not None
        watch.stdin.write(f"{SAMPLE_LOCKS} \\watch {SAMPLE_SECONDS}\n")
        watch.stdin.close()

    def configure(self) -> None:
        """Settings of its own, and a certificate that only this copy has, with the names of the cluster's members."""
        super().configure()
        room = self.room
        assert room is not None
        names = ",".join(f"IP:{name}" if re.fullmatch(r"[0-9.]+|.*:.*", name) else f"DNS:{name}" for name in room.names)
        argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "8", "-subj"]
        argv += ["/CN=rehearsal", "-addext", f"subjectAltName={names}"]
        argv += ["-keyout", str(self.place / "copy.key"), "-out", str(self.place / "copy.crt")]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise BackupError(f"no certificate for the copy of {self.cluster}: {last_error(done.stderr)}")
        settings = {
            "listen_addresses": room.address,
            "port": room.port,
            "ssl": "on",
            "ssl_cert_file": str(self.place / "copy.crt"),
            "ssl_key_file": str(self.place / "copy.key"),
            "authentication_timeout": "600s",
        }
        with (self.place / "postgresql.conf").open("a") as file:
            file.write("".join(f"{name} = '{value}'\n" for name, value in settings.items()))
        bits = 128 if ":" in room.client else 32
        with (self.place / "pg_hba.conf").open("a") as file:
            file.write(f'hostssl "{room.database}" "{room.user}" {room.client}/{bits} scram-sha-256\n')

    def in_use(self) -> bool:
        """Whether a rehearsal has this copy: it holds a connection all the time, and begins soon after it was made."""
        try:
            room = json.loads((self.place / "room.json").read_text())
            age = time.time() - (self.place / "room.json").stat().st_mtime
        except OSError:
            return False
        return age < YOUNG_SECONDS or is_connected(int(room["port"]))

    def locks(self) -> list[dict[str, Any]]:
        """What `held` returns, and how many rows (`rows`) each table has now."""
        room = Room(**json.loads((self.place / "room.json").read_text()))
        self.port = room.port
        samples = self.samples.read_text(errors="replace")
        silence = longest_silence(samples, (self.place / "room.json").stat().st_mtime, time.time())
        if silence > SILENT_SECONDS:
            raise BackupError(
                f"nobody looked which locks were held in the copy of {self.cluster} for {span_text(silence)}: {last_error(samples)}"
            )
        found = held(samples)
        for each in found:
            with contextlib.suppress(BackupError):  # it may be gone
                each["rows"] = int(self.ask(f"SELECT count(*) FROM {each['table']}", room.database))
        return found


def held(samples: str) -> list[dict[str, Any]]:
    """How long each transaction held the locks of each table that make users wait: [{table, mode, migration, seconds}], longest first.

    samples: rows of SAMPLE_LOCKS. mode: the strongest of them. migration: what the session called itself, empty when it did not say.
    """
    spans: dict[tuple[str, str, str], tuple[float, float, int]] = {}  # first and last sample, and the strength
    for line in samples.splitlines():
        fields = line.split("\t")
        if len(fields) != 5 or fields[2] not in USERS_WAIT:
            continue
        at, transaction, mode, table, session = fields
        migration = session.removeprefix(MIGRATION) if session.startswith(MIGRATION) else ""
        key = (transaction, table, migration)
        first, _last, strength = spans.get(key, (float(at), 0.0, 0))
        spans[key] = (first, float(at), max(strength, USERS_WAIT.index(mode)))
    rows = sorted(spans.items(), key=lambda row: row[1][0] - row[1][1])
    return [
        {"table": table, "mode": USERS_WAIT[strength], "migration": migration, "seconds": round(last - first + SAMPLE_SECONDS, 2)}
        for (_transaction, table, migration), (first, last, strength) in rows
    ]


def longest_silence(samples: str, began: float, now: float) -> float:
    """The most seconds that went by between two samples, from the beginning until now."""
    times = [float(found) for found in re.findall(r"^(\d+\.\d+)\t", samples, re.MULTILINE)]
    return max(after - before for before, after in itertools.pairwise([began, *times, now]))


def is_connected(port: int) -> bool:
    """Whether somebody has a TCP connection to this port of this host."""
    rows: list[list[str]] = []
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            rows += [line.split()[1:4] for line in Path("/proc/net", table).read_text().splitlines()[1:]]
    return any(local.endswith(f":{port:04X}") and state == "01" for local, _remote, state in rows)


def emptied(before: Mapping[str, int], now: Mapping[str, int], least: int) -> list[str]:
    """The tables that had rows at the last drill and have none now."""
    return sorted(name for name, count in before.items() if count >= least and now.get(name) == 0)


class Drill:
    """One restore drill. Its state file remembers the last good one, and which repository was asked last."""

    def __init__(self, suite: Suite, cluster: str) -> None:
        self.suite = suite
        self.cluster = cluster
        self.copy = Copy(suite, cluster, "drill")
        self.file = suite.directory / f"drill-{cluster}.json"
        self.state: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def run(self) -> None:
        """Restore, check, remove, and write down how it went."""
        began = time.time()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped before its end"))
        problem = "it was interrupted"
        holding: Holding | None = None
        try:
            self.copy.remove()
            holding = self.turn()
            self.check(holding, began)
            problem = ""
        except BackupError as error:
            problem = str(error)
        finally:
            self.copy.remove()
            self.state |= {"at": began, "seconds": time.time() - began, "problem": problem}
            self.state |= {"repository": holding.repository} if holding else {}
            self.file.write_text(json.dumps(self.state, indent=1, sort_keys=True))
            write_metrics(f"restore-drill-{self.cluster}.prom", self.metrics())
        if problem:
            where = f" from repository {holding.repository}" if holding else ""
            raise BackupError(
                f"the newest backup of {self.cluster} did not restore{where}: {problem}. The running cluster is not concerned. "
                f"Next: evenkeel-backup verify {self.cluster}; a new backup: systemctl start backup-full@{self.cluster}; "
                f"then again: systemctl start restore-drill@{self.cluster}"
            )

    def turn(self) -> Holding:
        """The repository whose turn it is: after a failure the same again, else the next."""
        holdings = self.suite.holdings(self.cluster)
        names = [holding.repository for holding in holdings]
        last = self.state.get("repository")
        step = 0 if self.state.get("problem") else 1
        return holdings[(names.index(last) + step) % len(names) if last in names else 0]

    def check(self, holding: Holding, began: float) -> None:
        """Restore the newest backup of a repository with all WAL that there is, and look at what came out."""
        if not holding.usable:
            raise BackupError(holding.problem or "there is no backup yet")
        backup = holding.usable[-1]
        print(f"{self.cluster}: backup {backup.label} of {amount(backup.size)} from repository {holding.repository}", flush=True)
        self.copy.make(holding.number, backup.label, backup.size, Target("latest"))
        ended = self.copy.ended_at()
        if ended < holding.reaches:
            end = lsn_text(holding.reaches)
            raise BackupError(f"recovery ended at {lsn_text(ended)}, and the archive goes to {end}: WAL is missing between")
        restored = time.time()
        argv = [self.copy.program("pg_amcheck"), "-h", str(self.copy.place), "-U", "postgres", "--all", "--install-missing"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackupError(f"pg_amcheck found: {' '.join((done.stdout + done.stderr).split())[:300]}")
        rows = self.rows()
        lost = emptied(self.state.get("rows", {}), rows, self.suite.lost_rows)
        if lost:
            counts = ", ".join(f"{name} ({self.state['rows'][name]} rows)" for name in lost)
            self.state["rows"] = rows  # told once: an operator who emptied them on purpose runs it again
            raise BackupError(f"tables that had rows at the last drill are empty: {counts}")
        self.state |= {
            "succeeded": time.time(),
            "rows": rows,
            "backup": backup.label,
            "backup_ended": backup.stopped,
            "reached": max(backup.stopped, holding.archived),
            "restore_seconds": restored - began,
        }
        found = f"{len(rows)} tables with {sum(rows.values())} rows; no damage"
        print(f"{self.cluster}: restored in {span_text(restored - began)}; {found}", flush=True)

    def rows(self) -> dict[str, int]:
        """How many rows each table of each database has."""
        counts: dict[str, int] = {}
        for database in self.copy.ask("SELECT datname FROM pg_database WHERE datallowconn AND NOT datistemplate ORDER BY 1").splitlines():
            for line in self.copy.ask(COUNT_ROWS, database).splitlines():
                name, count = line.split("\t")
                counts[f"{database}.{name}"] = int(count)
        return counts

    def metrics(self) -> str:
        """How the last drills went, as metrics."""
        state, labels = self.state, {"cluster": self.cluster}
        rows: list[tuple[str, str, Mapping[str, str], float]] = [
            ("evenkeel_restore_drill_success", "1 when the last restore drill succeeded.", labels, float(not state["problem"])),
            ("evenkeel_restore_drill_last_run_timestamp_seconds", "When the last drill began.", labels, state["at"]),
            ("evenkeel_restore_drill_duration_seconds", "How long the last drill took in all.", labels, state["seconds"]),
        ]
        if "succeeded" in state:
            rows += [
                ("evenkeel_restore_drill_last_success_timestamp_seconds", "When a drill last succeeded.", labels, state["succeeded"]),
                ("evenkeel_restore_drill_restore_seconds", "How long restore and recovery took in it.", labels, state["restore_seconds"]),
                ("evenkeel_restore_drill_backup_timestamp_seconds", "When its backup was made.", labels, state["backup_ended"]),
                ("evenkeel_restore_drill_reached_timestamp_seconds", "How new the restored data was.", labels, state["reached"]),
                ("evenkeel_restore_drill_rows", "Rows in all tables.", labels, float(sum(state["rows"].values()))),
            ]
        return prometheus(rows)


# --- the command line ------------------------------------------------------------------------------------------------------


def become(user: str, groups: Sequence[str]) -> None:
    """Work as the repository's user, with the groups that its units have, when root called."""
    if os.geteuid() != 0:
        return
    entry = pwd.getpwnam(user)
    os.setgroups([grp.getgrnam(name).gr_gid for name in groups])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.chdir("/")
    os.environ["HOME"] = entry.pw_dir


def through_unit(unit: str) -> int:
    """Have systemd run it, as the timer does: in its walls, with its bounds, and with its failure told. Show what it said."""
    done = subprocess.run(["systemctl", "start", unit], capture_output=True, text=True, check=False)
    run = subprocess.run(["systemctl", "show", "--property=InvocationID", "--value", unit], capture_output=True, text=True, check=False)
    journal = ["journalctl", "--no-pager", "--quiet", "--output=cat", f"_SYSTEMD_INVOCATION_ID={run.stdout.strip()}"]
    print(subprocess.run(journal, capture_output=True, text=True, check=False).stdout, end="", flush=True)
    return done.returncode


def arguments(clusters: Sequence[str]) -> argparse.ArgumentParser:
    """What may be typed."""
    parser = argparse.ArgumentParser(prog="evenkeel-backup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    now = commands.add_parser("now", help="a backup into every repository")
    now.add_argument("cluster", choices=clusters)
    now.add_argument("--type", choices=TYPES, default="incr")
    for name in ("list", "verify"):
        command = commands.add_parser(name)
        command.add_argument("cluster", nargs="?", choices=clusters)
        if name == "list":
            command.add_argument("--json", action="store_true")
    for name in ("plan", "scratch"):
        command = commands.add_parser(name)
        command.add_argument("cluster", choices=clusters, nargs="+" if name == "plan" else None)
        target = command.add_mutually_exclusive_group(required=True)
        target.add_argument("--time", metavar="TIME", help="such as '2026-11-22 03:14:00+00'")
        target.add_argument("--name", metavar="POINT", help="a named restore point")
        target.add_argument("--latest", action="store_true", help="all that there is")
        if name == "scratch":
            target.add_argument("--drop", action="store_true", help="remove the copy")
    rehearsal = commands.add_parser("rehearsal", help="a copy for the rehearsal of migrations; playbooks/rehearse.yml makes it")
    rehearsal.add_argument("cluster", choices=clusters)
    deed = rehearsal.add_mutually_exclusive_group()
    deed.add_argument("--locks", action="store_true", help="which locks were held in it for how long")
    deed.add_argument("--drop", action="store_true", help="remove the copy")
    commands.add_parser("drill").add_argument("cluster", choices=clusters)
    commands.add_parser("prepare")
    commands.add_parser("metrics")
    return parser


def target_of(options: argparse.Namespace) -> Target:
    """The target that was typed."""
    if options.time:
        return time_target(options.time)
    return Target("name", options.name) if options.name else Target("latest")


def work(suite: Suite, options: argparse.Namespace) -> None:
    """Do what was asked for."""
    clusters = [options.cluster] if getattr(options, "cluster", None) else list(suite.clusters)
    match options.command:
        case "now":
            suite.now(options.cluster, options.type)
        case "list":
            holdings = {cluster: suite.holdings(cluster) for cluster in clusters}
            if options.json:
                print(json.dumps({cluster: [asdict(each) for each in found] for cluster, found in holdings.items()}))
            else:
                print("\n".join(table(cluster, found) for cluster, found in holdings.items()))
        case "verify":
            problems = [problem for cluster in clusters for problem in suite.verify(cluster)]
            if problems:
                raise BackupError(f"{'; '.join(problems)}. Make a new one: evenkeel-backup now CLUSTER --type full")
        case "plan":
            print(json.dumps(suite.plan(options.cluster, target_of(options))))
        case "scratch" if options.drop:
            Copy(suite, options.cluster, "scratch").remove()
            print(f"The copy of {options.cluster} is removed.")
        case "scratch":
            suite.scratch(options.cluster, target_of(options))
        case "rehearsal" if options.drop:
            Rehearsal(suite, options.cluster).remove()
            print(f"The copy of {options.cluster} is removed.")
        case "rehearsal" if options.locks:
            print(json.dumps(Rehearsal(suite, options.cluster).locks()))
        case "rehearsal":
            room = json.load(sys.stdin)
            print(json.dumps(suite.rehearsal(options.cluster, Room(**{**room, "names": tuple(room["names"])}))))
        case "drill":
            suite.drill(options.cluster)
        case "prepare":
            print(json.dumps(suite.prepare()))
        case "metrics":
            suite.sweep()
            suite.metrics()


def main() -> NoReturn:
    """Run the program."""
    suite = Suite(json.loads(SETTINGS.read_text(encoding="utf-8")))
    options = arguments(list(suite.clusters)).parse_args()
    if os.geteuid() == 0 and options.command in ("now", "drill"):
        name = f"backup-{options.type}" if options.command == "now" else "restore-drill"
        sys.exit(through_unit(f"{name}@{options.cluster}.service"))
    become("pgbackrest", suite.groups)
    try:
        work(suite, options)
    except BackupError as error:
        sys.exit(f"Backup: {error}.".replace("..", "."))
    sys.exit(0)


if __name__ == "__main__":
    main()

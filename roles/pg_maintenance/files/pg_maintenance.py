#!/usr/bin/python3 -I
"""Online maintenance of a PostgreSQL cluster, on its primary: VACUUM (ANALYZE) and REINDEX CONCURRENTLY, table by table.

    pg_maintenance.py vacuum|reindex|bloat CLUSTER[:DATABASE[:SCHEMA.TABLE]] [--dry-run]

Nobody is kept from reading or writing. A standby leaves the work to the primary. One run at a time in a cluster; what cannot be had
(a lock, the time) is tried again, then named, and the run fails at its end, with the rest done.
"""

from __future__ import annotations

import argparse
import contextlib
import grp
import importlib
import json
import os
import pwd
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

SETTINGS = Path("/etc/evenkeel")
METRICS = Path("/var/lib/evenkeel/metrics")
SOCKETS = "/var/run/postgresql"
SYSTEM_DATABASE = "postgres"  # where runs agree on whose turn it is
TURN = (1163283277, 1)  # the advisory lock of a run, in every database that it works in

PROGRESS_SECONDS = 10.0
POLL_SECONDS = 0.2
WORTH_A_LINE_SECONDS = 5.0  # a relation that took longer gets a line of its own
SHOWN = 10  # relations of a report

DONE, FAILED, USAGE = 0, 1, 2

LOCK_TIMEOUT, DEADLOCK = "55P03", "40P01"
CANCELLED = "57014"
GONE = ("42P01", "42704", "3F000")  # table, index, schema: dropped meanwhile
NOT_PRIMARY = "25006"

NO_VACUUM_FULL = (
    "VACUUM FULL is refused. It locks every table against reads and writes for as long as it is rewritten, and needs its size on the disk "
    "once more. Instead: `vacuum` makes the room of dead rows usable again, `reindex` rebuilds indexes while they are used, and those are "
    "most of what can be given back. A table that must get smaller is copied to a new one, by a migration of the application."
)

DATABASES = "SELECT datname FROM pg_database WHERE datallowconn AND NOT datistemplate ORDER BY datname"
# In recovery: whom it follows. A standby that follows nobody may become the primary in a moment.
ROLE = """SELECT pg_is_in_recovery(), (SELECT coalesce(sender_host, 'the primary') FROM pg_stat_wal_receiver WHERE status = 'streaming')"""
OTHER_RUN = """SELECT application_name, to_char(backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') || ' UTC', pid
FROM pg_stat_activity WHERE pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND (classid, objid) = (%s, %s)
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"""

# Oldest first: if the time does not suffice, what was nearest to a wraparound is done. A partition is done with its table, a catalog
# that all databases share in one of them.
TABLES = """SELECT format('%%I.%%I', n.nspname, c.relname), pg_table_size(c.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'm', 'p') AND c.relpersistence <> 't' AND n.nspname <> 'pg_toast'
  AND (%(table)s = '' AND NOT c.relispartition OR %(table)s IN (n.nspname || '.' || c.relname, format('%%I.%%I', n.nspname, c.relname)))
  AND (NOT c.relisshared OR current_database() = 'postgres')
ORDER BY c.relkind = 'p' DESC, age(c.relfrozenxid) DESC, 1"""

# Smallest first: most are done before a large one uses up the time. An index of a TOAST table belongs to the table whose values it holds.
INDEXES = """SELECT format('%%I.%%I', n.nspname, c.relname), pg_relation_size(c.oid), i.indisvalid, i.indisexclusion,
  c.relname ~ '_cc(new|old)[0-9]*$' AS temporary
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_class t ON t.oid = i.indrelid LEFT JOIN pg_class o ON o.reltoastrelid = t.oid
  JOIN pg_class owner ON owner.oid = coalesce(o.oid, t.oid) JOIN pg_namespace s ON s.oid = owner.relnamespace
WHERE c.relkind = 'i' AND c.relpersistence <> 't' AND owner.oid >= 16384
  AND %(table)s IN ('', s.nspname || '.' || owner.relname, format('%%I.%%I', s.nspname, owner.relname))
ORDER BY 2, 1"""

# Bloat is estimated from the planner's statistics: the pages that the rows would need, as they are on average, against the pages there are.
BLOAT = """WITH column_width AS (
  SELECT a.attrelid, a.attnum, (1 - s.null_frac) * s.avg_width AS width, s.null_frac > 0 AS has_nulls
  FROM pg_stats s JOIN pg_namespace n ON n.nspname = s.schemaname JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = s.tablename
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = s.attname WHERE NOT s.inherited
), packed AS (
  SELECT c.oid, c.relname, c.relnamespace, c.reltuples, pg_relation_size(c.oid) AS size, 'table' AS kind,
    (SELECT 28 + 8 * ceil(sum(width) / 8) + CASE WHEN bool_or(has_nulls) THEN 8 ELSE 0 END
      FROM column_width WHERE attrelid = c.oid) AS width,
    8168 * coalesce((SELECT option_value::int FROM pg_options_to_table(c.reloptions) WHERE option_name = 'fillfactor'), 100) / 100.0 AS room
  FROM pg_class c WHERE c.relkind IN ('r', 'm')
  UNION ALL
  SELECT c.oid, c.relname, c.relnamespace, c.reltuples, pg_relation_size(c.oid), 'index',
    (SELECT 12 + 8 * ceil(sum(width) / 8) FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, place)
      JOIN column_width w ON (w.attrelid, w.attnum) = (i.indrelid, k.attnum) OR (w.attrelid, w.attnum) = (c.oid, k.place)),
    8152 * coalesce((SELECT option_value::int FROM pg_options_to_table(c.reloptions) WHERE option_name = 'fillfactor'), 90) / 100.0
  FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid JOIN pg_am m ON m.oid = c.relam WHERE c.relkind = 'i' AND m.amname = 'btree'
)
SELECT format('%%I.%%I', n.nspname, p.relname), p.kind, p.size,
  CASE WHEN p.reltuples >= 0 THEN greatest(0, p.size - 8192 * (ceil(p.reltuples * p.width / p.room) + 1))::bigint END
FROM packed p JOIN pg_namespace n ON n.oid = p.relnamespace
WHERE p.oid >= 16384 AND n.nspname <> 'pg_toast' AND p.size > 65536
  AND (%(table)s = '' OR p.oid IN (
    SELECT t.oid FROM pg_class t JOIN pg_namespace m ON m.oid = t.relnamespace
      WHERE %(table)s IN (m.nspname || '.' || t.relname, format('%%I.%%I', m.nspname, t.relname))
    UNION SELECT x.indexrelid FROM pg_index x JOIN pg_class t ON t.oid = x.indrelid JOIN pg_namespace m ON m.oid = t.relnamespace
      WHERE %(table)s IN (m.nspname || '.' || t.relname, format('%%I.%%I', m.nspname, t.relname))))
ORDER BY 4 DESC NULLS LAST, 3 DESC"""

PROGRESS = {
    "vacuum": """SELECT phase, coalesce(100 * heap_blks_scanned / nullif(heap_blks_total, 0), 0), NULL
  FROM pg_stat_progress_vacuum WHERE pid = %s
UNION ALL SELECT phase, coalesce(100 * sample_blks_scanned / nullif(sample_blks_total, 0), 0), NULL
  FROM pg_stat_progress_analyze WHERE pid = %s""",
    "reindex": """SELECT p.phase,
  coalesce(100 * p.blocks_done / nullif(p.blocks_total, 0), 100 * p.tuples_done / nullif(p.tuples_total, 0), 0),
  CASE WHEN p.current_locker_pid > 0
    THEN format('process %%s (%%s)', l.pid, coalesce(nullif(l.application_name, ''), l.usename, l.backend_type)) END
FROM pg_stat_progress_create_index p LEFT JOIN pg_stat_activity l ON l.pid = p.current_locker_pid WHERE p.pid IN (%s, %s)""",
}

VERBS = {"vacuum": ("vacuumed and analyzed", "table"), "reindex": ("rebuilt", "index")}


class MaintenanceError(Exception):
    """The run cannot begin or go on; the message says why and what to do."""

    code = FAILED


class UsageError(MaintenanceError):
    """What was asked for is not possible."""

    code = USAGE


class Lost(MaintenanceError):
    """The connection is gone: the primary has stopped, or another one leads."""


class Stopped(MaintenanceError):
    """Somebody stops this run."""


@dataclass(frozen=True)
class Settings:
    """What the role writes for a cluster."""

    port: int
    ready_tries: int = 30
    ready_pause_seconds: float = 5
    lock_timeout_seconds: float = 10
    lock_tries: int = 5
    limit_seconds: float = 14400


@dataclass(frozen=True)
class Target:
    """What is asked for: a cluster, one of its databases, one table."""

    cluster: str
    database: str = ""
    table: str = ""

    @property
    def whole(self) -> bool:
        """Whether it is all of the cluster: only then its success is the cluster's."""
        return not (self.database or self.table)


@dataclass(frozen=True)
class Bloat:
    """An estimate: how large a relation is, and how much of it could be given back."""

    relation: str
    kind: str
    size: int
    wasted: int | None


@dataclass
class Tally:
    """What became of the relations."""

    done: int = 0
    failed: list[str] = field(default_factory=list)


def parse_target(text: str) -> Target:
    """CLUSTER[:DATABASE[:SCHEMA.TABLE]]; the database may be empty."""
    cluster, _, rest = text.partition(":")
    database, _, table = rest.partition(":")
    if table and "." not in table:
        raise UsageError(f'"{table}" has no schema: name a table as schema.table, for example public.{table}')
    return Target(cluster, database, table)


def read_settings(cluster: str, path: Path | None) -> Settings:
    """The settings of a cluster that this host is a member of."""
    path = path or SETTINGS / f"pg-maintenance-{cluster}.json"
    try:
        return Settings(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        known = sorted(found.stem.removeprefix("pg-maintenance-") for found in SETTINGS.glob("pg-maintenance-*.json"))
        raise UsageError(f'this host is no member of a cluster "{cluster}"; it is of: {", ".join(known) or "none"}') from None


def size_text(count: float) -> str:
    """A number of bytes for people."""
    for size, unit in ((1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def counted(number: int, noun: str) -> str:
    """A number with its noun."""
    plural = {"index": "indexes"}.get(noun, f"{noun}s")
    return f"{number} {noun if number == 1 else plural}"


def bloat_lines(before: Sequence[Bloat], after: Sequence[Bloat] | None = None) -> list[str]:
    """A table of the relations that waste most, or of what a run has given back."""
    later = {entry.relation: entry for entry in after or ()}
    shown = [entry for entry in before if after is None or entry.relation in later][:SHOWN]
    if not shown:
        return ["no table or index of more than 64 kB"]

    def wasted(entry: Bloat) -> str:
        return "unknown" if entry.wasted is None else f"{size_text(entry.wasted)} ({100 * entry.wasted // max(entry.size, 1)} %)"

    width = max(len(entry.relation) for entry in shown)
    lines = []
    for entry in shown:
        line = f"{entry.relation:<{width}}  {entry.kind}  {size_text(entry.size):>9}  bloat {wasted(entry)}"
        if after is not None:
            now = later[entry.relation]
            line += f"  ->  {size_text(now.size):>9}  bloat {wasted(now)}"
        lines.append(line)
    return lines


# --- metrics ----------------------------------------------------------------------------------------------------------

HELP = {
    "last_run_timestamp_seconds": "When the last run over the whole cluster ended. A failure is a run later than the last success.",
    "last_success_timestamp_seconds": "When the last run over the whole cluster ended with everything done.",
    "last_duration_seconds": "How long the last run took.",
    "relations_done": "Tables or indexes that the last run has done.",
    "relations_failed": "Tables or indexes that the last run could not do.",
}


def read_metrics(path: Path) -> dict[tuple[str, str], float]:
    """(name, action) -> value, of a file that this program wrote; empty when there is none."""
    found: dict[tuple[str, str], float] = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                name, _, rest = line.removeprefix("evenkeel_maintenance_").partition("{")
                found[name, rest.split('action="')[1].split('"')[0]] = float(rest.rpartition(" ")[2])
    return found


def metrics_text(values: Mapping[tuple[str, str], float], cluster: str) -> str:
    """The same in the format of a node exporter's textfile collector."""
    lines = []
    for name, told in HELP.items():
        lines += [f"# HELP evenkeel_maintenance_{name} {told}", f"# TYPE evenkeel_maintenance_{name} gauge"]
        for (other, action), value in sorted(values.items()):
            if other == name:
                lines.append(f'evenkeel_maintenance_{name}{{cluster="{cluster}",action="{action}"}} {value:.3f}')
    return "\n".join(lines) + "\n"


def write_metrics(cluster: str, action: str, began: float, now: float, tally: Tally) -> None:
    """Replace the cluster's file; the series of the other action stay."""
    path = METRICS / f"maintenance-{cluster}.prom"
    values = read_metrics(path)
    values["last_run_timestamp_seconds", action] = now
    values["last_duration_seconds", action] = now - began
    values["relations_done", action] = tally.done
    values["relations_failed", action] = len(tally.failed)
    if not tally.failed:
        values["last_success_timestamp_seconds", action] = now
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(metrics_text(values, cluster), encoding="utf-8")
    temporary.chmod(0o644)
    temporary.replace(path)


def drop_metrics(cluster: str) -> None:
    """A standby has nothing to tell: what it did when it led is told by its successor."""
    (METRICS / f"maintenance-{cluster}.prom").unlink(missing_ok=True)


# --- the database -----------------------------------------------------------------------------------------------------


class Session:
    """One connection. `driver` is psycopg2, or what behaves like it."""

    def __init__(self, driver: Any, settings: Settings, database: str, name: str) -> None:
        self.driver = driver
        self.connection = driver.connect(
            host=SOCKETS, port=settings.port, user="postgres", dbname=database, application_name=name, connect_timeout=10
        )
        self.connection.autocommit = True

    def ask(self, statement: str, values: object = None) -> list[Any]:
        """Run a statement and return its rows; Lost when the connection breaks, the driver's error for all else."""
        try:
            with self.connection.cursor() as cursor:
                cursor.execute(statement, values)
                return list(cursor.fetchall()) if cursor.description else []
        except self.driver.Error as error:
            if self.connection.closed or code_of(error) == NOT_PRIMARY:
                raise Lost(one_line(error)) from None
            raise

    def cancel(self) -> None:
        """End the statement in hand; from another thread."""
        with contextlib.suppress(self.driver.Error):
            self.connection.cancel()

    def close(self) -> None:
        """Close the connection, which frees its locks."""
        with contextlib.suppress(self.driver.Error):
            self.connection.close()


def code_of(error: BaseException) -> str:
    """SQLSTATE of a driver's error."""
    return str(getattr(error, "pgcode", None) or getattr(error, "sqlstate", None) or "")


def one_line(error: BaseException) -> str:
    """The first line of what the server said."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


class Run:
    """One run of an action over a target."""

    def __init__(self, driver: Any, action: str, target: Target, settings: Settings, say: Callable[[str], None]) -> None:
        self.driver, self.action, self.target, self.settings, self.say = driver, action, target, settings, say
        self.name = f"pg_maintenance {action} {target.cluster}"
        self.again = f"playbooks/maintenance.yml -e action={action} -e cluster={target.cluster}"
        self.tally = Tally()
        self.deadline = time.monotonic() + settings.limit_seconds
        self.out_of_time = f"the run's limit of {settings.limit_seconds:g} s was reached"
        self.stopped = threading.Event()

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        """Somebody stops this unit: the statement in hand is ended, and what it leaves behind removed."""
        self.stopped.set()

    # --- before the work

    @contextlib.contextmanager
    def connected(self, database: str) -> Iterator[Session]:
        """A session in a database."""
        try:
            session = Session(self.driver, self.settings, database, self.name)
        except self.driver.Error as error:
            raise Lost(one_line(error)) from None
        try:
            yield session
        finally:
            session.close()

    def wait_until_ready(self) -> str:
        """Wait for the database. Empty on the primary, else whom this standby follows (D4)."""
        why = ""
        for number in range(1, self.settings.ready_tries + 1):
            if number > 1:
                self.pause(self.settings.ready_pause_seconds)
            try:
                with self.connected(SYSTEM_DATABASE) as session:
                    standby, follows = session.ask(ROLE)[0]
                if not standby or follows:
                    return str(follows) if standby else ""
                why = "it is a standby that follows no primary"
            except Lost as error:
                why = str(error)
            self.say(f"try {number} of {self.settings.ready_tries}: cluster {self.target.cluster} is not ready: {why}")
        raise MaintenanceError(
            f"cluster {self.target.cluster} was not ready within {self.settings.ready_tries} tries, "
            f"{self.settings.ready_pause_seconds:g} s apart, so nothing was done ({why}). "
            f"Next: patronictl list {self.target.cluster}; when it has a primary: {self.again}"
        )

    def pause(self, seconds: float) -> None:
        """Wait; a stop ends it."""
        if self.stopped.wait(seconds):
            raise Stopped("it was stopped")

    def take_turn(self, session: Session) -> None:
        """Wait until no other run is at work in this database, or what a killed one has left running; the turn goes with the session."""
        told = -60.0
        while not session.ask("SELECT pg_try_advisory_lock(%s, %s)", TURN)[0][0]:
            if time.monotonic() - told >= 60:
                told = time.monotonic()
                others = session.ask(OTHER_RUN, TURN) or [("another run", "now", "?")]
                self.say(f"waits for {others[0][0]} (process {others[0][2]}, since {others[0][1]}): one run at a time in a cluster")
            if self.left() <= 0:
                raise MaintenanceError(f"its turn did not come within {self.settings.limit_seconds:g} s, so nothing was done")
            self.pause(min(POLL_SECONDS * 5, max(self.left(), 0.01)))

    def left(self) -> float:
        """Seconds until the run must end."""
        return self.deadline - time.monotonic()

    def expect_some(self, number: int) -> None:
        """A table that was asked for by name must have been there."""
        if self.target.table and not number:
            place = (
                f"database {self.target.database} of cluster {self.target.cluster}"
                if self.target.database
                else f"cluster {self.target.cluster}"
            )
            raise UsageError(f"{place} has no {'index of a ' if self.action == 'reindex' else ''}table {self.target.table}")

    def databases(self, control: Session) -> list[str]:
        """The databases to work in."""
        known = [str(row[0]) for row in control.ask(DATABASES)]
        if self.target.database and self.target.database not in known:
            raise UsageError(f'cluster {self.target.cluster} has no database "{self.target.database}"; it has: {", ".join(known)}')
        return [self.target.database] if self.target.database else known

    # --- the work

    def maintain(self) -> int:
        """The whole run; the exit code."""
        began = time.time()
        try:
            follows = self.wait_until_ready()
            if follows:
                drop_metrics(self.target.cluster)
                self.say(f"cluster {self.target.cluster}: this member is a standby of {follows}; its primary does the work, not this one")
                return DONE
            with self.connected(SYSTEM_DATABASE) as control:
                self.take_turn(control)
                for database in self.databases(control):
                    with self.connected(database) as session:
                        self.work_in(control, session, database)
                self.expect_some(self.tally.done + len(self.tally.failed))
        except UsageError:
            raise
        except MaintenanceError as error:
            self.tally.failed.append(str(error))
            self.record(began)
            raise self.broken_off(error) from None
        self.record(began)
        return self.judge(time.time() - began)

    def record(self, began: float) -> None:
        """Keep how it went as metrics, unless it was about a part of the cluster only."""
        if self.target.whole:
            write_metrics(self.target.cluster, self.action, began, time.time(), self.tally)

    def broken_off(self, error: MaintenanceError) -> MaintenanceError:
        """What a run says that could not go on."""
        if not isinstance(error, Lost | Stopped):
            return error
        done = f"{counted(self.tally.done, VERBS[self.action][1])} {VERBS[self.action][0]} until then"
        if isinstance(error, Stopped):
            return Stopped(f"{error}: {done}. Next, when it suits: {self.again}")
        return Lost(
            f"cluster {self.target.cluster} has lost its primary on this host, or the connection to it, in the middle of the run "
            f"({error}): {done}. Next: patronictl list {self.target.cluster}; when it has a primary: {self.again}"
        )

    def judge(self, seconds: float) -> int:
        """Say how the run ended."""
        what = f"{counted(self.tally.done, VERBS[self.action][1])} {VERBS[self.action][0]} in {seconds:.0f} s"
        if not self.tally.failed:
            self.say(f"cluster {self.target.cluster}: {what}, nothing left undone")
            return DONE
        for reason in self.tally.failed:
            self.say(f"not done: {reason}")
        raise MaintenanceError(
            f"cluster {self.target.cluster}: {what}, but {len(self.tally.failed)} could not be done (named above). Next, when the cause is "
            f"gone: {self.again}"
        )

    def work_in(self, control: Session, session: Session, database: str) -> None:
        """Do one database."""
        self.prepare(session)
        if database != SYSTEM_DATABASE:  # there `control` has it
            self.take_turn(session)
        self.drop_leftovers(control, session, database)
        todo = self.todo(session, database)
        if not todo:
            return
        before = self.bloat(session)
        began, done = time.monotonic(), self.tally.done
        for number, (relation, size) in enumerate(todo, 1):
            if self.left() <= 0:
                self.tally.failed += [f"{database}: {name}: {self.out_of_time}" for name, _ in todo[number - 1 :]]
                break
            self.do(control, session, f"{database}: {relation} ({number} of {len(todo)})", relation, size)
        verb, noun = VERBS[self.action]
        self.say(f"{database}: {counted(self.tally.done - done, noun)} {verb} in {time.monotonic() - began:.0f} s")
        if before:
            for line in bloat_lines(before, self.bloat(session)):
                self.say(f"{database}:   {line}")

    def prepare(self, session: Session) -> None:
        """How this session behaves towards others."""
        for name, value in (
            ("lock_timeout", f"{self.settings.lock_timeout_seconds:g}s"),
            ("client_connection_check_interval", "5s"),  # when this program is killed, its statement ends, too
            ("vacuum_cost_delay", "2ms"),  # as gentle as autovacuum: users come first
            ("idle_session_timeout", "0"),
            ("idle_in_transaction_session_timeout", "0"),
        ):
            session.ask(f"SET {name} = '{value}'")

    def todo(self, session: Session, database: str) -> list[tuple[str, int]]:
        """(relation, size) in the order in which they are done."""
        table = {"table": self.target.table}
        if self.action == "vacuum":
            return [(str(name), int(size)) for name, size in session.ask(TABLES, table)]
        todo = []
        for name, size, valid, exclusion, temporary in session.ask(INDEXES, table):
            if not valid and temporary:
                continue  # told of by `drop_leftovers`
            if not valid:
                self.say(f"{database}: {name} is invalid and was left alone: see what broke it off, then drop or rebuild it by hand")
            elif exclusion:
                self.say(f"{database}: {name} was left out: an exclusion constraint's index cannot be rebuilt while it is used")
            else:
                todo.append((str(name), int(size)))
        return todo

    def bloat(self, session: Session) -> list[Bloat]:
        """The estimates for this target."""
        rows = session.ask(BLOAT, {"table": self.target.table})
        return [Bloat(str(name), str(kind), int(size), wasted) for name, kind, size, wasted in rows]

    def leftovers(self, session: Session) -> list[str]:
        """Invalid indexes under the names that a REINDEX CONCURRENTLY uses while it works."""
        return [str(name) for name, _, valid, _, temporary in session.ask(INDEXES, {"table": self.target.table}) if temporary and not valid]

    def drop_leftovers(self, control: Session, session: Session, database: str) -> None:
        """Remove what an interrupted REINDEX CONCURRENTLY has left behind: every write keeps it up to date for nothing (D4)."""
        for name in self.leftovers(session):
            try:
                self.execute(control, session, f"{database}: {name}", f"DROP INDEX CONCURRENTLY {name}")
                self.say(f"{database}: dropped {name}, which an interrupted REINDEX CONCURRENTLY had left behind")
            except self.driver.Error as error:
                if code_of(error) not in GONE:
                    self.tally.failed.append(f"{database}: {name}, left behind by a REINDEX CONCURRENTLY: {one_line(error)}")

    def do(self, control: Session, session: Session, label: str, relation: str, size: int) -> None:
        """One table or index, with all its tries."""
        statement = f"VACUUM (ANALYZE) {relation}" if self.action == "vacuum" else f"REINDEX INDEX CONCURRENTLY {relation}"
        began = time.monotonic()
        for number in range(1, self.settings.lock_tries + 1):
            try:
                self.execute(control, session, label, statement)
            except Stopped:
                self.clean(control, session, label)
                raise
            except self.driver.Error as error:
                if code_of(error) in GONE:
                    return
                why = one_line(error)
                if self.left() <= 0:
                    why = self.out_of_time
                self.clean(control, session, label)
                if code_of(error) not in (LOCK_TIMEOUT, DEADLOCK) or number == self.settings.lock_tries or self.left() <= 0:
                    self.tally.failed.append(f"{label}: {why}" + (f", {number} times" if number > 1 else ""))
                    return
                pause = min(self.settings.lock_timeout_seconds * 2 ** (number - 1), max(self.left(), 0))
                self.say(f"{label}: {why}; tries again in {pause:g} s")
                self.pause(pause)
                continue
            self.tally.done += 1
            if time.monotonic() - began >= WORTH_A_LINE_SECONDS:
                self.say(f"{label}: {VERBS[self.action][0]} in {time.monotonic() - began:.0f} s ({size_text(size)} before)")
            return

    def clean(self, control: Session, session: Session, label: str) -> None:
        """A REINDEX CONCURRENTLY that failed has left an index behind. What cannot be dropped now, the next run drops."""
        if self.action != "reindex":
            return
        session.ask("SET statement_timeout = 0")
        for name in self.leftovers(session):
            try:
                self.execute(control, session, label, f"DROP INDEX CONCURRENTLY {name}", last=True)
            except self.driver.Error as error:
                self.say(f"{label}: {name} is left behind for now ({one_line(error)}); the next run drops it")

    def execute(self, control: Session, session: Session, label: str, statement: str, *, last: bool = False) -> None:
        """Run a statement and tell every few seconds how far it is. `last`: also when the run has been stopped or its time is over."""
        seconds = max(self.left(), 30 if last else 1)
        session.ask(f"SET statement_timeout = '{int(seconds * 1000)}ms'")
        pid = session.ask("SELECT pg_backend_pid()")[0][0]
        outcome: list[BaseException] = []

        def work() -> None:
            try:
                session.ask(statement)
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            self.watch(control, thread, pid, label, last=last)
        except MaintenanceError:
            session.cancel()
            thread.join(30)
            raise
        if outcome:
            raise outcome[0]

    def watch(self, control: Session, thread: threading.Thread, pid: int, label: str, *, last: bool) -> None:
        """Tell how far it is, until it has ended."""
        began = told = time.monotonic()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            if self.stopped.is_set() and not last:
                raise Stopped(f"it was stopped at {label}")
            if time.monotonic() - told >= PROGRESS_SECONDS:
                told = time.monotonic()
                self.say(f"{label}: {self.progress(control, pid)}, {told - began:.0f} s")

    def progress(self, control: Session, pid: int) -> str:
        """How far the statement of that process is."""
        rows = control.ask(PROGRESS[self.action], (pid, pid))
        if not rows:
            return "waits for a lock"
        phase, percent, locker = rows[0]
        return f"{phase}, waits for {locker}" if locker else f"{phase} {int(percent)} %"

    # --- looking only

    def show(self) -> int:
        """What a run would do, or the bloat; reads only."""
        self.wait_until_ready()
        seen = 0
        with self.connected(SYSTEM_DATABASE) as control:
            for database in self.databases(control):
                with self.connected(database) as session:
                    if self.action == "bloat":
                        for line in bloat_lines(self.bloat(session)):
                            self.say(f"{database}: {line}")
                    else:
                        seen += self.preview(session, database)
        if self.action != "bloat":
            self.expect_some(seen)
        return DONE

    def preview(self, session: Session, database: str) -> int:
        """Say what a run would do in a database; to how many."""
        verb, noun = VERBS[self.action]
        for name in self.leftovers(session):
            self.say(f"{database}: would drop {name}, which an interrupted REINDEX CONCURRENTLY has left behind")
        todo = self.todo(session, database)
        if todo:
            name, size = max(todo, key=lambda entry: entry[1])
            self.say(
                f"{database}: {counted(len(todo), noun)} would be {verb}, {size_text(sum(size for _, size in todo))} in all; "
                f"the largest is {name} with {size_text(size)}"
            )
        return len(todo)


def become_postgres() -> None:
    """As root, go on as the user of the timers: files that root had written could not be replaced by them."""
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        os.initgroups("postgres", grp.getgrnam("evenkeel-metrics").gr_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)


def say(line: str) -> None:
    """One line for the journal, or for who looks on."""
    print(line, flush=True)


def main(argv: Sequence[str], driver: Any = None) -> int:
    """The exit code: 0 done (or left to the primary), 1 not all done, 2 not possible."""
    parser = argparse.ArgumentParser(prog="pg_maintenance.py", description="Online maintenance of a PostgreSQL cluster, on its primary.")
    parser.add_argument("action", choices=["vacuum", "reindex", "bloat", "vacuum_full"], help="vacuum_full is refused, with the reason")
    parser.add_argument("target", metavar="CLUSTER[:DATABASE[:SCHEMA.TABLE]]")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="other settings than the cluster's own")
    options = parser.parse_args(argv)
    try:
        if options.action == "vacuum_full":
            raise UsageError(NO_VACUUM_FULL)
        target = parse_target(options.target)
        become_postgres()
        driver = driver or importlib.import_module("psycopg2")
        run = Run(driver, options.action, target, read_settings(target.cluster, options.settings), say)
        signal.signal(signal.SIGTERM, run.stop)
        return run.show() if options.dry_run or options.action == "bloat" else run.maintain()
    except MaintenanceError as error:
        print(error, file=sys.stderr, flush=True)
        return error.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

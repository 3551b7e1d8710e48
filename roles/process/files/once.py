#!/usr/bin/python3 -I
"""Run a timer's command once for the whole platform, although its timer elapses on several hosts.

The hosts agree through a database of the application, as its user. Whoever takes the timer's lock there (session-level, so that
it goes with the connection of a host that dies) and finds it due runs the command; it is due when the timer has elapsed since the
last run that succeeded was started. The others wait for the end of that run, and run the command themselves if it failed.

A run whose connection is lost has lost its lock: it is stopped, and the timer is tried afresh.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType

CREDENTIAL = "evenkeel-once"
PATIENCE_SECONDS = 60.0  # for a database that fails over meanwhile
POLL_SECONDS = 1.0
EARLY_SECONDS = 10.0  # a host's clock may be so far ahead of the database's
GRACE_SECONDS = 10.0
TRIES = 3  # of a run whose connection is lost

PREPARE = (
    "SET tcp_keepalives_idle = 10",  # the lock of a host that has lost its power is free half a minute later
    "SET tcp_keepalives_interval = 5",
    "SET tcp_keepalives_count = 3",
)
TABLE = (
    "SELECT pg_advisory_xact_lock(hashtext('evenkeel.timer_runs'))",
    "CREATE SCHEMA IF NOT EXISTS evenkeel",
    """CREATE TABLE IF NOT EXISTS evenkeel.timer_runs (
         name text PRIMARY KEY, host text NOT NULL, started_at timestamptz NOT NULL, finished_at timestamptz, exit_status integer,
         success_started_at timestamptz)""",
)
LOCK = "SELECT pg_try_advisory_lock(hashtextextended('evenkeel timer ' || %s, 0))"
UNLOCK = "SELECT pg_advisory_unlock(hashtextextended('evenkeel timer ' || %s, 0))"
LAST = """SELECT extract(epoch FROM clock_timestamp())::float8, extract(epoch FROM success_started_at)::float8, host,
                 extract(epoch FROM started_at)::float8, finished_at IS NULL
          FROM (SELECT) AS nothing LEFT JOIN evenkeel.timer_runs ON name = %s"""
BEGIN = """INSERT INTO evenkeel.timer_runs (name, host, started_at) VALUES (%s, %s, clock_timestamp())
           ON CONFLICT (name) DO UPDATE SET host = excluded.host, started_at = excluded.started_at, finished_at = NULL, exit_status = NULL
           RETURNING started_at"""
END = """UPDATE evenkeel.timer_runs SET finished_at = clock_timestamp(), exit_status = %s,
                success_started_at = CASE WHEN %s = 0 THEN started_at ELSE success_started_at END
         WHERE name = %s AND host = %s AND started_at = %s"""


class OnceError(Exception):
    """The command was not run, or not to its end; the message says why."""


class Lost(Exception):
    """The connection to the database is gone, and the lock with it."""


class Database:
    """The connection through which the hosts agree. `driver` is psycopg2, or what behaves like it."""

    def __init__(self, driver: Any, url: str, password: str, name: str) -> None:
        self.driver, self.url, self.password, self.name = driver, url, password, name
        self.connection: Any = None

    def connect(self) -> None:
        """Connect, with patience, and make the table if it is the first time."""
        self.close()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                self.connection = self.driver.connect(self.url, password=self.password, application_name=f"{self.name} once")
                self.connection.autocommit = True
                for statement in PREPARE:
                    self.ask(statement)
                if self.ask("SELECT to_regclass('evenkeel.timer_runs') IS NULL")[0]:
                    self.ask("; ".join(["BEGIN", *TABLE, "COMMIT"]))
                return
            except (Lost, self.driver.OperationalError) as error:
                self.close()
                if time.monotonic() > deadline:
                    reason = " ".join(str(error).split())
                    raise OnceError(f"the database through which the hosts agree cannot be reached: {reason}") from None
                time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Close the connection, which frees the lock."""
        if self.connection is not None:
            with contextlib.suppress(self.driver.Error):
                self.connection.close()
        self.connection = None

    def ask(self, statement: str, *values: object) -> Any:
        """The first row of the answer."""
        try:
            with self.connection.cursor() as cursor:
                cursor.execute(statement, values or None)
                return cursor.fetchone() if cursor.description else None
        except (self.driver.OperationalError, self.driver.InterfaceError, self.driver.InternalError) as error:
            raise Lost(" ".join(str(error).split())) from None
        except self.driver.Error as error:
            raise OnceError(" ".join(str(error).split())) from None


def told(moment: float) -> str:
    """A moment for people."""
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S} UTC"


def next_elapse(calendar: str, after: float) -> float | None:
    """When a timer elapses first after a moment, in the words of systemd itself; None for never."""
    command = ["systemd-analyze", "calendar", "--iterations=1", f"--base-time=@{int(after)}", calendar]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        raise OnceError(f'systemd does not understand the calendar "{calendar}": {done.stderr.strip()}')
    found = re.findall(r"^\s*(?:Next elapse|\(in UTC\)): \w+ (\S+ \S+) UTC$", done.stdout, re.MULTILINE)
    return datetime.strptime(found[-1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp() if found else None


class Runner:
    """One elapse of the timer on this host."""

    def __init__(self, database: Database, app: str, timer: str, calendar: str, limit: float, command: Sequence[str]) -> None:
        self.database, self.app, self.calendar, self.limit, self.command = database, app, calendar, limit, command
        self.name = f"{app}-{timer}"
        self.host = socket.gethostname()
        self.child: subprocess.Popen[bytes] | None = None
        self.stopped = False

    def say(self, line: str) -> None:
        print(f"{self.name} {line}", flush=True)

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        """Somebody stops this unit: its command ends first."""
        self.stopped = True
        if self.child is not None:
            self.child.terminate()
        else:
            raise SystemExit(0)

    def run(self) -> int:
        """Run the command if it is this host's turn; the exit status."""
        for _ in range(TRIES):
            try:
                self.database.connect()
                return self.work() if self.turn() else 0
            except Lost as error:
                if self.stopped:
                    return 128 + signal.SIGTERM
                self.say(f"has lost its connection to the database ({error}), and its turn with it; tries afresh")
            finally:
                self.database.close()
        raise OnceError(f"the connection to the database was lost {TRIES} times")

    def turn(self) -> bool:
        """Whether this host shall run it now, holding the lock; waits for the end of another host's run."""
        announced = False
        while True:
            mine = self.database.ask(LOCK, self.name)[0]
            now, success, host, started, running = self.database.ask(LAST, self.name)
            if not mine:
                if not announced:
                    where = f"{host} since {told(started)}" if started and running else "another host"
                    self.say(f"runs on {where}; waiting, in case it fails there")
                    announced = True
                time.sleep(POLL_SECONDS)
                continue
            elapse = now if success is None else next_elapse(self.calendar, success)
            if elapse is not None and elapse <= now:
                return True
            self.database.ask(UNLOCK, self.name)
            if elapse is None or elapse - now > EARLY_SECONDS:
                due = "never again" if elapse is None else f"again {told(elapse)}"
                by_hand = f"{self.app}-run {shlex.join(self.command)}"
                self.say(f"is not due: it ran on {host} at {told(success)} and is due {due}. To run it all the same: {by_hand}")
                return False
            time.sleep(elapse - now)

    def work(self) -> int:
        """Run the command while the lock is held, and record how it ended."""
        started = self.database.ask(BEGIN, self.name, self.host)[0]
        self.child = subprocess.Popen(self.command, start_new_session=True)
        try:
            status = self.watch(self.child)
        finally:
            self.end_child()
        try:
            self.database.ask(END, status, status, self.name, self.host, started)
        except Lost:  # it is done: that must be known, or another host would do it again
            self.database.connect()
            self.database.ask(END, status, status, self.name, self.host, started)
        return status

    def watch(self, child: subprocess.Popen[bytes]) -> int:
        """The exit status of the command; Lost when the lock is gone before."""
        deadline = time.monotonic() + self.limit
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = child.wait(POLL_SECONDS)
                return status if status >= 0 else 128 - status
            if time.monotonic() > deadline:
                self.end_child()
                self.say(f"has not ended within {self.limit:g} s, its limit (task_time_limit_seconds): stopped")
                return 124
            self.database.ask("SELECT 1")

    def end_child(self) -> None:
        """Leave nothing behind that runs without the lock."""
        if self.child is None:
            return
        if self.child.poll() is None:
            self.child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        self.child = None


def password(environment: Mapping[str, str]) -> str:
    """The password of the application's user, which systemd lays into a directory of this unit's own."""
    try:
        return (Path(environment["CREDENTIALS_DIRECTORY"]) / CREDENTIAL).read_text(encoding="utf-8")
    except (KeyError, OSError):
        raise OnceError(f"the credential {CREDENTIAL} is not there; run playbooks/site.yml for this host") from None


def main(argv: Sequence[str]) -> int:
    """The exit status of the command, or 0 when another host has run it."""
    parser = argparse.ArgumentParser(prog="once.py", description="Run a timer's command once for the whole platform.")
    parser.add_argument("--app", required=True, help="name of the application")
    parser.add_argument("--timer", required=True, help="name of the process in its contract")
    parser.add_argument("--calendar", required=True, help="its OnCalendar=")
    parser.add_argument("--database", required=True, metavar="URL", help="libpq URL without password")
    parser.add_argument("--limit", required=True, type=float, metavar="SECONDS", help="in which the command must end")
    parser.add_argument("command", nargs="+", help="after --")
    options = parser.parse_args(argv)
    try:
        driver = importlib.import_module("psycopg2")
        database = Database(driver, options.database, password(os.environ), f"{options.app}-{options.timer}")
        runner = Runner(database, options.app, options.timer, options.calendar, options.limit, options.command)
        signal.signal(signal.SIGTERM, runner.stop)
        status = runner.run()
    except (OnceError, ImportError) as error:
        print(f"{options.app}-{options.timer} was not run: {error}", file=sys.stderr)
        return 1
    if runner.stopped:  # as if the command itself had been stopped
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

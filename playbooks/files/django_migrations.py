"""The migrations of any Django application on PostgreSQL, in the environment of one of its releases: the suite's own migration program.

    python - plan DATABASE...                     what is pending; changes nothing
    python - apply DATABASE... [--expect DIGEST]  apply it, migration by migration
    python - state DATABASE...                    what this release knows, and what the databases have
    python - reversal DATABASE... --to JSON       what going back to {"database": {"app": "0006_name" | "zero"}} would do; changes nothing
    python - reverse DATABASE... --to JSON        go back

The last line of the output is JSON, described in docs/reference/migrations.md; progress goes to stderr. It needs nothing of the application
but its settings, and Django 3.2 or newer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import sys
import threading
import time
from contextlib import nullcontext, suppress
from typing import Any

import django
import sqlparse
from django.db import DatabaseError, InterfaceError, NotSupportedError, connections, router, transaction
from django.db.backends.signals import connection_created
from sqlparse import lexer, tokens

ADVISORY_LOCK = (0x65766B6C, 1)  # "evkl": one runner at a time for each database
TRIED_AGAIN = {"55P03": "lock time-out", "40P01": "deadlock", "40001": "serialisation failure"}
CANCELED = "57014"
PAUSE_LIMIT_SECONDS = 30
#: Weakest first.
LOCKS = (
    "ACCESS SHARE",
    "ROW SHARE",
    "ROW EXCLUSIVE",
    "SHARE UPDATE EXCLUSIVE",
    "SHARE",
    "SHARE ROW EXCLUSIVE",
    "EXCLUSIVE",
    "ACCESS EXCLUSIVE",
)
PART = r'(?:"[^"]+"|\w+)'
NAME = rf"(?P<name>{PART}(?:\.{PART})?)"
#: What a statement locks; the first pattern that fits counts.
STATEMENTS = tuple(
    (re.compile(pattern.replace("NAME", NAME), re.IGNORECASE | re.DOTALL), lock)
    for pattern, lock in (
        (r"ALTER TABLE (?:IF EXISTS )?(?:ONLY )?NAME\s+ADD CONSTRAINT \S+ FOREIGN KEY", "SHARE ROW EXCLUSIVE"),
        (r"ALTER TABLE (?:IF EXISTS )?(?:ONLY )?NAME\s+(?:VALIDATE CONSTRAINT|ALTER COLUMN \S+ SET STATISTICS)", "SHARE UPDATE EXCLUSIVE"),
        (r"ALTER TABLE (?:IF EXISTS )?(?:ONLY )?NAME", "ACCESS EXCLUSIVE"),
        (r"DROP TABLE (?:IF EXISTS )?NAME", "ACCESS EXCLUSIVE"),
        (r"TRUNCATE (?:TABLE )?(?:ONLY )?NAME", "ACCESS EXCLUSIVE"),
        (r"CREATE (?:UNIQUE )?INDEX CONCURRENTLY .*?\bON (?:ONLY )?NAME", "SHARE UPDATE EXCLUSIVE"),
        (r"CREATE (?:UNIQUE )?INDEX .*?\bON (?:ONLY )?NAME", "SHARE"),
        (r"REINDEX TABLE CONCURRENTLY NAME", "SHARE UPDATE EXCLUSIVE"),
        (r"REINDEX TABLE NAME", "SHARE"),
        (r"CREATE (?:OR REPLACE )?(?:CONSTRAINT )?TRIGGER .*?\bON NAME", "SHARE ROW EXCLUSIVE"),
        (rf"DROP TRIGGER (?:IF EXISTS )?{PART} ON NAME", "ACCESS EXCLUSIVE"),
        (r"COMMENT ON TABLE NAME", "SHARE UPDATE EXCLUSIVE"),
        (rf"COMMENT ON COLUMN (?P<name>{PART}(?:\.{PART})?)\.{PART} IS", "SHARE UPDATE EXCLUSIVE"),
        (r"LOCK (?:TABLE )?NAME\s+IN ACCESS EXCLUSIVE MODE", "ACCESS EXCLUSIVE"),
        (r"(?:INSERT INTO|UPDATE(?: ONLY)?|DELETE FROM(?: ONLY)?) NAME", "ROW EXCLUSIVE"),
    )
)
DROPPED_INDEX = re.compile(rf"DROP INDEX (?P<concurrently>CONCURRENTLY )?(?:IF EXISTS )?{NAME}", re.IGNORECASE)
BUILT_INDEX = re.compile(
    rf"CREATE (?:UNIQUE )?INDEX CONCURRENTLY (?P<unless>IF NOT EXISTS )?(?P<index>{PART}) ON (?:ONLY )?{NAME}", re.IGNORECASE
)
DROPPED_PART = re.compile(rf"\bDROP (?:CONSTRAINT |COLUMN )?(?:IF EXISTS )?(?P<part>{PART})", re.IGNORECASE)
DROPS = re.compile(rf"(?:ALTER|DROP) TABLE (?:IF EXISTS )?(?:ONLY )?{NAME}", re.IGNORECASE)
REFERRING = re.compile(r"ALTER TABLE|CREATE (?:UNLOGGED )?TABLE", re.IGNORECASE)
REFERENCE = re.compile(rf"\bREFERENCES {NAME}", re.IGNORECASE)
#: What PostgreSQL tells of rows, as greedy as can be: a value may hold anything.
FAILING_ROW = re.compile(r"DETAIL:\s+Failing row contains \(.*\)\.?", re.DOTALL)
FAILING_ROW_IN_ANY_LANGUAGE = re.compile(r"\n\w+:\s+[^\n(]*\(.*\)\.?", re.DOTALL)
KEY_VALUES = re.compile(r"\)=\(.*\)", re.DOTALL)
#: Comments, quoted names and string literals of SQL; PostgreSQL may have cut off the end.
LITERAL = re.compile(
    r"""--[^\n]*|/\*.*?(?:\*/|\Z)|"[^"]*(?:"|\Z)"""
    r"""|(?P<value>\be'(?:[^'\\]|\\.|'')*(?:'|\\?\Z)|'(?:[^']|'')*(?:'|\Z)|\$(?P<tag>(?:[^\W\d]\w*)?)\$.*?(?:\$(?P=tag)\$|\Z))""",
    re.DOTALL | re.IGNORECASE,
)
INTEGERS = ("smallint", "integer", "bigint")
#: Operations of Django that are one statement each; older Djangos lack some.
ONE_STATEMENT = (
    "AddIndex",
    "AddIndexConcurrently",
    "RemoveIndex",
    "RemoveIndexConcurrently",
    "RenameIndex",
    "AddConstraint",
    "AddConstraintNotValid",
    "RemoveConstraint",
    "ValidateConstraint",
)
SERIALS = {"smallserial": "smallint", "serial": "integer", "bigserial": "bigint"}


class Refused(Exception):
    """Nothing was done; the message says why, in one sentence."""


# --- Connections --------------------------------------------------------------------------------------------------------------------------


def prepare_sessions(lock_timeout_seconds: float, statement_timeout_seconds: float, *, read_only: bool) -> None:
    """Let every session that this program opens have these limits; also those that the application's code opens."""

    def prepare(sender: Any, connection: Any, **_signal: Any) -> None:
        if connection.vendor != "postgresql":
            return
        settings = {
            "lock_timeout": f"{lock_timeout_seconds * 1000:.0f}ms",
            "statement_timeout": f"{statement_timeout_seconds * 1000:.0f}ms",
            "application_name": f"evenkeel-migrations-{os.getpid()}",
        }
        if read_only:
            settings["default_transaction_read_only"] = "on"
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('server_version_num')::int")
            if cursor.fetchone()[0] >= 140000:  # a statement ends soon after this program has
                settings["client_connection_check_interval"] = "2s"
            for name, value in settings.items():
                cursor.execute("SELECT set_config(%s, %s, false)", [name, value])

    connection_created.connect(prepare, weak=False)


def connect(alias: str) -> Any:
    """The connection of a database of the settings, open."""
    if alias not in connections:
        known = ", ".join(sorted(name for name in connections if name != "default")) or "default"
        raise Refused(f"the application's settings have no database {alias}; known are: {known}")
    connection = connections[alias]
    if connection.vendor != "postgresql":
        raise Refused(f"{alias} is a database of the kind {connection.vendor}; only PostgreSQL is migrated")
    try:
        connection.close_if_unusable_or_obsolete()
        connection.ensure_connection()
    except DatabaseError as error:
        raise Refused(f"{alias}: no connection: {one_line(error)}") from None
    return connection


def rows(connection: Any, sql: str, values: Any = ()) -> list[Any]:
    """The rows of a query."""
    with connection.cursor() as cursor:
        cursor.execute(sql, values)
        return list(cursor.fetchall())


def identify(alias: str, systems: dict[str, str]) -> dict[str, str]:
    """Which database this is: {system, name}. `systems`: the system identifiers of those where another way found them."""
    connection = connect(alias)
    [(name,)] = rows(connection, "SELECT current_database()")
    system = systems.get(alias)
    if system is None:
        [(allowed,)] = rows(connection, "SELECT has_function_privilege('pg_catalog.pg_control_system()', 'EXECUTE')")
        if not allowed:
            raise Refused(f"{alias}: this role may not ask for the system identifier; give it: --system {alias}=ID")
        [(system,)] = rows(connection, "SELECT system_identifier FROM pg_control_system()")
    return {"system": str(system), "name": name}


def one_line(error: BaseException) -> str:
    """What an error says, in one line, without the values of rows: it is printed, and kept in the ledger."""
    text = FAILING_ROW.sub("", str(error))
    if sqlstate(error) in ("23502", "23514"):  # null where none may be; a check
        text = FAILING_ROW_IN_ANY_LANGUAGE.sub("", text)
    return " ".join(KEY_VALUES.sub(")=(…)", text).split()) or type(error).__name__


def without_values(sql: str) -> str:
    """A statement of anybody's in one line, without what its string literals and comments hold."""
    text = LITERAL.sub(lambda found: "'…'" if found["value"] else found[0] if found[0].startswith('"') else " ", sql)
    return " ".join(text.split())


def sqlstate(error: BaseException) -> str:
    """The SQLSTATE behind an error of Django; empty when it has none."""
    cause: BaseException | None = error
    while cause is not None:
        state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
        if state:
            return str(state)
        cause = cause.__cause__
    return ""


# --- Locks and tables ---------------------------------------------------------------------------------------------------------------------


def bare(name: str) -> str:
    """A table's name as the catalogue has it."""
    return ".".join(part[1:-1] if part.startswith('"') else part.lower() for part in re.findall(PART, name))


def flat(statement: str) -> str:
    """A statement with single spaces and without comments."""
    words = (" " if kind in tokens.Comment else text for kind, text in lexer.tokenize(statement))  # format() refuses long ones
    return " ".join("".join(words).split())


def locks_of(statement: str) -> list[tuple[str, str]]:
    """(table, lock) of one statement with single spaces, as far as its text tells."""
    found = []
    for pattern, lock in STATEMENTS:
        match = pattern.match(statement)
        if match:
            found.append((bare(match["name"]), lock))
            break
    if REFERRING.match(statement):
        found += [(bare(each["name"]), "SHARE ROW EXCLUSIVE") for each in REFERENCE.finditer(statement)]
    return found


def locks_of_dropped_keys(connection: Any, statement: str) -> list[tuple[str, str]]:
    """The same for the tables at the other end of foreign keys that go with a table, a column or a constraint: triggers on both go, too."""
    match = DROPS.match(statement)
    if not match:
        return []
    table = [quoted(bare(match["name"]))]
    keys = "SELECT confrelid::regclass::text, conrelid::regclass::text FROM pg_constraint k WHERE contype = 'f' AND "
    found = []
    if statement[:4].upper() == "DROP":
        found = rows(connection, f"{keys} to_regclass(%s) IN (conrelid, confrelid)", table)
    for part in (bare(each["part"]) for each in DROPPED_PART.finditer(statement, match.end())):
        column = "EXISTS (SELECT FROM pg_attribute WHERE attrelid = {0}relid AND attnum = ANY ({0}key) AND attname = %s)"
        found += rows(
            connection,
            f"{keys} (conrelid = to_regclass(%s) AND (conname = %s OR {column.format('con')})"
            f" OR confrelid = to_regclass(%s) AND {column.format('conf')})",
            [*table, part, part, *table, part],
        )
    return [(bare(each), "ACCESS EXCLUSIVE") for both in found for each in both]


def strongest_locks(connection: Any, sql: list[str]) -> list[dict[str, Any]]:
    """The tables that exist and that these statements lock: {name, lock (the strongest), rows (estimated)}."""
    locks: dict[str, str] = {}

    def note(table: str, lock: str) -> None:
        if table not in locks or LOCKS.index(lock) > LOCKS.index(locks[table]):
            locks[table] = lock

    for text in sql:
        for statement in map(flat, sqlparse.split(text)):
            for table, lock in locks_of(statement) + locks_of_dropped_keys(connection, statement):
                note(table, lock)
            dropped = DROPPED_INDEX.match(statement)
            if dropped:
                for (table,) in rows(
                    connection,
                    "SELECT indrelid::regclass::text FROM pg_index WHERE indexrelid = to_regclass(%s)",
                    [quoted(bare(dropped["name"]))],
                ):
                    note(bare(table), "SHARE UPDATE EXCLUSIVE" if dropped["concurrently"] else "ACCESS EXCLUSIVE")
    counted = {table: estimated_rows(connection, table) for table in locks}
    return [{"name": table, "lock": locks[table], "rows": counted[table]} for table in sorted(locks) if counted[table] is not None]


def quoted(name: str) -> str:
    """A catalogue name as SQL writes it."""
    return ".".join(f'"{part}"' for part in name.split("."))


def estimated_rows(connection: Any, table: str) -> int | None:
    """About how many rows a table has, partitions included; None when it does not exist."""
    found = rows(
        connection,
        "WITH RECURSIVE parts(oid) AS "
        "(SELECT to_regclass(%s)::oid UNION ALL SELECT inhrelid FROM pg_inherits JOIN parts ON inhparent = oid) "
        "SELECT c.reltuples, CASE WHEN c.reltuples < 0 AND c.relkind IN ('r', 'm') THEN pg_relation_size(c.oid) ELSE 0 END "
        "FROM parts JOIN pg_class c USING (oid)",
        [quoted(table)],
    )
    if not found:
        return None
    # never analysed: a row of a hundred bytes
    return sum(int(tuples) if tuples >= 0 else int(size) // 100 for tuples, size in found)


# --- May the release before run on it? ----------------------------------------------------------------------------------------------------


def judged(operation: Any, app: str, *what: Any) -> tuple[bool | None, str]:
    """`judge`; unknown where an operation is not as Django's are."""
    try:
        return judge(operation, app, *what)
    except Exception as error:  # it may be anybody's code
        return None, f"'{operation.describe()}' cannot be judged ({type(error).__name__}: {one_line(error)})"


def judge(
    operation: Any, app: str, sql: list[str], editor: Any, before: Any, after: Any, base: dict[str, set[str]]
) -> tuple[bool | None, str]:
    """Whether a release that does not know this operation can run after it (None: cannot be told), and why not.

    `base`: table to its columns as they were before the first pending migration: what the release before can know, whatever models are
    called since.
    """
    from django.db.migrations import operations as kinds

    if not base:
        return True, ""  # there is no release before
    if not of_django(operation):
        return None, f"what {kind_name(operation)} does cannot be judged"
    if isinstance(operation, kinds.RunPython):
        if operation.code == kinds.RunPython.noop or not router.allow_migrate(editor.connection.alias, app, **operation.hints):
            return True, ""
        return None, f"what the code of {code_name(operation.code)} does to data cannot be judged"
    if isinstance(operation, kinds.RunSQL):
        return (None, "what hand-written SQL does cannot be judged") if sql else (True, "")
    if not sql or isinstance(operation, kinds.CreateModel):
        return True, ""
    named = "old_name" if isinstance(operation, kinds.RenameModel) else "model_name" if hasattr(operation, "model_name") else "name"
    name = getattr(operation, named, "")
    if (app, name.lower()) in before.models and before.apps.get_model(app, name)._meta.db_table not in base:
        return True, ""  # made by this very plan
    return _judge_known(operation, app, name.lower(), editor, before, after, base)


def _judge_known(
    operation: Any, app: str, model: str, editor: Any, before: Any, after: Any, base: dict[str, set[str]]
) -> tuple[bool | None, str]:
    """The same for an operation of Django on a table that the release before knows."""
    from django.db.migrations import operations as kinds
    from django.db.models import UniqueConstraint

    def table(state: Any) -> str:
        return str(state.apps.get_model(app, model)._meta.db_table)

    def columns(state: Any, fields: Any) -> list[str]:
        return [state.apps.get_model(app, model)._meta.get_field(each).column for each in fields]

    if isinstance(operation, kinds.AddField):
        field = after.apps.get_model(app, model)._meta.get_field(operation.name)
        if field.many_to_many or getattr(field, "generated", False):
            return True, ""
        if has_database_default(field):
            again = f"the second insert of the release before fails: {table(after)}.{field.column} is unique"
            return (False, again) if field.unique else (True, "")
        if field.null:
            return True, ""
        return False, f"inserts of the release before fail: no value for {table(after)}.{field.column}"
    if isinstance(operation, kinds.AlterField | kinds.RemoveField | kinds.RenameField):
        name = operation.old_name if isinstance(operation, kinds.RenameField) else operation.name
        old = before.apps.get_model(app, model)._meta.get_field(name)
        if old.many_to_many and old.remote_field.through._meta.db_table not in base:
            return True, ""
        if not old.many_to_many and old.column not in base.get(table(before), set()):
            return True, ""
        if isinstance(operation, kinds.AlterField):
            new = after.apps.get_model(app, model)._meta.get_field(name)
            narrower = narrowing(editor.connection, old, new)
            if narrower:
                return False, f"{table(after)}.{new.column} {narrower}"
            return no_longer_unique(table(after), [[old.column]] if old.unique and not new.unique else [], base)
        what = "is gone" if isinstance(operation, kinds.RemoveField) else f"is called {operation.new_name}"
        return False, f"queries of the release before fail: {table(before)}.{old.column or name} {what}"
    if isinstance(operation, kinds.DeleteModel):
        return False, f"queries of the release before fail: table {table(before)} is gone"
    if isinstance(operation, kinds.RenameModel):
        return False, f"queries of the release before fail: table {table(before)} has another name"
    if isinstance(operation, kinds.AlterModelTable):
        return False, f"queries of the release before fail: table {table(before)} is called {table(after)}"
    if isinstance(operation, kinds.AddConstraint):
        return False, f"the release before may write rows that the constraint {operation.constraint.name} on {table(after)} refuses"
    if isinstance(operation, kinds.AlterUniqueTogether):
        old = {tuple(each) for each in before.models[app, model].options.get("unique_together") or ()}
        new = {tuple(each) for each in operation.option_value or ()}
        if new - old:
            return False, f"the release before may write rows that the new unique columns of {table(after)} refuse"
        return no_longer_unique(table(after), [columns(before, each) for each in sorted(old - new)], base)
    if isinstance(operation, kinds.RemoveConstraint):
        constraint = before.models[app, model].get_constraint_by_name(operation.name)
        if not isinstance(constraint, UniqueConstraint):
            return True, ""
        if not constraint.fields:
            return None, f"the release before may write with ON CONFLICT on what {operation.name} on {table(after)} made unique"
        return no_longer_unique(table(after), [columns(before, constraint.fields)], base)
    if isinstance(operation, kinds.AlterOrderWithRespectTo):
        if operation.option_value:
            return False, f"inserts of the release before fail: no value for {table(after)}._order"
        return False, f"queries of the release before fail: {table(before)}._order is gone"
    if type(operation).__name__ == "RemoveCollation":
        return None, "whether the release before uses the collation cannot be told"
    return True, ""  # indexes, extensions, comments, what relaxes


def no_longer_unique(table: str, groups: list[list[str]], base: dict[str, set[str]]) -> tuple[bool | None, str]:
    """What it means that these groups of columns may hold the same values twice: INSERT … ON CONFLICT (columns) fails."""
    known = [", ".join(columns) for columns in groups if base.get(table, set()).issuperset(columns)]
    if not known:
        return True, ""
    return None, f"the release before may write with ON CONFLICT on {' and on '.join(known)} of {table}, which are no longer unique"


def columns_of(state: Any) -> dict[str, set[str]]:
    """Table to its columns, of all models of a state."""
    models = state.apps.get_models(include_auto_created=True)
    return {model._meta.db_table: {field.column for field in model._meta.local_concrete_fields} for model in models}


def has_database_default(field: Any) -> bool:
    """Whether PostgreSQL itself fills the column (Django 5.0 and newer)."""
    from django.db.models import NOT_PROVIDED

    return getattr(field, "db_default", NOT_PROVIDED) is not NOT_PROVIDED


def narrowing(connection: Any, old: Any, new: Any) -> str:
    """How a changed column refuses what the old one took, or what writers leave out; empty when it does not."""
    if old.many_to_many or new.many_to_many:
        return "is another relation"
    if old.column != new.column:
        return f"was called {old.column}"
    if old.null and not new.null:
        return "refuses rows without a value"
    if new.unique and not old.unique:
        return "refuses values that are there already"
    if has_database_default(old) and not has_database_default(new) and not new.null:
        return "has lost its default"
    target = constrained_to(new)
    if target and target != constrained_to(old):
        return f"refuses values that {target} does not have"
    before, after = old.db_parameters(connection), new.db_parameters(connection)
    if after["check"] and after["check"] != before["check"]:
        return f"refuses values outside {after['check']}"
    if old.db_type_suffix(connection) and not new.db_type_suffix(connection):
        return "is no longer numbered by itself"
    if before.get("collation") != after.get("collation"):
        return "is compared in another way"
    if not wider(before["type"] or "", after["type"] or ""):
        return f"is {after['type']}, was {before['type']}"
    return ""


def constrained_to(field: Any) -> str:
    """The table that a foreign key with a constraint points to; empty for other fields."""
    if field.remote_field is None or not getattr(field, "db_constraint", False):
        return ""
    return str(field.remote_field.model._meta.db_table)


def wider(old: str, new: str) -> bool:
    """Whether a column of type `new` takes all that one of type `old` did, and gives it back as before."""
    old, new = SERIALS.get(old, old), SERIALS.get(new, new)
    if old == new or (old in INTEGERS and new in INTEGERS[INTEGERS.index(old) :]):
        return True
    lengths = [re.fullmatch(r"varchar\((\d+)\)", each) for each in (old, new)]
    if all(lengths):
        return int(lengths[0][1]) <= int(lengths[1][1])  # type: ignore[index]
    if lengths[0] and new in ("varchar", "text"):
        return True
    if {old, new} <= {"varchar", "text"}:
        return True
    numbers = [re.fullmatch(r"numeric\((\d+), ?(\d+)\)", each) for each in (old, new)]
    if all(numbers):
        return numbers[0][2] == numbers[1][2] and int(numbers[0][1]) <= int(numbers[1][1])  # type: ignore[index]
    return False


def of_django(operation: Any) -> bool:
    """Whether an operation is one of Django's own, not one that inherits from it."""
    from django.contrib.postgres import operations as postgres
    from django.db.migrations import operations as kinds

    return any(type(operation) is value for value in (*vars(kinds).values(), *vars(postgres).values()))


def kind_name(operation: Any) -> str:
    """What a person finds the class of an operation by."""
    return f"the operation {type(operation).__name__} of {type(operation).__module__}"


def code_name(code: Any) -> str:
    """What a person finds a function by."""
    return f"{getattr(code, '__module__', '?')}.{getattr(code, '__qualname__', type(code).__qualname__)}"


# --- Plans --------------------------------------------------------------------------------------------------------------------------------


class Release:
    """What this release knows of one database's migrations, and what the database says."""

    def __init__(self, alias: str) -> None:
        from django.db.migrations.exceptions import BadMigrationError, CircularDependencyError, NodeNotFoundError
        from django.db.migrations.executor import MigrationExecutor

        self.alias = alias
        self.connection = connect(alias)
        try:
            self.executor = MigrationExecutor(self.connection)
        except (BadMigrationError, CircularDependencyError, NodeNotFoundError) as error:
            raise Refused(f"the migrations of this release do not fit together: {one_line(error)}") from None
        self.loader = self.executor.loader

    def applied(self) -> list[tuple[str, str]]:
        """What the database says is applied, in the order in which it was."""
        recorder = self.executor.recorder
        if not recorder.has_table():
            return []
        return list(recorder.migration_qs.order_by("id").values_list("app", "name"))

    def unknown(self) -> list[tuple[str, str]]:
        """What of it this release does not know."""
        return [key for key in self.applied() if key not in self.loader.disk_migrations]

    def check(self) -> None:
        """Refuse a graph or a history that Django would refuse."""
        from django.db.migrations.exceptions import InconsistentMigrationHistory

        conflicts = self.loader.detect_conflicts()
        if conflicts:
            names = "; ".join(f"{app}: {', '.join(sorted(names))}" for app, names in sorted(conflicts.items()))
            raise Refused(f"two migrations claim to be the last one ({names}): merge them (makemigrations --merge) and release again")
        try:
            self.loader.check_consistent_history(self.connection)
        except InconsistentMigrationHistory as error:
            raise Refused(f"the history of {self.alias} does not fit this release: {one_line(error)}") from None

    def squashes(self) -> list[Any]:
        """The squashed migrations that stand for applied ones and are not recorded as applied: Django's migrate records them at its end."""
        applied = set(self.applied())
        return [
            migration
            for key, migration in sorted(self.loader.replacements.items())
            if key not in applied and migration.replaces and applied.issuperset((app, name) for app, name in migration.replaces)
        ]

    def recorded(self) -> list[dict[str, Any]]:
        """Those, as entries of a plan."""
        told = [(migration, ", ".join(names(migration.replaces))) for migration in self.squashes()]
        why = "only a row in django_migrations is written"
        return [
            {**self._entry(migration, []), "operations": [f"Record that it stands for {replaced}, which are applied"],
             "reversible": True, "compatible": True, "why": why}
            for migration, replaced in told
        ]  # fmt: skip

    def steps(self, to: dict[str, str] | None = None) -> list[tuple[Any, bool]]:
        """(migration, backwards) in the order in which Django would run them. `to`: app to migration or `zero`; without it the newest."""
        if to is None:
            return list(self.executor.migration_plan(self.loader.graph.leaf_nodes()))
        targets = []
        for app, name in sorted(to.items()):
            target = (app, None if name == "zero" else name)
            if app not in self.loader.migrated_apps:
                raise Refused(f"{self.alias}: this release has no migrations of {app}, so it cannot go back in them")
            if target[1] is not None and target not in self.loader.graph.nodes:
                raise Refused(f"{self.alias}: this release cannot go back to {app}.{name}, which it does not know (is it behind a squash?)")
            targets.append(target)
        # What the way back of one app takes along is no target of another any more: Django would apply it again.
        taken = {(step.app_label, step.name) for step, backwards in self.executor.migration_plan(targets) if backwards}
        steps = list(self.executor.migration_plan([target for target in targets if target not in taken]))
        ahead = [f"{step.app_label}.{step.name}" for step, backwards in steps if not backwards]
        if ahead:
            raise Refused(f"{self.alias}: {ahead[0]} is not applied: that is not a way back")
        return steps

    def heads(self, steps: list[tuple[Any, bool]]) -> dict[str, list[str]]:
        """App to its last migrations, once these steps are done."""
        done = set(self.loader.applied_migrations)
        for migration, backwards in steps:
            key = (migration.app_label, migration.name)
            done = done - {key} if backwards else done | {key}
        result: dict[str, list[str]] = {}
        for app, name in sorted(done & set(self.loader.graph.nodes)):
            children = {(each.key[0], each.key[1]) for each in self.loader.graph.node_map[app, name].children}
            if not any(child[0] == app and child in done for child in children):
                result.setdefault(app, []).append(name)
        return result

    def state(self) -> Any:
        """Django's picture of the models, as the applied migrations say."""
        return self.executor._create_project_state(with_applied_migrations=True)

    def states_before(self, migrations: list[Any]) -> dict[Any, Any]:
        """Migration to the picture before it, for those to be reversed; as Django's executor does it."""
        wanted, states = set(migrations), {}
        state = self.executor._create_project_state()
        for migration, _backwards in self.executor.migration_plan(self.loader.graph.leaf_nodes(), clean_start=True):
            if not wanted:
                break
            if migration in wanted:
                if "apps" not in state.__dict__:
                    state.apps  # noqa: B018 - renders it once
                states[migration] = state
                state = migration.mutate_state(state, preserve=True)
                wanted.remove(migration)
            elif (migration.app_label, migration.name) in self.loader.applied_migrations:
                migration.mutate_state(state, preserve=False)
        return states

    def pending(self, steps: list[tuple[Any, bool]]) -> list[dict[str, Any]]:
        """These steps for people: what each does, and what it means."""
        result = []
        forwards = [migration for migration, backwards in steps if not backwards]
        if forwards:
            state = self.state()
            base = columns_of(state) if state.models else {}
            for migration in forwards:
                entry, state = self._forwards(migration, state, base)
                result.append(entry)
        behind = [migration for migration, backwards in steps if backwards]
        states = self.states_before(behind) if behind else {}
        result += [self._backwards(migration, states[migration]) for migration in behind]
        return result

    def _forwards(self, migration: Any, state: Any, base: dict[str, set[str]]) -> tuple[dict[str, Any], Any]:
        sql: list[str] = []
        verdicts: list[tuple[bool | None, str]] = []
        with self.connection.schema_editor(collect_sql=True, atomic=migration.atomic) as editor:
            name_defaults(editor)
            if "apps" not in state.__dict__:
                state.apps  # noqa: B018 - renders it once; from then on it is changed bit by bit
            for operation in migration.operations:
                after = state.clone()
                operation.state_forwards(migration.app_label, after)
                for inner, old, new in in_database(operation, migration.app_label, state, after):
                    own, problem = self._sql(editor, migration, inner, old, new)
                    sql += own
                    verdicts.append((None, problem) if problem else judged(inner, migration.app_label, own, editor, old, new, base))
                state = after
            seen = len(editor.collected_sql)
        sql += editor.collected_sql[seen:]
        broken, unclear = [why for fits, why in verdicts if fits is False], [why for fits, why in verdicts if fits is None]
        entry = self._entry(migration, sql)
        entry["compatible"] = False if broken else None if unclear else True
        entry["why"] = "; ".join(dict.fromkeys([*broken, *unclear])) or "nothing that the release before uses changes"
        return entry, state

    def _backwards(self, migration: Any, state: Any) -> dict[str, Any]:
        entry = self._entry(migration, [])
        entry["backwards"] = True
        entry["compatible"] = None
        if not entry["reversible"]:
            irreversible = [operation.describe() for operation in migration.operations if not operation.reversible]
            entry["why"] = f"cannot be reversed: {'; '.join(irreversible)}"
            return entry
        chain = []
        for operation in migration.operations:
            after = state.clone()
            operation.state_forwards(migration.app_label, after)
            chain.append((operation, state, after))
            state = after
        done = [each for operation, *states in chain for each in in_database(operation, migration.app_label, *states)]
        lost = [each for operation, *states in done for each in losses(self.connection, operation, migration.app_label, *states)]
        entry["why"] = "; ".join(dict.fromkeys(lost)) or "no data is lost"
        sql: list[str] = []
        with self.connection.schema_editor(collect_sql=True, atomic=migration.atomic) as editor:
            name_defaults(editor)
            for operation, before, after in reversed(chain):
                for inner, old, new in reversed(in_database(operation, migration.app_label, before, after)):
                    sql += self._sql(editor, migration, inner, new, old, backwards=True)[0]
            seen = len(editor.collected_sql)
        entry["sql"] = sql + editor.collected_sql[seen:]
        entry["tables"] = strongest_locks(self.connection, entry["sql"])
        return entry

    def _entry(self, migration: Any, sql: list[str]) -> dict[str, Any]:
        return {
            "database": self.alias,
            "app": migration.app_label,
            "name": migration.name,
            "operations": [operation.describe() for operation in migration.operations],
            "reversible": all(operation.reversible for operation in migration.operations),
            "compatible": None,
            "why": "",
            "atomic": migration.atomic,
            "sql": sql,
            "tables": strongest_locks(self.connection, sql),
        }

    def _sql(self, editor: Any, migration: Any, operation: Any, old: Any, new: Any, *, backwards: bool = False) -> tuple[list[str], str]:
        """The SQL of one operation, and why it is not known; what is not SQL, or not of Django, is not run."""
        from django.db.migrations.operations import RunPython

        if isinstance(operation, RunPython) or not operation.reduces_to_sql:
            code = getattr(operation, "reverse_code" if backwards else "code", None)
            if code == RunPython.noop:
                return [], ""
            name = code_name(code) if code else type(operation).__name__
            here = router.allow_migrate(self.alias, migration.app_label, **getattr(operation, "hints", {}))
            return ([f"-- Python code: {name}, not shown as SQL"] if here else []), ""
        if not of_django(operation):
            return [f"-- {kind_name(operation)}, not shown as SQL"], ""
        seen = len(editor.collected_sql)
        run = operation.database_backwards if backwards else operation.database_forwards
        label = f"{self.alias} {migration.app_label}.{migration.name}"
        try:
            with transaction.atomic(using=self.alias) if self.connection.in_atomic_block else nullcontext():
                run(migration.app_label, editor, old, new)
        except NotSupportedError as error:
            raise Refused(f"{label} cannot be applied: {one_line(error)}") from None
        except Exception as error:  # it may look for what an earlier pending migration makes, or be anybody's code
            del editor.collected_sql[seen:]
            problem = f"the SQL of '{operation.describe()}' is not known before it runs ({one_line(error)})"
            return [f"-- {problem}"], problem
        return list(editor.collected_sql[seen:]), ""


def name_defaults(editor: Any) -> None:
    """Let the SQL that is collected have the name of a default that is computed: its value would be another one in each plan."""
    compute = editor.effective_default

    def effective_default(field: Any) -> Any:
        if field.has_default() and callable(field.default):
            return f"<{code_name(field.default)}>"
        if getattr(field, "auto_now", False) or getattr(field, "auto_now_add", False):
            return "<now>"
        return compute(field)

    editor.effective_default = effective_default


def in_database(operation: Any, app: str, before: Any, after: Any) -> list[tuple[Any, Any, Any]]:
    """(operation, picture before, picture after) of what an operation does in the database: its own, or those inside it."""
    from django.db.migrations.operations import SeparateDatabaseAndState

    if type(operation) is not SeparateDatabaseAndState:
        return [(operation, before, after)]
    result = []
    for inner in operation.database_operations:
        following = before.clone()
        inner.state_forwards(app, following)
        result += in_database(inner, app, before, following)
        before = following
    return result


def losses(connection: Any, operation: Any, app: str, before: Any, after: Any) -> list[str]:
    """What is lost when an operation between these two pictures is reversed."""
    from django.db.migrations import operations as kinds

    if not of_django(operation):
        return [f"what {kind_name(operation)} does to data cannot be judged"]
    if isinstance(operation, kinds.CreateModel):
        return [f"the rows of {app}.{operation.name} are lost"]
    if isinstance(operation, kinds.AddField):
        return [f"the values of {app}.{operation.model_name}.{operation.name} are lost"]
    if isinstance(operation, kinds.RemoveField):
        return [f"{app}.{operation.model_name}.{operation.name} comes back without its values"]
    if isinstance(operation, kinds.DeleteModel):
        return [f"{app}.{operation.name} comes back without its rows"]
    if isinstance(operation, kinds.AlterField):
        return _losses_of_a_change(connection, operation, app, before, after)
    if isinstance(operation, kinds.RunPython) and operation.reverse_code not in (None, kinds.RunPython.noop):
        return [f"what the code of {code_name(operation.reverse_code)} does to data cannot be judged"]
    if isinstance(operation, kinds.RunSQL) and operation.reverse_sql not in (None, kinds.RunSQL.noop):
        return ["what hand-written SQL does to data cannot be judged"]
    return []


def _losses_of_a_change(connection: Any, operation: Any, app: str, before: Any, after: Any) -> list[str]:
    """What is lost when a changed column is changed back."""
    old, new = (state.apps.get_model(app, operation.model_name)._meta.get_field(operation.name) for state in (before, after))
    if old.many_to_many or new.many_to_many:
        return []
    field, result = f"{app}.{operation.model_name}.{operation.name}", []
    types = [each.db_parameters(connection)["type"] or "" for each in (old, new)]
    if not wider(types[1], types[0]):
        result.append(f"values of {field} that do not fit {types[0]} are cut, rounded or refused")
    if new.null and not old.null:
        result.append(f"rows without {field} get its default or are refused")
    return result


def digest_of(pending: list[dict[str, Any]]) -> str:
    """SHA-256 of what would run; an approval ends here (filter_plugins/migrations.py has the same)."""
    content = [{key: entry[key] for key in ("database", "app", "name", "operations", "sql")} for entry in pending]
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def names(keys: Any) -> list[str]:
    """Migrations as people write them."""
    return [f"{app}.{name}" for app, name in keys]


def plan(databases: list[str], systems: dict[str, str], to: dict[str, dict[str, str]] | None) -> dict[str, Any]:
    """The plan of going forward, or of going back."""
    result: dict[str, Any] = {"databases": {}, "applied": {}, "unknown": {}, "heads": {}, "pending": []}
    for alias in databases:
        release = Release(alias)
        if to is None:
            release.check()
        steps = release.steps(None if to is None else to.get(alias, {}))
        result["databases"][alias] = identify(alias, systems)
        result["applied"][alias] = names(release.applied())
        result["unknown"][alias] = names(release.unknown())
        result["heads"][alias] = release.heads(steps)
        result["pending"] += release.pending(steps) + (release.recorded() if to is None else [])
    return result


def state(databases: list[str], systems: dict[str, str]) -> dict[str, Any]:
    """What this release knows against what the databases have, each by database."""
    result: dict[str, Any] = {key: {} for key in ("databases", "applied", "known", "unknown", "pending", "heads")}
    for alias in databases:
        release = Release(alias)
        steps = release.steps()
        result["databases"][alias] = identify(alias, systems)
        result["applied"][alias] = names(release.applied())
        result["known"][alias] = names(sorted(release.loader.disk_migrations))
        result["unknown"][alias] = names(release.unknown())
        result["pending"][alias] = names((migration.app_label, migration.name) for migration, _backwards in steps)
        result["heads"][alias] = release.heads(steps)
    return result


# --- Running ------------------------------------------------------------------------------------------------------------------------------


class Guard:
    """A second session on a database: it holds the runner's lock, and sees who holds up the first one."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.connection = connect(alias).copy()
        self.connection.inc_thread_sharing()
        self._watched = 0
        self._end = threading.Event()
        self.holder = ""
        [(free,)] = rows(self.connection, "SELECT pg_try_advisory_lock(%s, %s)", ADVISORY_LOCK)
        if not free:
            raise Refused(f"another run is migrating {alias}: {self._runner()}; wait for it, or end that session (pg_terminate_backend)")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _runner(self) -> str:
        found = rows(
            self.connection,
            "SELECT pid, coalesce(host(client_addr), 'this host'), to_char(backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') "
            "FROM pg_locks LEFT JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND granted AND classid = %s AND objid = %s "
            "AND objsubid = 2 AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            ADVISORY_LOCK,
        )
        if not found:
            return "it has just ended"
        pid, address, since = found[0]
        return f"pid {pid} from {address}, since {since} UTC"

    def watch(self, connection: Any) -> None:
        """From now on look who holds up this session."""
        [(self._watched,)] = rows(connection, "SELECT pg_backend_pid()")
        self.holder = ""

    def _watch(self) -> None:
        query = (
            "SELECT pid, state, coalesce(host(client_addr), 'this host'), query "
            "FROM pg_stat_activity WHERE pid = ANY(pg_blocking_pids(%s)) ORDER BY xact_start LIMIT 1"
        )
        while not self._end.wait(0.2):
            try:
                for pid, doing, address, text in rows(self.connection, query, [self._watched]) if self._watched else []:
                    self.holder = f"pid {pid} from {address} ({doing}: {without_values(text)[:80]})" if doing else f"pid {pid}"
            except Exception:  # it is about a hint only; a lost server is seen by who works with it
                return

    def close(self) -> None:
        """Let the lock go."""
        self._end.set()
        self._thread.join()
        self.connection.close()


class Runner:
    """Applies or reverses, and remembers what was done."""

    def __init__(self, tries: int, statement_timeout_seconds: float) -> None:
        self.tries = tries
        self.statement_timeout_seconds = statement_timeout_seconds
        self.done: list[dict[str, Any]] = []
        self.partial: list[dict[str, Any]] = []
        self.total = 0
        self.stopped_at = ""
        self.attempt = 0

    def run(self, release: Release, guard: Guard, steps: list[tuple[Any, bool]], *, going_back: bool) -> None:
        """Run the steps of one database, with the signals that Django's migrate sends."""
        from django.core.management import call_command
        from django.core.management.sql import emit_post_migrate_signal, emit_pre_migrate_signal

        if not steps and (going_back or not release.squashes()):
            return
        before = set(release.applied())
        executor, alias, silent = release.executor, release.alias, {"verbosity": 0, "interactive": False}
        release.connection.prepare_database()
        executor.recorder.ensure_schema()
        state = release.state()
        emit_pre_migrate_signal(**silent, db=alias, apps=state.apps, plan=steps)
        states = release.states_before([migration for migration, _ in steps]) if going_back else {}
        for migration, _ in steps:
            if going_back:
                self._step(
                    release, guard, migration, lambda each=migration: executor.unapply_migration(states[each], each), going_back=True
                )
            else:
                apply = lambda each=migration, now=state: executor.apply_migration(now.clone(), each)  # noqa: E731
                state = self._step(release, guard, migration, apply, going_back=False)
        self.stopped_at = f"{alias}: the signals after migrations"

        def finish() -> None:
            if going_back:
                emit_post_migrate_signal(**silent, db=alias, apps=Release(alias).state().apps, plan=steps)
            else:
                call_command("migrate", **silent, database=alias, skip_checks=True)  # nothing is pending: what Django does at its end

        try:
            self._patiently(release, guard, "the signals after migrations", finish, self.tries)
        except Exception as error:  # the next plan is empty, so no next run would do it
            where = "of the release that this went back to" if going_back else "of this release"
            text = f"{alias}: all migrations are {'reversed' if going_back else 'done'}, but not what Django does after them"
            command = f"python -m django migrate --database {alias} in the environment {where}"
            raise Refused(f"{text} ({self._what(error, guard)}): type {command}") from error
        if not going_back:
            run = {(entry["app"], entry["name"]) for entry in self.done if entry["database"] == alias}
            for app, name in release.applied():
                if (app, name) not in before | run:  # a squash of what was applied before, or what is replaced by one that ran
                    self.done.append({"database": alias, "app": app, "name": name, "seconds": 0.0, "recorded": True})
        self.stopped_at = ""

    def _step(self, release: Release, guard: Guard, migration: Any, act: Any, *, going_back: bool) -> Any:
        """One migration, again after a lock time-out, unless some of it would stay."""
        connection, name = release.connection, f"{migration.app_label}.{migration.name}"
        self.stopped_at = name
        undone = migration.atomic or all_or_nothing(migration)
        self.partial = [] if undone else [{"database": release.alias, "app": migration.app_label, "name": migration.name}]
        built, alone = concurrent_work(migration, going_back=going_back)
        refuse_invalid_indexes(connection, migration, built)
        limits = [(each, rows(connection, "SELECT current_setting(%s)", [each])[0][0]) for each in ("lock_timeout", "statement_timeout")]

        def try_once() -> tuple[Any, float]:
            rows_set(connection, "application_name", f"evenkeel migrate {name}"[:63])
            started = time.monotonic()
            try:
                prepare_concurrent(connection, built, alone=alone)
                return act(), round(time.monotonic() - started, 3)
            finally:
                for limit in limits:  # the migration may have set its own, too
                    rows_set(connection, *limit)

        try:
            result, seconds = self._patiently(release, guard, name, try_once, self.tries if undone else 1)
        except Exception as error:  # the database's, or the application's own code
            raise Refused(self._why(connection, name, built, error, guard)) from error
        say(f"{release.alias} {name} … {seconds:.1f} s")
        self.done.append({"database": release.alias, "app": migration.app_label, "name": migration.name, "seconds": seconds})
        self.partial = []
        return result

    def _patiently(self, release: Release, guard: Guard, name: str, act: Any, tries: int) -> Any:
        """Do it, again after a lock time-out and the like."""
        for attempt in range(1, tries + 1):
            self.attempt = attempt
            guard.watch(release.connection)
            try:
                return act()
            except DatabaseError as error:
                reason = TRIED_AGAIN.get(sqlstate(error), "")
                if not reason or attempt == tries:
                    raise
            pause = min(PAUSE_LIMIT_SECONDS, 2 ** (attempt - 1)) * random.uniform(0.75, 1.25)
            held = f"waits for a lock held by {guard.holder}" if guard.holder else f"was stopped by a {reason}"
            say(f"{release.alias} {name} {held}, try {attempt + 1} of {tries} in {pause:.0f} s")
            time.sleep(pause)
        raise AssertionError("the loop returns or raises")

    def _what(self, error: Exception, guard: Guard) -> str:
        """What failed, for people."""
        state = sqlstate(error)
        if state in TRIED_AGAIN:
            held = f", the lock is held by {guard.holder}" if guard.holder else ""
            return f"{TRIED_AGAIN[state]} in {self.attempt} {'try' if self.attempt == 1 else 'tries'}{held}"
        if state == CANCELED:
            return f"it took longer than the {self.statement_timeout_seconds:.0f} s of the statement time-out"
        return one_line(error) if isinstance(error, DatabaseError | Refused) else f"{type(error).__name__}: {one_line(error)}"

    def _why(self, connection: Any, name: str, built: dict[str, bool], error: Exception, guard: Guard) -> str:
        """One sentence or two: what failed, what stayed, what the next run does."""
        stays = "it is not atomic, so what it did before the error stays" if self.partial else "nothing of it stays"
        with suppress(DatabaseError, InterfaceError):  # a lost session tells nothing
            found = [(*index_found(connection, index), once) for index, once in built.items()]
            broken = ", ".join(index for index, valid, _once in found if index and not valid)
            if broken and not isinstance(error, Refused):
                stays = f"{stays}, also" if self.partial else "all that stays is"
                stays += f" the invalid index {broken}, which the next run drops"
            again = "; ".join(f"DROP INDEX CONCURRENTLY {index}" for index, valid, once in found if valid and once)
            if again:
                stays += f"; it would build again what is there; when an earlier try built it, type first: {again}"
        done = len([entry for entry in self.done if not entry.get("recorded")])
        text = f"{connection.alias} {name}: {self._what(error, guard)}; {stays}"
        return f"{text}. {done} of {self.total} migrations are done; the next run continues with this one"


def in_the_end(operations: Any) -> list[Any]:
    """Operations as they reach the database: those inside SeparateDatabaseAndState instead of it."""
    from django.db.migrations import SeparateDatabaseAndState

    result = []
    for operation in operations:
        result += in_the_end(operation.database_operations) if type(operation) is SeparateDatabaseAndState else [operation]
    return result


def statements_of(sql: Any) -> list[str]:
    """The statements of a RunSQL: a text, or a list of texts and of (text, parameters)."""
    texts = [sql] if isinstance(sql, str) else [each if isinstance(each, str) else each[0] for each in sql or ()]
    return [flat(statement) for text in texts for statement in sqlparse.split(text)]


def concurrent_work(migration: Any, *, going_back: bool) -> tuple[dict[str, bool], bool]:
    """The indexes that a migration builds beside the traffic, each with whether a second build fails; whether such work is all it does."""
    from django.contrib.postgres.operations import AddIndexConcurrently, RemoveIndexConcurrently
    from django.db.migrations import RunSQL

    built: dict[str, bool] = {}
    kinds = set()
    for operation in in_the_end(migration.operations):
        if isinstance(operation, RunSQL):
            for statement in statements_of(operation.reverse_sql if going_back else operation.sql):
                found = BUILT_INDEX.match(statement)
                if found:
                    schema = bare(found["name"]).rpartition(".")[0]
                    built[f"{schema}.{bare(found['index'])}".lstrip(".")] = not found["unless"]
                dropped = DROPPED_INDEX.match(statement)
                concurrent = found or (dropped and dropped["concurrently"])
                setting = re.match(r"(SET|RESET)\b", statement, re.IGNORECASE)
                kinds |= {"concurrent"} if concurrent else set() if setting else {"other"}
            continue
        if isinstance(operation, RemoveIndexConcurrently if going_back else AddIndexConcurrently):
            built[operation.name if going_back else operation.index.name] = True
        kinds.add("concurrent" if type(operation) in (AddIndexConcurrently, RemoveIndexConcurrently) else "other")
    return built, kinds == {"concurrent"}


def index_found(connection: Any, name: str) -> tuple[str, bool]:
    """An index as SQL names it, and whether it is valid; ("", False) when there is none."""
    found = rows(
        connection, "SELECT indexrelid::regclass::text, indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)", [quoted(name)]
    )
    return found[0] if found else ("", False)


def prepare_concurrent(connection: Any, built: dict[str, bool], *, alone: bool) -> None:
    """Before an index is built or dropped beside the traffic: wait for locks without end, and drop what a broken try left.

    Such work waits for running transactions without holding anybody up, and a time-out would leave an invalid index. The statement
    time-out still ends it. What else the migration does holds others up, so with it the time-out stays.
    """
    if alone:
        rows_set(connection, "lock_timeout", "0")
    for index in built:
        name, valid = index_found(connection, index)
        if name and not valid:
            say(f"drops the invalid index {name}, which a broken run left")
            with connection.cursor() as cursor:
                cursor.execute(f"DROP INDEX CONCURRENTLY {name}")


def refuse_invalid_indexes(connection: Any, migration: Any, built: dict[str, bool]) -> None:
    """Let a migration fail, before Django records it, when an index that it builds is invalid in the end."""
    if not built:
        return

    def checked(work: Any) -> Any:
        def work_and_look(*what: Any, **more: Any) -> Any:
            result = work(*what, **more)
            for index in built:
                name, valid = index_found(connection, index)
                if name and not valid:
                    drop = f"type DROP INDEX CONCURRENTLY {name} and deploy again"
                    raise Refused(f"the index {name} is still invalid, so no query uses it: {drop}")
            return result

        return work_and_look

    migration.apply, migration.unapply = checked(migration.apply), checked(migration.unapply)


def rows_set(connection: Any, name: str, value: str) -> None:
    """Set a setting of the session; a lost session needs none. Not `is_usable()`: an application may say there that it wants to write."""
    with suppress(DatabaseError, InterfaceError):
        rows(connection, "SELECT set_config(%s, %s, false)", [name, value])


def say(text: str) -> None:
    """Progress, for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def run(options: argparse.Namespace, to: dict[str, dict[str, str]] | None) -> dict[str, Any]:
    """Apply or reverse; the result as JSON."""
    runner = Runner(options.tries, options.statement_timeout_seconds)
    guards: list[Guard] = []
    result: dict[str, Any] = {"outcome": "succeeded", "why": "", "migrations": runner.done, "stopped_at": "", "heads": {}}
    try:
        for alias in options.databases:
            guards.append(Guard(alias))
        work = []
        for alias in options.databases:
            release = Release(alias)
            if to is None:
                release.check()
            work.append((release, release.steps(None if to is None else to.get(alias, {}))))
        if options.expect is not None:
            pending = []
            for release, steps in work:
                rows_set(release.connection, "default_transaction_read_only", "on")  # as the plan was made
                pending += release.pending(steps) + (release.recorded() if to is None else [])
                rows_set(release.connection, "default_transaction_read_only", "off")
            if digest_of(pending) != options.expect:
                raise Refused("what is pending now is not what was approved, so nothing was applied; look at the plan again")
        irreversible = [f"{step.app_label}.{step.name}" for _, steps in work for step, back in steps if back and not reversible(step)]
        if irreversible:
            raise Refused(f"{irreversible[0]} cannot be reversed, so nothing was changed")
        runner.total = sum(len(steps) for _, steps in work)
        for (release, steps), guard in zip(work, guards, strict=True):
            runner.run(release, guard, steps, going_back=to is not None)
    except Refused as error:
        result |= {"outcome": "failed", "why": str(error), "stopped_at": runner.stopped_at}
    except KeyboardInterrupt:
        why = f"it was interrupted; {len(runner.done)} of {runner.total} migrations are done, and the next run continues"
        result |= {"outcome": "failed", "why": why, "stopped_at": runner.stopped_at}
    except Exception as error:
        where = f"{runner.stopped_at}: " if runner.stopped_at else ""
        result |= {"outcome": "failed", "why": f"{where}{type(error).__name__}: {one_line(error)}", "stopped_at": runner.stopped_at}
    finally:
        for guard in guards:
            guard.close()
    result["partial"] = runner.partial
    for alias in options.databases:
        try:
            result["heads"][alias] = Release(alias).heads([])
        except Exception as error:  # a lost database; what was done is still worth telling
            say(f"{alias}: its state is not known: {one_line(error)}")
    return result


def all_or_nothing(migration: Any) -> bool:
    """Whether a migration without a transaction has one operation that is one statement, or has a transaction of its own."""
    from django.contrib.postgres import operations as postgres
    from django.db.migrations import operations as kinds

    operations = in_the_end(migration.operations)
    if len(operations) != 1:
        return False
    kind = type(operations[0])
    if kind is kinds.RunPython:
        return operations[0].atomic is True
    return any(kind is getattr(module, name, None) for module in (kinds, postgres) for name in ONE_STATEMENT)  # not what inherits from it


def reversible(migration: Any) -> bool:
    """Whether all of a migration can be undone."""
    return all(operation.reversible for operation in migration.operations)


# --- The command line ---------------------------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="django_migrations", description="The migrations of a Django application on PostgreSQL.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("plan", "apply", "state", "reversal", "reverse"):
        command = commands.add_parser(name)
        command.add_argument("databases", nargs="+", metavar="DATABASE", help="a name in Django's DATABASES")
        command.add_argument("--settings", help="Django's settings module, when the environment does not name it")
        command.add_argument("--system", action="append", default=[], metavar="DATABASE=ID", help="system identifier of its PostgreSQL")
        command.add_argument("--lock-timeout-seconds", type=float, default=5)
        command.add_argument("--statement-timeout-seconds", type=float, default=900 if name in ("apply", "reverse") else 60)
        if name in ("reversal", "reverse"):
            command.add_argument("--to", type=json.loads, required=True, metavar="JSON", help='{"DATABASE": {"APP": "MIGRATION" | "zero"}}')
        if name in ("apply", "reverse"):
            command.add_argument("--expect", metavar="DIGEST", help="refuse when what is pending is not this")
            command.add_argument("--tries", type=int, default=5)
    return parser.parse_args(argv)


def interruptible() -> bool:
    """Whether the driver lets a signal end a statement: psycopg 3 does."""
    try:
        from django.db.backends.postgresql.psycopg_any import is_psycopg3
    except ImportError:
        return False
    return bool(is_psycopg3)


def main(argv: list[str]) -> int:
    """Set Django up, do as told, print JSON."""
    options = parse(argv)
    if options.settings:
        os.environ["DJANGO_SETTINGS_MODULE"] = options.settings
    acting = options.command in ("apply", "reverse")
    prepare_sessions(options.lock_timeout_seconds, options.statement_timeout_seconds, read_only=not acting)
    systems = dict(each.split("=", 1) for each in options.system)
    try:
        django.setup()
        if interruptible():
            signal.signal(
                signal.SIGTERM, signal.default_int_handler
            )  # so that what was done is told; else PostgreSQL sees that we are gone
        if acting:
            result = run(options, getattr(options, "to", None))
        elif options.command == "state":
            result = state(options.databases, systems)
        else:
            result = plan(options.databases, systems, getattr(options, "to", None))
    except Refused as error:
        sys.exit(f"{options.command}: {one_line(error)}")
    except Exception as error:  # the application's own code, or a lost database
        sys.exit(f"{options.command}: {type(error).__name__}: {one_line(error)}")
    print(json.dumps(result), flush=True)
    return 0 if result.get("outcome", "succeeded") == "succeeded" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

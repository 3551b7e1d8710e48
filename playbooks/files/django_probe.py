"""Can this release of a Django application read and write the databases as they are? It needs nothing of the application.

    python - DATABASE... [--settings MODULE]

For each model of each database it reads one row with all its columns, and writes a copy of that row in a transaction that is rolled
back. A column that the database wants and the model does not know is found without a row, too. The last line on standard output is
JSON: {"<database> <app>.<Model>": problem, empty when there is none}.
"""

import argparse
import json
import os

import django
from django.apps import apps
from django.db import connections, models, router, transaction
from django.db.models.sql import InsertQuery

# A copy of a row violates what makes rows unique; that says nothing about the release.
UNIQUE_VIOLATION, EXCLUSION_VIOLATION = "23505", "23P01"
WANTED = """
SELECT column_name FROM information_schema.columns
WHERE table_schema = ANY (current_schemas(false)) AND table_name = %s AND is_nullable = 'NO' AND column_default IS NULL
  AND is_identity = 'NO' AND is_generated = 'NEVER'
"""


def sqlstate(error: BaseException) -> str:
    """PostgreSQL's code of an error, whichever driver it came through."""
    cause = error.__cause__ or error
    return str(getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None) or "")


def words(error: BaseException) -> str:
    """The first line of an error."""
    return " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())


def unknown_columns(database: str, model: type[models.Model]) -> str:
    """Columns that every new row must have, and that the model does not write."""
    with connections[database].cursor() as cursor:
        cursor.execute(WANTED, [model._meta.db_table])
        wanted = {row[0] for row in cursor.fetchall()}
    own = {field.column for field in model._meta.local_concrete_fields}
    names = ", ".join(sorted(wanted - own))
    return f"new rows must have a value in {names}, which this release does not write" if names else ""


def write(database: str, row: models.Model) -> None:
    """Insert a copy of a row, without signals, and take it back."""
    keeps = (models.AutoField, models.BigAutoField, models.SmallAutoField)
    fields = [field for field in row._meta.local_concrete_fields if not isinstance(field, keeps) and not getattr(field, "generated", False)]
    with transaction.atomic(using=database):
        query = InsertQuery(type(row))
        query.insert_values(fields, [row], raw=True)
        query.get_compiler(using=database).execute_sql()
        transaction.set_rollback(True, using=database)


def problem_of(database: str, model: type[models.Model]) -> str:
    """What is wrong with a model on a database, empty when nothing is."""
    try:
        with transaction.atomic(using=database):
            row = model._base_manager.using(database).first()
    except Exception as error:  # a field of the application's own may raise anything
        return f"reading fails: {words(error)}"
    problem = unknown_columns(database, model)
    if problem or row is None:
        return problem
    try:
        write(database, row)
    except Exception as error:
        return "" if sqlstate(error) in (UNIQUE_VIOLATION, EXCLUSION_VIOLATION) else f"writing fails: {words(error)}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("databases", nargs="+")
    parser.add_argument("--settings")
    options = parser.parse_args()
    if options.settings:
        os.environ["DJANGO_SETTINGS_MODULE"] = options.settings
    django.setup()
    found = {}
    for database in options.databases:
        for model in apps.get_models(include_auto_created=True):
            if model._meta.managed and not model._meta.proxy and router.allow_migrate_model(database, model):
                found[f"{database} {model._meta.label}"] = problem_of(database, model)
    print(json.dumps(found))


main()

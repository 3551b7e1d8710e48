"""Plan or apply the migrations of any Django application, in the environment of one of its releases.

    python - plan DATABASE...     print the pending migrations as JSON; changes nothing
    python - apply DATABASE...    apply them, printing what Django says

The JSON: {"pending": [{"database", "app", "name", "operations": [str], "reversible": bool}], "fingerprint": str}. The fingerprint
names exactly this list of migrations with their operations; another list has another one.
"""

import hashlib
import json
import sys

import django
from django.core.management import call_command
from django.db import connections
from django.db.migrations.executor import MigrationExecutor


def pending(database: str) -> list[dict[str, object]]:
    """The migrations of one database that are not applied, in the order in which Django would apply them."""
    executor = MigrationExecutor(connections[database])
    conflicts = executor.loader.detect_conflicts()
    if conflicts:
        sys.exit(f"conflicting migrations in {', '.join(sorted(conflicts))}: merge them (makemigrations --merge) and release again")
    executor.loader.check_consistent_history(connections[database])
    steps = executor.migration_plan(executor.loader.graph.leaf_nodes())
    return [
        {
            "database": database,
            "app": migration.app_label,
            "name": migration.name,
            "operations": [operation.describe() for operation in migration.operations],
            "reversible": all(operation.reversible for operation in migration.operations),
        }
        for migration, _backwards in steps
    ]


def main(action: str, databases: list[str]) -> None:
    django.setup()
    if action == "apply":
        for database in databases:
            call_command("migrate", database=database, interactive=False, verbosity=1)
        return
    steps = [step for database in databases for step in pending(database)]
    digest = hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).hexdigest()
    print(json.dumps({"pending": steps, "fingerprint": digest[:16]}))


main(sys.argv[1], sys.argv[2:])

"""Two databases: every app stays on its own."""

import pytest
from django.db import connections

from drydock.jobs.models import Job
from platform_servers import Servers

TABLES = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"


def tables(servers: Servers, cluster: str) -> set[str]:
    return {name for (name,) in servers.sql(cluster, TABLES)}


def test_the_router_keeps_every_app_on_its_database(servers: Servers) -> None:
    core, plugins = tables(servers, "core"), tables(servers, "plugins")
    jobs = {"jobs_job", "jobs_tally", "jobs_latency", "jobs_heartbeat"}
    own = {"exports_export", "processor_script", "processor_processor", "uploads_upload"}
    assert plugins == {"django_migrations"} | own | jobs
    assert {"jobs_job", "documents_document", "documents_revision", "accounts_user", "django_session"} <= core
    assert {"learning_unit", "learning_attempt", "learning_photo", "learning_availability"} <= core
    assert "exports_export" not in core


def test_models_and_migrations_agree(servers: Servers) -> None:
    ended = servers.drydock("makemigrations", "--check", "--dry-run")
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("database", ["core", "plugins", "default"])
def test_nothing_is_left_to_migrate(servers: Servers, database: str) -> None:
    ended = servers.drydock("migrate", "--plan", "--database", database)
    assert "No planned migration operations" in ended.stdout, ended.stdout + ended.stderr


def test_a_job_without_a_database_is_an_error_and_not_a_guess() -> None:
    with pytest.raises(LookupError, match="say which"):
        Job.objects.count()


def test_the_deployment_checks_are_clean(servers: Servers) -> None:
    ended = servers.drydock(
        "check", "--deploy", "--fail-level", "WARNING", "--database", "core", "--database", "plugins"
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("alias", ["core", "plugins"])
def test_a_process_that_is_frozen_in_a_transaction_loses_its_locks(alias: str) -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute("SHOW idle_in_transaction_session_timeout")
        assert cursor.fetchone() == ("1min",)

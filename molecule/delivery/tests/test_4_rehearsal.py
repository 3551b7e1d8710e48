"""A rehearsal on copies of the newest backups finds what would hurt, and nothing of it touches what is live (V1)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import MIGRATIONS, MODELS, Build, Hosts, deployed, entries, migration, models_with_note, playbook, state_of
from suite import ROOT, Run

ADD = 'migrations.AddField("document", "note", models.TextField(null=True))'
DROP = 'migrations.RemoveField("document", "note")'
ROWS = 1_000_000
#: A million rows, of which two are the same.
MEASURED = (
    f"create table measured as select n, md5(n::text) as name from generate_series(1, {ROWS}) n; update measured set n = 1 where n = 7"
)


def on_core(hosts: Hosts, sql: str) -> str:
    return str(hosts["web-1"].check_output(f'runuser -u postgres -- psql -p 5432 -qAtc "{sql}" drydock'))


@pytest.fixture(scope="module")
def noted(hosts: Hosts, build: Build, last: str) -> str:
    """The release that runs: it has a column more than HEAD. Whatever other tests left of it in the database is gone."""
    for port, also in (("5432", "; alter table documents_document drop column if exists note, drop column if exists flag"), ("5433", "")):
        sql = f"delete from django_migrations where name like '9%'{also}"
        hosts["web-1"].check_output(f'runuser -u postgres -- psql -p {port} -qAtc "{sql}" drydock')
    release = build({f"{MIGRATIONS}/9401_note.py": migration(last, ADD), MODELS: models_with_note()})
    run = deployed(release)
    assert run.code == 0, run.output[-5000:]
    return release


@pytest.fixture(scope="module")
def measured(hosts: Hosts) -> Iterator[None]:
    """A table of a million rows among the live data."""
    on_core(hosts, f"{MEASURED}; alter table measured owner to drydock")
    on_core(hosts, "select pg_switch_wal()")  # a copy has what has been archived
    yield
    on_core(hosts, "drop table measured")


def beyond(build: Build, last: str, name: str, operation: str) -> str:
    """A release with one migration more than the one that runs."""
    texts = {"9401_note": migration(last, ADD), name: migration("9401_note", operation)}
    models = (ROOT / MODELS).read_text() if operation == DROP else models_with_note()
    return build({**{f"{MIGRATIONS}/{each}.py": text for each, text in texts.items()}, MODELS: models})


def rehearsed(hosts: Hosts, release: str, *arguments: str) -> Run:
    """A rehearsal, which must leave everything that is live alone."""
    before = state_of(hosts)
    run = playbook("rehearse", "-e", f"release={release}", *arguments)
    assert state_of(hosts) == before
    copies = hosts["web-2"].check_output("find /var/lib/evenkeel/backup -maxdepth 1 -type d -name 'rehearsal-*'")
    assert copies == "", "no copy is left"
    return run


def found(hosts: Hosts, run: Run, release: str, *sentences: str) -> None:
    assert run.code != 0
    for words in (*sentences, "Nothing was changed: it ran on copies"):
        assert words in run.text, f"{words!r} is not in:\n{run.output[-5000:]}"
    entry = entries(hosts)[-1]
    assert (entry["kind"], entry["release"], entry["outcome"]) == ("rehearsal", release, "failed")


def test_a_migration_that_breaks_the_release_that_runs_is_found(hosts: Hosts, noted: str, build: Build, last: str) -> None:
    release = beyond(build, last, "9402_drop", DROP)
    run = rehearsed(hosts, release)
    told = f"the running release {noted} does not work on the migrated copy"
    found(hosts, run, release, told, "documents.Document", "column documents_document.note does not exist")


def test_a_lock_on_a_million_rows_beyond_the_limit_is_found(hosts: Hosts, noted: str, build: Build, last: str, measured: None) -> None:
    rewrite = 'migrations.RunSQL("ALTER TABLE measured ALTER COLUMN n TYPE numeric, ALTER COLUMN name TYPE varchar(40)")'
    release = beyond(build, last, "9403_rewrite", rewrite)
    run = rehearsed(hosts, release, "-e", "migrate_lock_limit_seconds=0.1")
    found(hosts, run, release, "documents.9403_rewrite holds AccessExclusiveLock on public.measured", f"with {ROWS} rows")


def test_a_migration_that_fails_on_real_data_is_found(hosts: Hosts, noted: str, build: Build, last: str, measured: None) -> None:
    unique = 'migrations.RunSQL("CREATE UNIQUE INDEX measured_n ON measured (n)")'
    release = beyond(build, last, "9404_unique", unique)
    run = rehearsed(hosts, release)
    found(hosts, run, release, "could not create unique index", "Key (n)=(…) is duplicated")


def test_a_migration_that_hurts_nobody_passes_and_the_deploy_of_that_plan_takes_its_word(
    hosts: Hosts, noted: str, build: Build, last: str
) -> None:
    release = beyond(build, last, "9405_more", ADD.replace('"note"', '"more"'))
    run = rehearsed(hosts, release)
    assert run.code == 0, run.output[-5000:]
    assert f"rehearsal of {release}" in run.text
    entry = entries(hosts)[-1]
    assert (entry["kind"], entry["release"], entry["outcome"]) == ("rehearsal", release, "passed")
    run = deployed(release, "-e", "rehearse=yes")
    assert run.code == 0, run.output[-5000:]
    assert [each["kind"] for each in entries(hosts) if each.get("release") == release].count("rehearsal") == 1

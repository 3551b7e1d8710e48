"""Which way back each kind of migration leaves, as a table for docs/reference/rollbacks.md; and the rehearsal that says so beforehand."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from conftest import (
    KEPT,
    MIGRATIONS,
    MODELS,
    Build,
    Hosts,
    current,
    deployed,
    entries,
    migration,
    models_with_note,
    plan,
    playbook,
    state_of,
)
from suite import ROOT, STATE

ADD = 'migrations.AddField("document", "note", models.TextField(null=True))'
DROP = 'migrations.RemoveField("document", "note")'
IRREVERSIBLE = "migrations.RunPython(shorten)"
SHORTEN = '''

def shorten(apps, _editor):
    """Change data for good."""
    for document in apps.get_model("documents", "Document").objects.using("core").iterator():
        document.title = document.title[:3]
        document.save(update_fields=["title"])

'''
RAISES = '''

def stop(_apps, _editor):
    """Fail on what real data have."""
    raise ValueError("row 7 has no owner")

'''
TITLES = ("case", "verdict", "reason", "outcome")


class Table:
    """What was seen, row by row."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []

    def add(self, case: str, output: str, outcome: str) -> None:
        """A row for a rollback, with the verdict that it printed."""
        told = re.search(r"verdict: (\w+): (.*?)(?: TASK | PLAY )", " ".join(output.split()))
        verdict, reason = (told.group(1), told.group(2).strip(" '*")) if told else ("none", "it was not asked")
        self.rows.append((case, verdict, re.sub(r"\d+\.\d+\.\d+-[0-9a-f]{12}", "R", reason), outcome))


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    """Printed and kept at the end."""
    one = Table()
    yield one
    lines = [f"| {' | '.join(row)} |" for row in (TITLES, ("---",) * len(TITLES), *one.rows)]
    folder = STATE / "deliveries"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rollbacks.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def columns(hosts: Hosts) -> str:
    sql = "select column_name from information_schema.columns where table_name = 'documents_document' order by 1"
    return str(hosts["web-1"].check_output(f'runuser -u postgres -- psql -p 5432 -Atc "{sql}" drydock'))


@pytest.fixture(scope="module")
def added(build: Build, last: str) -> str:
    return build({f"{MIGRATIONS}/9101_note.py": migration(last, ADD), MODELS: models_with_note()})


@pytest.fixture(scope="module")
def dropped(build: Build, added: str) -> str:
    return build({f"{MIGRATIONS}/9102_no_note.py": migration("9101_note", DROP), MODELS: (ROOT / MODELS).read_text()}, added)


def test_an_added_column_is_no_hindrance(hosts: Hosts, first: str, added: str, table: Table) -> None:
    run = deployed(added)
    assert run.code == 0, run.output[-5000:]
    back = playbook("rollback")
    assert back.code == 0, back.output[-5000:]
    assert current(hosts) == [first, first]
    table.add("a column was added (it may be null)", back.output, "code back at once; the column stays")
    assert table.rows[-1][1] == "allow"
    assert "note" in columns(hosts).split()


def test_a_dropped_column_comes_back_only_by_an_approved_plan(hosts: Hosts, first: str, added: str, dropped: str, table: Table) -> None:
    run = deployed(dropped)
    assert run.code == 0, run.output[-5000:]
    assert "note" not in columns(hosts).split()
    before = state_of(hosts)
    refused = playbook("rollback", "-e", f"release={added}")
    assert refused.code != 0
    assert f"-e release={added} -e reversal_approved={plan()['fingerprint']}" in refused.text, refused.output[-4000:]
    table.add("a column was dropped", refused.output, "refused until its reversal is approved")
    assert table.rows[-1][1] == "approval"

    refused = playbook("rollback", "-e", f"release={first}")
    assert refused.code != 0
    assert state_of(hosts) == before
    back = playbook("rollback", "-e", f"release={first}", "-e", f"reversal_approved={plan()['fingerprint']}")
    assert back.code == 0, back.output[-5000:]
    assert current(hosts) == [first, first]
    assert "note" in columns(hosts).split()
    table.add(
        "two releases back: one added the column, one dropped it", back.output, "approved: the column came back, empty, then the code"
    )


def test_changed_data_that_cannot_be_changed_back_keep_the_release(hosts: Hosts, first: str, build: Build, table: Table, last: str) -> None:
    changes = {f"{MIGRATIONS}/9201_titles.py": migration("9101_note", IRREVERSIBLE, SHORTEN), MODELS: models_with_note()}
    released = build({**changes, f"{MIGRATIONS}/9101_note.py": migration(last, ADD)})
    run = deployed(released)
    assert run.code == 0, run.output[-5000:]
    before = state_of(hosts)
    back = playbook("rollback", "-e", f"release={first}")
    assert back.code != 0
    assert "cannot be reversed" in back.text
    assert state_of(hosts) == before
    table.add("data were changed by a migration that cannot be reversed", back.output, "refused, nothing changed: roll forward or restore")
    assert table.rows[-1][1] == "refuse"


def test_migrations_that_fail_midway_say_what_is_applied_and_go_on_from_there(hosts: Hosts, build: Build, table: Table) -> None:
    running = current(hosts)[0]
    base = {f"{MIGRATIONS}/9301_flag.py": migration("9201_titles", ADD.replace('"note"', '"flag"'))}
    bad = build({**base, f"{MIGRATIONS}/9302_stop.py": migration("9301_flag", "migrations.RunPython(stop)", RAISES)}, running)
    run = deployed(bad)
    assert run.code != 0
    assert "row 7 has no owner" in run.text, run.output[-4000:]
    assert "documents.9301_flag (core)" in run.text, run.output[-4000:]
    assert "No host was switched" in run.text
    assert current(hosts) == [running, running]
    (entry,) = [entry for entry in entries(hosts) if entry["kind"] == "migration" and entry["release"] == bad]
    assert (entry["outcome"], [each["name"] for each in entry["migrations"]]) == ("failed", ["9301_flag"])
    row = ("migrations failed midway", "none", "no host was switched", "the release before runs on; the next plan has only what is left")
    table.rows.append(row)
    mended = build({f"{MIGRATIONS}/9302_stop.py": migration("9301_flag", "")}, bad)
    run = deployed(mended)
    assert run.code == 0, run.output[-5000:]
    left = [("core", "9302_stop"), ("plugins", "9301_flag"), ("plugins", "9302_stop")]
    assert [(entry["database"], entry["name"]) for entry in plan()["pending"]] == left
    assert current(hosts) == [mended, mended]
    assert (KEPT / "ledger-head.json").exists()

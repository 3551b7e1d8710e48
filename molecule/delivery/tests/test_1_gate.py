"""The gate (V2): nothing runs that nobody approved, and an approval is of exactly one plan, once."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import MIGRATIONS, MODELS, Build, Hosts, current, entries, migration, models_with_note, plan, playbook, state_of
from suite import Run

ADD = 'migrations.AddField("document", "note", models.TextField(null=True))'
DROP = 'migrations.RemoveField("document", "note")'


@pytest.fixture(scope="module")
def added(build: Build, last: str) -> str:
    """A release with one more column, which the release before it can live with."""
    return build({f"{MIGRATIONS}/9001_note.py": migration(last, ADD), MODELS: models_with_note()})


@pytest.fixture(scope="module")
def other(build: Build, last: str) -> str:
    """Another release with a migration of its own."""
    return build({f"{MIGRATIONS}/9001_other.py": migration(last, ADD.replace('"note"', '"other"'))})


def refused(run: Run, *sentences: str) -> None:
    assert run.code != 0, run.output[-3000:]
    for words in sentences:
        assert words in run.text, f"{words!r} is not in:\n{run.output[-5000:]}"


def test_unapproved_migrations_end_the_deploy_and_nothing_has_changed(hosts: Hosts, added: str) -> None:
    before = state_of(hosts)
    run = playbook("deploy", "-e", f"release={added}")
    refused(run, "documents.9001_note", "Add field note to document", 'ALTER TABLE "documents_document" ADD COLUMN "note" text NULL',
            "ACCESS EXCLUSIVE", f"-e release={added} -e migrations_approved={plan()['fingerprint']}")  # fmt: skip
    assert state_of(hosts) == before
    assert not hosts["web-1"].file("/var/lib/evenkeel/lock.json").exists, "a refusal gives the lock back"


def test_showing_the_plan_is_no_error_and_changes_nothing(hosts: Hosts, added: str) -> None:
    before = state_of(hosts)
    run = playbook("deploy", "-e", f"release={added}", "-e", "gate=plan")
    assert run.code == 0, run.output[-3000:]
    assert plan()["fingerprint"] in run.output
    assert state_of(hosts) == before


def test_an_approval_of_another_plan_is_refused(hosts: Hosts, added: str, other: str) -> None:
    before = state_of(hosts)
    of_added = plan()["fingerprint"]
    run = playbook("deploy", "-e", f"release={other}", "-e", f"migrations_approved={of_added}")
    refused(run, f"the approval {of_added} is for another plan: for the release {added}, not {other}")
    assert state_of(hosts) == before


def test_an_expired_approval_is_refused_and_the_plan_is_shown_anew(hosts: Hosts, added: str) -> None:
    before = state_of(hosts)
    (shown,) = {entry["fingerprint"] for entry in entries(hosts) if entry["kind"] == "plan" and entry["release"] == added}
    run = playbook("deploy", "-e", f"release={added}", "-e", f"migrations_approved={shown}", "-e", "deploy_approval_hours=0")
    refused(run, "the approval has expired")
    assert plan()["fingerprint"] == shown
    assert state_of(hosts) == before


def test_a_plan_that_changes_after_it_was_shown_needs_another_approval(hosts: Hosts, added: str) -> None:
    """Somebody applies a migration by hand meanwhile: what is applied is part of the plan."""
    sql = 'runuser -u postgres -- psql -p 5432 -qAtc "{}" drydock'
    row = "insert into django_migrations (app, name, applied) values ('gone', '0001_by_hand', now())"
    hosts["web-1"].check_output(sql.format(row))
    try:
        run = playbook("deploy", "-e", f"release={added}", "-e", f"migrations_approved={plan()['fingerprint']}")
        refused(run, "is for another plan: this one has changed since that was shown")
    finally:
        hosts["web-1"].check_output(sql.format("delete from django_migrations where app = 'gone'"))


def key(folder: Path, name: str) -> str:
    """A new key; its line for the list of approvers."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    return f"{name} {(folder / f'{name}.pub').read_text().strip()}"


def test_policy_signature_wants_a_second_person_of_the_list(hosts: Hosts, added: str, tmp_path: Path) -> None:
    before = state_of(hosts)
    listed, _ = key(tmp_path, "alice"), key(tmp_path, "mallory")
    policy = json.dumps({"deploy_policy": "signature", "deploy_approvers": [listed]})
    words = ["-e", f"release={added}", "-e", policy]
    run = playbook("deploy", *words, "-e", f"migrations_approved={plan()['fingerprint']}")
    refused(
        run, "a second person whose key is in deploy_approvers types", "ssh-keygen -Y sign -n evenkeel-approval", "-e approval=approval.sig"
    )
    refused(playbook("deploy", *words, "-e", f"approval={signed(tmp_path, 'mallory', added)}"), "not on the list of approvers")
    refused(playbook("deploy", *words, "-e", f"approval={signed(tmp_path, 'alice', 'another-release')}"), "is not for this plan")
    assert state_of(hosts) == before


def signed(folder: Path, name: str, release: str) -> Path:
    """A signature over the newest plan, or over the same words about another release."""
    text = f"evenkeel approval v1\nplatform: delivery\nrelease: {release}\nfingerprint: {plan()['fingerprint']}\n"
    command = ["ssh-keygen", "-q", "-Y", "sign", "-n", "evenkeel-approval", "-f", str(folder / name)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    path = folder / f"{name}-{release}.sig"
    path.write_text(done.stdout)
    return path


def test_a_good_signature_lets_exactly_this_plan_through_and_once(hosts: Hosts, added: str, first: str, last: str, tmp_path: Path) -> None:
    policy = json.dumps({"deploy_policy": "signature", "deploy_approvers": [key(tmp_path, "alice")]})
    used, signature = plan()["fingerprint"], signed(tmp_path, "alice", added)
    run = playbook("deploy", "-e", f"release={added}", "-e", policy, "-e", f"approval={signature}")
    assert run.code == 0, run.output[-5000:]
    assert current(hosts) == [added, added]
    (approval,) = [entry for entry in entries(hosts) if entry["kind"] == "approval" and entry["fingerprint"] == used]
    assert (approval["by"], approval["how"]) == ("alice", "signature")

    # the same plan comes up again once it was reversed by hand; its approval has been used
    back = playbook("rollback", "-e", f"release={first}")
    assert back.code == 0, back.output[-5000:]
    assert "verdict: allow" in back.output
    for database in ("core", "plugins"):
        hosts["web-1"].check_output(f"drydock-run --release {added} python -m django migrate documents {last} --database {database}")
    refused(playbook("deploy", "-e", f"release={added}", "-e", f"migrations_approved={used}"), f"the approval {used} was used at")
    assert plan()["attempt"] == 1, "another approval is needed, for another fingerprint"
    assert current(hosts) == [first, first]

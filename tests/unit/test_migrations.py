"""The migration plan, its approval, and the verdict on the way back."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.evenkeel_review import SQUAWK_OPTIONS, ReviewError, read_findings, sql_to_review
from conftest import load

from filter_plugins import migrations as m

ROOT = Path(__file__).resolve().parents[2]
SHOWN = "2026-11-22T12:00:00+00:00"
NOW = datetime(2026, 11, 22, 13, tzinfo=UTC).timestamp()


def entry(name: str = "0002_note", **more: Any) -> dict[str, Any]:
    return {
        "database": "core",
        "app": "shop",
        "name": name,
        "operations": ["Add field note to item"],
        "sql": ['ALTER TABLE "shop_item" ADD COLUMN "note" text NULL;'],
        "reversible": True,
        "compatible": True,
        "why": "nothing that the release before uses changes",
        "tables": [{"name": "shop_item", "lock": "ACCESS EXCLUSIVE", "rows": 1_234_567}],
        **more,
    }


def raw(*pending: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "databases": {"core": {"system": "7", "name": "shop"}},
        "applied": {"core": ["shop.0001_initial"]},
        "unknown": {"core": []},
        "heads": {"core": {"shop": ["0002_note"]}},
        "pending": list(pending),
        **more,
    }


def complete(plan: dict[str, Any], *entries: dict[str, Any], release: str = "2.0-b", platform: str = "demo") -> dict[str, Any]:
    return m.migration_plan_complete(plan, platform, release, entries)


def ledger(kind: str, seq: int = 1, **data: Any) -> dict[str, Any]:
    return {"seq": seq, "at": SHOWN, "kind": kind, "run": f"deploy-{seq}", "who": "bob@controller", **data}


def shown(plan: dict[str, Any]) -> dict[str, Any]:
    return {**ledger("plan"), **m.migration_plan_entry(plan)}


def ran(plan: dict[str, Any], seq: int = 2) -> dict[str, Any]:
    said = '{"outcome": "failed", "why": "x", "migrations": [], "heads": {}}'
    return {**ledger("migration", seq), **m.migration_entry({"stdout": said}, plan, "point")}


def problem(plan: dict[str, Any], *entries: dict[str, Any], approved: str = "", signature: Any = None, policy: str = "fingerprint") -> str:
    return m.approval_problem(plan, entries, approved, signature or {}, policy, 24, NOW)


# --- fingerprint --------------------------------------------------------------------------------------------------------------------------

PLAN = complete(raw(entry()))


@pytest.mark.parametrize(
    "other",
    [
        complete(raw(entry()), release="2.1-c"),
        complete(raw(entry()), platform="production"),
        complete(raw(entry(), databases={"core": {"system": "8", "name": "shop"}})),
        complete(raw(entry(), applied={"core": []})),
        complete(raw(entry(), entry("0003_x"))),
        complete(raw(entry(sql=["DROP TABLE shop_item;"]))),
        complete(raw(entry(operations=["Something else"]))),
        complete(raw(entry(backwards=True))),
        complete(raw(entry()), ran(PLAN)),
    ],
    ids=["release", "platform", "database", "applied", "more", "sql", "operations", "backwards", "attempt"],
)
def test_another_plan_has_another_fingerprint(other: dict[str, Any]) -> None:
    assert other["fingerprint"] != PLAN["fingerprint"]


def test_same_plan_has_the_same_fingerprint_however_its_tables_grow() -> None:
    grown = entry(tables=[{"name": "shop_item", "lock": "ACCESS EXCLUSIVE", "rows": 5}])
    assert complete(raw(grown))["fingerprint"] == PLAN["fingerprint"]
    assert len(PLAN["fingerprint"]) == 16


# --- approval -----------------------------------------------------------------------------------------------------------------------------


def test_approved_plan_goes_on() -> None:
    assert problem(PLAN, shown(PLAN), approved=PLAN["fingerprint"]) == ""
    assert problem(complete(raw())) == "", "nothing is pending"


def test_unapproved_plan_does_not() -> None:
    assert problem(PLAN, shown(PLAN)) == "nobody has approved it"


def test_plan_that_nobody_saw_does_not() -> None:
    assert "was never shown here" in problem(PLAN, approved=PLAN["fingerprint"])


def test_approval_expires() -> None:
    old = {**shown(PLAN), "at": "2026-11-21T07:00:00+00:00"}
    assert "it was shown" not in problem(PLAN, old, shown(PLAN), approved=PLAN["fingerprint"])
    assert "the plan was shown 30 hours ago, the limit is 24" in problem(PLAN, old, approved=PLAN["fingerprint"])


def test_approval_for_another_plan_says_which() -> None:
    release = complete(raw(entry()), release="1.9-a")
    database = complete(raw(entry(), databases={"core": {"system": "8", "name": "shop"}}))
    changed = complete(raw(entry(sql=["SELECT 1;"])))
    assert "is for another plan: for the release 1.9-a, not 2.0-b" in problem(PLAN, shown(release), approved=release["fingerprint"])
    assert "is for another plan: shown for other databases" in problem(PLAN, shown(database), approved=database["fingerprint"])
    assert "this one has changed since that was shown" in problem(PLAN, shown(changed), approved=changed["fingerprint"])
    assert "no plan with the fingerprint 0000 was ever shown" in problem(PLAN, shown(PLAN), approved="0000")


def test_approval_is_used_once() -> None:
    used = [shown(PLAN), ran(PLAN)]
    again = complete(raw(entry()), *used)
    assert problem(again, *used, approved=PLAN["fingerprint"]) == (
        f"the approval {PLAN['fingerprint']} was used at {SHOWN} by the run deploy-2, and holds for one run"
    )
    assert problem(again, *used, shown(again), approved=again["fingerprint"]) == ""


def test_policy_signature_needs_one() -> None:
    here = shown(PLAN)
    assert "needs the signature of a second person" in problem(PLAN, here, approved=PLAN["fingerprint"], policy="signature")
    assert "needs the signature" in problem(PLAN, here, signature={"skipped": True}, policy="signature")
    assert problem(PLAN, here, signature={"by": "", "problem": "bad key"}, policy="signature") == "bad key"
    assert problem(PLAN, here, signature={"by": "ann", "problem": ""}, policy="signature") == ""


def test_refusal_says_exactly_what_to_type() -> None:
    told = m.gate_refusal(PLAN, "nobody has approved it", "inventories/demo", "fingerprint").splitlines()
    assert told[0] == "1 pending migration is not approved: nobody has approved it."
    assert told[-1].endswith(f"-i inventories/demo playbooks/deploy.yml -e release=2.0-b -e migrations_approved={PLAN['fingerprint']}")
    signing = m.gate_refusal(PLAN, "x", "inventories/demo", "signature")
    assert f"fingerprint: {PLAN['fingerprint']}\\n' | ssh-keygen -Y sign -n evenkeel-approval -f" in signing
    assert signing.endswith("playbooks/deploy.yml -e release=2.0-b -e approval=approval.sig")
    back = m.gate_refusal(complete(raw(entry(backwards=True))), "x", "inventories/demo", "fingerprint")
    assert "1 migration to be reversed is not approved" in back
    assert "playbooks/rollback.yml -e release=2.0-b -e reversal_approved=" in back


# --- what people read ---------------------------------------------------------------------------------------------------------------------


def test_plan_for_a_person() -> None:
    broken = entry("0003_gone", reversible=False, compatible=False, why="queries of the release before fail")
    findings = [{"migration": "core shop.0003_gone", "rule": "ban-drop-column", "level": "warning", "message": "May break.", "line": 1}]
    plan = m.migration_plan_complete(raw(entry(), broken), "demo", "2.0-b", [], findings)
    text = m.migration_plan_text(plan, {"outcome": "passed", "why": ""})
    assert text.splitlines()[:2] == ["2 migrations pending for release 2.0-b:", "  database core: shop of the system 7"]
    assert '      | ALTER TABLE "shop_item" ADD COLUMN "note" text NULL;' in text
    assert "can be reversed: NO; the release before can run after it: NO, queries of the release before fail" in text
    assert "locks shop_item (ACCESS EXCLUSIVE), about 1.2 million rows" in text
    assert text.count("squawk warning, ban-drop-column: May break.") == 1
    assert "rehearsed on a copy: passed" in text
    assert text.endswith(f"fingerprint of this plan: {plan['fingerprint']}")
    assert m.migration_plan_text(complete(raw())) == "No migration is pending for release 2.0-b."


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (0, "no rows"),
        (1, "about 1 row"),
        (999, "about 999 rows"),
        (2000, "about 2 thousand rows"),
        (3_400_000_000, "about 3.4 billion rows"),
    ],
)
def test_rows_for_a_person(rows: int, text: str) -> None:
    assert m.human_rows(rows) == text


# --- contract, ledger ---------------------------------------------------------------------------------------------------------------------


def test_command_of_the_contract() -> None:
    django = {"migrations": {"django": ["core", "plugins"], "settings": "shop.settings"}}
    seeded = ["env", "PYTHONHASHSEED=0", "python", "-"]  # else Django orders sets of columns differently in each run
    assert m.migration_command(django, "plan") == [*seeded, "plan", "core", "plugins", "--settings", "shop.settings"]
    assert m.migration_command(django, "reverse", ["--to", "{}"])[-2:] == ["--to", "{}"]
    assert m.migration_program(django, "import django") == "import django"
    own = {"migrations": {"django": [], "commands": {"plan": ["shop", "plan"], "apply": ["shop", "migrate"]}}}
    assert m.migration_command(own, "apply", m.migration_limits(PLAN, 5, 900, 10)) == [
        *("shop", "migrate", "--expect", PLAN["digest"], "--lock-timeout-seconds", "5", "--statement-timeout-seconds", "900"),
        *("--tries", "10"),
    ]
    assert "--expect" not in m.migration_limits(PLAN, 5, 900, 1, exactly=False)
    assert m.migration_command(own, "reverse") == []
    assert m.migration_program(own, "import django") == ""
    assert m.migration_command({"migrations": {"django": []}}, "plan") == []


DONE = (
    '{"outcome": "failed", "why": "core shop.0003_x: no", "heads": {"core": {"shop": ["0002_note"]}}, "migrations": '
    '[{"database": "core", "app": "shop", "name": "0002_note", "seconds": 1.5}, '
    '{"database": "core", "app": "shop", "name": "0001_squashed", "seconds": 0, "recorded": true}]}'
)


def test_what_the_ledger_keeps() -> None:
    plan = complete(raw(entry(compatible=False, why="inserts fail"), entry("0003_x")))
    kept = m.migration_entry({"stdout": f"noise\n{DONE}\n"}, plan, "deploy-1")
    assert kept["kind"] == "migration"
    assert kept["restore_point"] == "deploy-1"
    assert (kept["release"], kept["fingerprint"], kept["content"]) == ("2.0-b", plan["fingerprint"], plan["content"])
    assert kept["migrations"][0] == {
        **{"database": "core", "app": "shop", "name": "0002_note", "seconds": 1.5},
        **{"reversible": True, "compatible": False, "why": "inserts fail"},
    }
    assert kept["migrations"][1]["compatible"] is True
    told = m.migration_failure(kept, plan, "inventories/demo", ["main"])
    assert "Applied, and so they stay: shop.0002_note (core)." in told
    assert "That one may not work on what was applied: inserts fail." in told
    assert "playbooks/restore.yml -e cluster=main -e name=deploy-1" in told, "clusters, not what Django calls its databases"
    assert m.migration_done_text(kept).splitlines() == [
        "2 migrations applied in 1.5 s",
        "      1.50 s  core shop.0002_note",
        "      0.00 s  core shop.0001_squashed",
    ]


@pytest.mark.parametrize("done", [{"stdout": "", "stderr": "a\nKilled"}, {"stdout": "no json", "stderr": "Killed"}, {"msg": "Killed"}])
def test_a_run_that_was_cut_off_has_failed(done: dict[str, Any]) -> None:
    kept = m.migration_entry(done, PLAN, "p")
    assert kept["outcome"] == "failed"
    assert "ended without its report (Killed); the next run looks what is applied" in kept["why"]


PARTIAL = DONE.replace('"migrations":', '"partial": [{"database": "core", "app": "shop", "name": "0003_x"}], "migrations":')


@pytest.mark.parametrize("done", [{"stdout": PARTIAL}, {"stdout": "", "stderr": "Killed"}])
def test_what_failed_midway_without_a_transaction_stands_in_the_way_of_a_rollback(done: dict[str, Any]) -> None:
    """No database lists it as applied, yet a part of it is there; also when the run was cut off before it could tell."""
    plan = complete(raw(entry(), entry("0003_x", atomic=False, compatible=False)))
    kept = {**m.migration_entry(done, plan, "p"), "seq": 1}
    assert [(each["name"], each["compatible"]) for each in kept["partial"]] == [("0003_x", False)]
    verdict = m.rollback_verdict(state(), [kept], "1.0-a", True)
    assert (verdict["verdict"], verdict["ahead"][0]["migration"]) == ("refuse", "shop.0003_x")
    assert "it failed midway, is not atomic, and what it did before stays" in verdict["why"]
    done_later = applied(2, "2.1-c", "0003_x", compatible=True)
    assert m.rollback_verdict(state("shop.0003_x"), [kept, done_later], "1.0-a", True)["verdict"] == "allow"


@pytest.mark.parametrize(
    ("applied", "unknown", "older"),
    [
        (["shop.0001", "shop.0002"], ["shop.0002"], True),
        (["shop.0001", "old.0001"], ["old.0001"], False),  # an application that is gone
        (["shop.0001", "shop.0002", "shop.0003_squashed"], ["shop.0001", "shop.0002"], False),
        (["shop.0001"], [], False),
    ],
)
def test_a_release_older_than_the_databases(applied: list[str], unknown: list[str], older: bool) -> None:
    plan = complete(raw(applied={"core": applied}, unknown={"core": unknown}))
    assert bool(m.migrations_unknown(plan)) is older
    assert not older or m.migrations_unknown(plan).startswith("Release 2.0-b is older than the databases: core has shop.0002,")


# --- the way back -------------------------------------------------------------------------------------------------------------------------


def test_what_was_applied_before_the_target_s_own_migrations_is_no_hindrance() -> None:
    left = {**state("gone.0001_initial"), "applied": {"core": ["gone.0001_initial", "shop.0001_initial"]}}
    assert m.rollback_verdict(left, [], "1.0-a", True)["verdict"] == "allow"
    newer = {**left, "applied": {"core": ["shop.0001_initial", "gone.0001_initial"]}}
    assert m.rollback_verdict(newer, [], "1.0-a", True)["verdict"] == "approval"


def test_so_is_what_the_target_has_run_with() -> None:
    """An app that was taken out, or migrations that a squash replaced: the ledger has them, and the target ran well later."""
    old = applied(1, "1.0-a", "0001_initial", compatible=False, app="gone")
    gone = state("gone.0001_initial")
    assert m.rollback_verdict(gone, [old], "1.0-a", True)["verdict"] == "approval"
    ran = ledger("deploy", 2, release="1.0-a", outcome="succeeded")
    assert m.rollback_verdict(gone, [old, ran], "1.0-a", True)["verdict"] == "allow"
    again = {**old, "seq": 3}
    assert m.rollback_verdict(gone, [old, ran, again], "1.0-a", True)["verdict"] == "approval"


def test_what_the_target_has_run_with_is_not_reversed_with_what_it_cannot_bear() -> None:
    """A column was added, the code went back and the column stayed; the next release dropped it."""
    entries = [
        *(applied(1, "1.5-x", "0002"), ledger("rollback", 2, release="1.0-a", outcome="succeeded")),
        applied(3, "2.0-b", "0003", compatible=False),
    ]
    known = {**state("shop.0002", "shop.0003"), "applied": {"core": ["shop.0001_initial", "news.0001", "shop.0002", "shop.0003"]}}
    verdict = m.rollback_verdict(known, entries, "1.0-a", True)
    assert (verdict["verdict"], verdict["to"]) == ("approval", {"core": {"shop": "0002"}})


def test_a_run_that_was_cut_off_leaves_what_it_may_have_applied() -> None:
    """The database says whether it is there, and the ledger what it means."""
    plan = complete(raw(entry("0002_note", compatible=True), entry("0003_x", compatible=False)))
    kept = {**m.migration_entry({"stdout": "", "stderr": "Connection lost"}, plan, "p"), "seq": 1}
    assert [each["name"] for each in kept["perhaps"]] == ["0002_note", "0003_x"]
    assert m.rollback_verdict(state("shop.0002_note"), [kept], "1.0-a", True)["verdict"] == "allow"
    assert m.rollback_verdict(state("shop.0002_note", "shop.0003_x"), [kept], "1.0-a", True)["verdict"] == "approval"
    assert m.migrations_unbearable([kept], {}, "1.0-a", {"core": ["shop.0002_note"]}) == []
    (there,) = m.migrations_unbearable([kept], {}, "1.0-a", {"core": ["shop.0002_note", "shop.0003_x"]})
    assert there["name"] == "0003_x"
    assert "perhaps" not in m.migration_entry({"stdout": DONE}, plan, "p")


def test_hosts_stay_on_a_release_for_what_an_interrupted_deploy_applied() -> None:
    ran = ledger("deploy", 1, release="1.0-a", outcome="succeeded")
    dropped = applied(2, "2.0-b", "0002", compatible=False)
    this_run = {"migrations": [{**dropped["migrations"][0], "name": "0003"}]}

    def names(entries: list[dict[str, Any]], migrated: dict[str, Any], previous: str) -> list[str]:
        return [each["name"] for each in m.migrations_unbearable(entries, migrated, previous, {})]

    assert names([ran], {}, "1.0-a") == []
    assert names([ran, dropped], {}, "1.0-a") == ["0002"]
    assert names([ran, dropped], this_run, "1.0-a") == ["0002", "0003"]
    assert names([ran, dropped], this_run, "2.0-b") == ["0003"], "2.0-b has brought the first itself"
    later = ledger("deploy", 3, release="2.0-b", outcome="succeeded")
    assert names([ran, dropped, later], {}, "2.0-b") == []
    assert names([ran, dropped, later], {}, "unknown") == []


def test_a_rehearsal_of_another_release_proves_nothing() -> None:
    ahead = applied(1, "2.1-c", "0002", compatible=None)
    assert m.rollback_verdict(state("shop.0002"), [ahead, rehearsed(2, "1.0-a", "passed", "0002")], "1.0-a", True)["verdict"] == "approval"


def test_what_is_reversed_in_one_database_is_so_in_all() -> None:
    """Django records a migration in each database, also where its tables are not."""
    core = state("shop.0002")
    both = {key: {**value, "plugins": value["core"]} for key, value in core.items()}
    ran = applied(1, "2.0-b", "0002", compatible=False)
    ran["migrations"].append({**ran["migrations"][0], "database": "plugins", "compatible": True})
    verdict = m.rollback_verdict(both, [ran], "1.0-a", True)
    assert verdict["verdict"] == "approval"
    assert verdict["to"] == {"core": {"shop": "0001_initial"}, "plugins": {"shop": "0001_initial"}}


def test_without_the_command_state_nothing_is_reversed() -> None:
    """Nobody knows how far back is far enough: the way would lead to an empty database."""
    broken = applied(1, "2.0-b", "0002", compatible=False)
    assert m.rollback_verdict({}, [broken], "1.0-a", True)["verdict"] == "refuse"


def state(*unknown: str, pending: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "unknown": {"core": list(unknown)},
        "pending": {"core": list(pending)},
        "known": {"core": ["shop.0001_initial"]},
        "heads": {"core": {"shop": ["0001_initial"]}},
    }


def applied(seq: int, release: str, *names: str, compatible: bool | None = True, reversible: bool = True, **more: Any) -> dict[str, Any]:
    record = {"database": "core", "app": "shop", "seconds": 1, "compatible": compatible, "reversible": reversible, "why": "so", **more}
    return ledger("migration", seq, release=release, outcome="succeeded", migrations=[{**record, "name": name} for name in names])


def rehearsed(seq: int, current: str, outcome: str, *names: str) -> dict[str, Any]:
    rows = [{"database": "core", "app": "shop", "name": name, "seconds": 1} for name in names]
    return ledger("rehearsal", seq, release="2.0-b", current=current, outcome=outcome, migrations=rows)


TO = {"core": {"shop": "0001_initial"}}
MATRIX: dict[str, tuple[dict[str, Any], list[dict[str, Any]], bool, str, str, Any]] = {
    # what happened: state, ledger, can reverse, verdict, a part of why, to
    "nothing ahead": (state(), [], True, "allow", "no migration that release 1.0-a does not know", {}),
    "additive": (state("shop.0002"), [applied(1, "2.0-b", "0002")], False, "allow", "nothing that it uses has changed", {}),
    "column dropped": (state("shop.0002"), [applied(1, "2.0-b", "0002", compatible=False)], True, "approval", "shop.0002 of core: so", TO),
    "column dropped, release broken": (
        *(state("shop.0002"), [applied(1, "2.0-b", "0002", compatible=False)], False),
        *("refuse", "and the release that runs cannot reverse it", {}),
    ),
    "data, irreversible": (
        *(state("shop.0002"), [applied(1, "2.0-b", "0002", compatible=None, reversible=False)], True),
        *("refuse", "it did not pass a rehearsal with this release; and shop.0002 cannot be reversed", {}),
    ),
    "data, rehearsed": (
        *(state("shop.0002"), [applied(2, "2.0-b", "0002", compatible=None), rehearsed(1, "1.0-a", "passed", "0002")], False),
        *("allow", "ran its checks on a copy with shop.0002", {}),
    ),
    "data, rehearsed from an older backup": (
        *(state("shop.0002"), [applied(2, "2.0-b", "0002", compatible=None), rehearsed(1, "1.0-a", "passed", "0001_initial", "0002")]),
        *(False, "allow", "ran its checks on a copy", {}),
    ),
    "data, rehearsed and failed since": (
        state("shop.0002"),
        [rehearsed(1, "1.0-a", "passed", "0002"), rehearsed(2, "1.0-a", "failed", "0002"), applied(3, "2.0-b", "0002", compatible=None)],
        *(False, "refuse", "did not pass a rehearsal", {}),
    ),
    "data, rehearsed with another release": (
        *(state("shop.0002"), [rehearsed(1, "1.5-x", "passed", "0002"), applied(2, "2.0-b", "0002", compatible=None)], True),
        *("approval", "did not pass a rehearsal", TO),
    ),
    "dropped though rehearsed": (
        *(state("shop.0002"), [rehearsed(1, "1.0-a", "passed", "0002"), applied(2, "2.0-b", "0002", compatible=False)], True),
        *("approval", "shop.0002 of core: so", TO),
    ),
    "two releases back, both additive": (
        *(state("shop.0002", "shop.0003"), [applied(1, "1.5-x", "0002"), applied(2, "2.0-b", "0003")], False),
        *("allow", "can run after shop.0002, shop.0003", {}),
    ),
    "two releases back, each rehearsed": (
        state("shop.0002", "shop.0003"),
        [
            *(rehearsed(1, "1.0-a", "passed", "0002"), applied(2, "1.5-x", "0002", compatible=None)),
            *(rehearsed(3, "1.5-x", "passed", "0003"), applied(4, "2.0-b", "0003", compatible=None)),
        ],
        *(False, "refuse", "the migrations of 1.5-x and 2.0-b together did not pass a rehearsal", {}),
    ),
    "two releases back, only the second breaks": (
        *(state("shop.0002", "shop.0003"), [applied(1, "1.5-x", "0002"), applied(2, "2.0-b", "0003", compatible=False)], True),
        *("approval", "may not run after shop.0003", {"core": {"shop": "0002"}}),
    ),
    "failed midway": (
        *(state("shop.0002"), [{**applied(1, "2.0-b", "0002", compatible=False), "outcome": "failed"}], True),
        *("approval", "may not run after shop.0002", TO),
    ),
    "nobody knows": (state("shop.0002"), [], True, "approval", "the ledger has no record of it", TO),
    "a new application": (
        *(state("news.0001"), [applied(1, "2.0-b", "0001", app="news", compatible=None)], True),
        *("approval", "may not run after news.0001", {"core": {"news": "zero"}}),
    ),
    "behind a squash": (
        *(state("shop.0001_squashed", pending=("shop.0001_initial", "shop.0002")), [], True),
        *("refuse", "expects shop.0001_initial (core) and 1 more, which the databases do not have", {}),
    ),
    "applied, reversed, applied again": (
        state("shop.0002"),
        [
            *(applied(1, "2.0-b", "0002", compatible=False), applied(2, "1.0-a", "0002", compatible=None, backwards=True)),
            applied(3, "2.1-c", "0002"),
        ],
        *(False, "allow", "nothing that it uses", {}),
    ),
    "by the ledger alone": (
        {},
        [
            *(ledger("deploy", 1, release="1.0-a", outcome="succeeded"), applied(2, "2.0-b", "0002")),
            ledger("deploy", 3, release="2.0-b", outcome="failed"),
        ],
        *(False, "allow", "can run after shop.0002", {}),
    ),
}


@pytest.mark.parametrize("case", MATRIX)
def test_verdict(case: str) -> None:
    known, entries, possible, verdict, why, to = MATRIX[case]
    result = m.rollback_verdict(known, entries, "1.0-a", possible)
    assert result["verdict"] == verdict, result
    assert why in result["why"]
    assert result["to"] == to


def test_reversal_that_cannot_be() -> None:
    assert m.reversal_problem(complete(raw(entry(backwards=True)))) == ""
    stuck = entry(backwards=True, reversible=False, why="cannot be reversed: Raw Python operation")
    assert m.reversal_problem(complete(raw(stuck))) == "shop.0002_note of core cannot be reversed: Raw Python operation"


# --- squawk -------------------------------------------------------------------------------------------------------------------------------


def review(**more: Any) -> list[dict[str, Any]]:
    module = load(ROOT / "library" / "migration_review.py")
    found: list[dict[str, Any]] = module.review(module.find_squawk(), entry(**more), "15")
    return found


def test_squawk_finds_what_blocks() -> None:
    (found,) = review(sql=["SELECT 1;", 'CREATE INDEX "a" ON "shop_item" ("name");'])
    assert found["migration"] == "core shop.0002_note"
    assert (found["rule"], found["level"], found["line"]) == ("require-concurrent-index-creation", "warning", 2)
    assert "blocked" in found["message"]


def test_squawk_is_content_with_what_is_harmless() -> None:
    assert review() == []
    assert review(sql=["-- Python code: shop.x, not shown as SQL"]) == []
    concurrent = ['CREATE INDEX CONCURRENTLY "a" ON "shop_item" ("name");']
    assert review(sql=concurrent, atomic=False) == []
    assert "ban-concurrent-index-creation-in-transaction" in [each["rule"] for each in review(sql=["SELECT 1;", *concurrent], atomic=True)]
    assert review(sql=["SELECT 1;", *concurrent], atomic=False) == []


def test_squawk_that_says_nonsense_is_an_error() -> None:
    with pytest.raises(ReviewError, match=r"squawk cannot review core shop\.x \(exit code 2\): error: bad option"):
        read_findings("core shop.x", 2, "", "error: bad option\n")
    squawk = load(ROOT / "library" / "migration_review.py").find_squawk()
    done = subprocess.run([squawk, *SQUAWK_OPTIONS], input="SELECT 1", capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"squawk knows the options: {done.stderr}"
    assert sql_to_review({"sql": ["SELECT 1", "-- x"]}) == "SELECT 1\n-- x\n"

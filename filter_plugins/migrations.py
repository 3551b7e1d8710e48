"""Pure functions for the migration gate: the plan and its fingerprint, approvals, what the ledger keeps, and may an older release run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

FINGERPRINT_LENGTH = 16
#: What of a pending migration would run. Not the tables: their estimated rows change by themselves.
DECISIVE = ("database", "app", "name", "operations", "sql")


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def migration_digest(pending: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of what would run, for the option `--expect` (playbooks/files/django_migrations.py has the same)."""
    return hashlib.sha256(_canonical([{key: entry[key] for key in DECISIVE} for entry in pending])).hexdigest()


def migration_name(entry: Mapping[str, Any]) -> str:
    """How people call a migration."""
    return f"{entry['app']}.{entry['name']}"


# --- The contract -------------------------------------------------------------------------------------------------------------------------


def migration_command(app: Mapping[str, Any], action: str, options: Sequence[str] = ()) -> list[str]:
    """What `<app>-run` runs for an action (plan, apply, state, reversal, reverse); empty when the contract has no such command."""
    migrations = app["migrations"]
    if migrations.get("django"):
        settings = ["--settings", str(migrations["settings"])] if migrations.get("settings") else []
        # Django has sets of columns: without a seed their order, and with it the SQL, would be another one each time
        return ["env", "PYTHONHASHSEED=0", "python", "-", action, *migrations["django"], *settings, *options]
    words = migrations.get("commands", {}).get(action, [])
    return [*map(str, words), *options] if words else []


def migration_program(app: Mapping[str, Any], program: str) -> str:
    """Standard input of that command: the suite's own program (playbooks/files/django_migrations.py), or nothing."""
    return program if app["migrations"].get("django") else ""


def migration_limits(
    plan: Mapping[str, Any], lock_timeout_seconds: float, statement_timeout_seconds: float, tries: int, exactly: bool = True
) -> list[str]:
    """The options of apply and reverse: within these limits, and exactly this plan (on a copy of an older backup more may be pending)."""
    limits = {"--lock-timeout-seconds": lock_timeout_seconds, "--statement-timeout-seconds": statement_timeout_seconds, "--tries": tries}
    expected = ["--expect", str(plan["digest"])] if exactly else []
    return [*expected, *(word for name, value in limits.items() for word in (name, str(value)))]


# --- The plan -----------------------------------------------------------------------------------------------------------------------------


def migration_plan_complete(
    plan: Mapping[str, Any],
    platform: str,
    release: str,
    entries: Sequence[Mapping[str, Any]],
    findings: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """A plan as its release printed it, with all that an approval is about.

    `platform`: name of the inventory. `entries`: the ledger. Adds {platform, release, digest, content, attempt, fingerprint, findings}:
    `content` is the same for the same plan, `fingerprint` is another one for each attempt to carry it out.
    """
    digest = migration_digest(plan["pending"])
    decisive = {
        "platform": platform,
        "release": release,
        "databases": plan["databases"],
        "applied": plan["applied"],
        "pending": [{key: entry[key] for key in DECISIVE} | {"backwards": bool(entry.get("backwards"))} for entry in plan["pending"]],
    }
    content = hashlib.sha256(_canonical(decisive)).hexdigest()
    attempt = sum(1 for entry in entries if entry["kind"] == "migration" and entry.get("content") == content)
    fingerprint = hashlib.sha256(_canonical({**decisive, "attempt": attempt})).hexdigest()[:FINGERPRINT_LENGTH]
    return {
        **plan,
        "platform": platform,
        "release": release,
        "digest": digest,
        "content": content,
        "attempt": attempt,
        "fingerprint": fingerprint,
        "findings": list(findings),
    }


def human_rows(rows: int | None) -> str:
    """About how many: `about 1.2 million rows`."""
    if rows is None:
        return "unknown rows"
    if rows == 0:
        return "no rows"
    for size, unit in ((10**9, " billion"), (10**6, " million"), (10**3, " thousand")):
        if rows >= size:
            return f"about {f'{rows / size:.1f}'.removesuffix('.0')}{unit} rows"
    return f"about {rows} row{'' if rows == 1 else 's'}"


def _migration_text(entry: Mapping[str, Any], findings: Sequence[Mapping[str, Any]]) -> list[str]:
    """One migration for a person."""
    bears = {True: "yes", False: "NO", None: "unknown"}[entry["compatible"]]
    reversible = "yes" if entry["reversible"] else "NO"
    lines = [f"    {migration_name(entry)}"]
    lines += [f"      - {operation}" for operation in entry["operations"]]
    lines += [f"      {line}" for text in entry["sql"] for line in ["| " + each for each in text.splitlines()]]
    if entry.get("backwards"):
        lines.append(f"      can be reversed: {reversible}; {entry['why']}")
    else:
        lines.append(f"      can be reversed: {reversible}; the release before can run after it: {bears}, {entry['why']}")
    lines += [f"      locks {table['name']} ({table['lock']}), {human_rows(table['rows'])}" for table in entry["tables"]]
    name = f"{entry['database']} {migration_name(entry)}"
    for finding in findings:
        if finding["migration"] == name:
            lines.append(f"      squawk {finding['level'].lower()}, {finding['rule']}: {finding['message']}")
    return lines


def migration_plan_text(plan: Mapping[str, Any], rehearsal: Mapping[str, Any] | None = None) -> str:
    """A completed plan for the person who approves it. `rehearsal`: how it went on a copy (empty when there was none)."""
    pending = plan["pending"]
    backwards = any(entry.get("backwards") for entry in pending)
    if not pending:
        return f"No migration is pending for release {plan['release']}."
    some = f"{len(pending)} migration{'' if len(pending) == 1 else 's'}"
    of = f"{some} to be reversed, to go back to release {plan['release']}" if backwards else f"{some} pending for release {plan['release']}"
    lines = [f"{of}:"]
    database = None
    for entry in pending:
        if entry["database"] != database:
            database = entry["database"]
            where = plan["databases"].get(database, {})
            lines.append(f"  database {database}: {where.get('name', '?')} of the system {where.get('system', '?')}")
        lines += _migration_text(entry, plan["findings"])
    for alias, unknown in plan["unknown"].items():
        if unknown:
            lines.append(f"  {alias} has migrations that this release does not know: {', '.join(unknown)}")
    if rehearsal:
        lines.append(f"  rehearsed on a copy: {rehearsal['outcome']}{', ' if rehearsal.get('why') else ''}{rehearsal.get('why', '')}")
    if plan["attempt"]:
        lines.append(f"  This plan was begun {plan['attempt']} times before.")
    return "\n".join([*lines, f"fingerprint of this plan: {plan['fingerprint']}"])


def migrations_unknown(plan: Mapping[str, Any]) -> str:
    """That a release is older than the databases, in one sentence; empty when it is not.

    What an application has left behind is no sign of it: one that is not in the release at all, or migrations before a squash.
    """
    for database, names in plan.get("unknown", {}).items():
        latest: dict[str, tuple[str, bool]] = {}
        known_apps = {name.split(".", 1)[0] for name in plan["applied"][database] if name not in names}
        for name in plan["applied"][database]:
            latest[name.split(".", 1)[0]] = name, name not in names
        for app, (name, known) in latest.items():
            if app in known_apps and not known:
                return f"Release {plan['release']} is older than the databases: {database} has {name}, which it does not know."
    return ""


def reversal_problem(plan: Mapping[str, Any]) -> str:
    """Why a plan of going back cannot be carried out; empty when it can."""
    stuck = [entry for entry in plan["pending"] if not entry["reversible"]]
    return f"{migration_name(stuck[0])} of {stuck[0]['database']} {stuck[0]['why']}" if stuck else ""


# --- Approvals ----------------------------------------------------------------------------------------------------------------------------


def approval_statement(plan: Mapping[str, Any]) -> str:
    """What a second person signs."""
    return f"evenkeel approval v1\nplatform: {plan['platform']}\nrelease: {plan['release']}\nfingerprint: {plan['fingerprint']}\n"


def approval_signing_command(plan: Mapping[str, Any], key: str = "~/.ssh/id_ed25519") -> str:
    """What the second person types to sign it."""
    text = approval_statement(plan).replace("\n", "\\n")
    return f"printf '{text}' | ssh-keygen -Y sign -n evenkeel-approval -f {key} > approval.sig"


def approval_problem(
    plan: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    approved: str,
    signature: Mapping[str, Any],
    policy: str,
    hours: float,
    now: float,
) -> str:
    """Why this plan must not be carried out now, in one sentence; empty when it is approved, or nothing is pending.

    `approved`: the fingerprint that was typed, empty when none was. `signature`: what the module approval returned; without `problem` none
    was given. `policy`: fingerprint or signature. `hours`: how long after it was shown a plan may be approved. `now`: Unix time.
    """
    if not plan["pending"]:
        return ""
    if policy == "signature":
        if "problem" not in signature:
            return "it needs the signature of a second person (the policy is `signature`), and none was given"
        if signature["problem"]:
            return str(signature["problem"])
    elif not approved:
        return "nobody has approved it"
    if approved and approved != plan["fingerprint"]:
        return _other_approval(plan, entries, approved)
    shown = [entry for entry in entries if entry["kind"] == "plan" and entry["fingerprint"] == plan["fingerprint"]]
    if not shown:
        return f"the plan {plan['fingerprint']} was never shown here: read it above first, and then approve it"
    age = (now - datetime.fromisoformat(shown[-1]["at"]).timestamp()) / 3600
    if age > hours:
        return f"the approval has expired: the plan was shown {age:.0f} hours ago, the limit is {hours:g}; read it again, then approve it"
    return ""


def _other_approval(plan: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], approved: str) -> str:
    """Why this approval is not for this plan."""
    used = [entry for entry in entries if entry["kind"] == "migration" and entry.get("fingerprint") == approved]
    if used:
        return f"the approval {approved} was used at {used[-1]['at']} by the run {used[-1]['run']}, and holds for one run"
    shown = [entry for entry in entries if entry["kind"] == "plan" and entry["fingerprint"] == approved]
    if not shown:
        return f"no plan with the fingerprint {approved} was ever shown here; this one has {plan['fingerprint']}"
    first = shown[-1]
    told = f"the approval {approved} is for another plan"
    if first["release"] != plan["release"]:
        return f"{told}: for the release {first['release']}, not {plan['release']}"
    if first.get("databases", plan["databases"]) != plan["databases"]:
        return f"{told}: shown for other databases than these"
    return f"{told}: this one has changed since that was shown at {first['at']}"


def gate_refusal(plan: Mapping[str, Any], problem: str, inventory: str, policy: str) -> str:
    """Why it must not go on, and exactly what to type. `inventory`: its folder, `policy`: fingerprint or signature."""
    backwards = any(entry.get("backwards") for entry in plan["pending"])
    playbook, variable = ("rollback", "reversal_approved") if backwards else ("deploy", "migrations_approved")
    count = len(plan["pending"])
    what = f"{count} {'' if backwards else 'pending '}migration{'' if count == 1 else 's'}{' to be reversed' if backwards else ''}"
    command = f"  ansible-playbook -i {inventory} playbooks/{playbook}.yml -e release={plan['release']}"
    lines = [
        f"{what} {'is' if count == 1 else 'are'} not approved: {problem}.",
        "Nothing was changed: the running release and the databases are as they were.",
    ]
    if policy == "signature":
        lines += [
            "Read the plan above. To approve exactly this plan, a second person whose key is in deploy_approvers types:",
            f"  {approval_signing_command(plan)}",
            "and gives you the file approval.sig. Then type:",
            f"{command} -e approval=approval.sig",
        ]
    else:
        lines += ["Read the plan above. To approve exactly this plan, type:", f"{command} -e {variable}={plan['fingerprint']}"]
    return "\n".join(lines)


# --- The ledger ---------------------------------------------------------------------------------------------------------------------------


def migration_plan_entry(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the ledger keeps of a plan that was shown."""
    return {"kind": "plan", **{key: plan[key] for key in ("release", "fingerprint", "content", "databases")}}


def migration_result(done: Mapping[str, Any]) -> dict[str, Any]:
    """What apply or reverse said, of the result of `command`: {outcome, why, migrations, heads, partial}; cut off: without `partial`."""
    lines = str(done.get("stdout") or "").strip().splitlines()
    try:
        said = json.loads(lines[-1])
        return {**{key: said[key] for key in ("outcome", "why", "migrations", "heads")}, "partial": said.get("partial", [])}
    except (IndexError, ValueError, KeyError, TypeError):
        told = str(done.get("stderr") or done.get("msg") or "").strip().splitlines()
        last = told[-1].strip() if told else "it said nothing"
        why = f"the command that migrates ended without its report ({last}); the next run looks what is applied"
        return {"outcome": "failed", "why": why, "migrations": [], "heads": {}}


def _key(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(entry["database"]), str(entry["app"]), str(entry["name"])


def migration_entry(done: Mapping[str, Any], plan: Mapping[str, Any], restore_point: str) -> dict[str, Any]:
    """What the ledger keeps of migrations that ran. `done`: the result of `command` for apply or reverse, `plan`: the completed plan."""
    result = migration_result(done)
    planned = {_key(entry): entry for entry in plan["pending"]}
    records = []
    for each in result["migrations"]:
        entry = planned.get(_key(each))
        record = {key: each[key] for key in ("database", "app", "name", "seconds")}
        if entry is None:  # only recorded: a squash, or what it replaces
            record |= {"reversible": True, "compatible": True, "why": "it stands for migrations that were applied otherwise"}
        else:
            record |= {key: entry[key] for key in ("reversible", "compatible", "why")}
            if entry.get("backwards"):
                record["backwards"] = True
        records.append(record)
    if "partial" not in result:  # it was cut off: the database knows, and a later run looks there
        perhaps = [
            {key: entry[key] for key in ("database", "app", "name", "reversible", "compatible", "why")}
            for entry in plan["pending"]
            if not entry.get("backwards")
        ]
    else:
        perhaps = []
    kept = {key: plan[key] for key in ("release", "fingerprint", "content")}
    told = {"outcome": result["outcome"], "why": result["why"], "migrations": records, "heads": result["heads"]}
    unfinished = result.get("partial", [entry for entry in plan["pending"] if not entry.get("atomic", True)])
    if unfinished:
        told["partial"] = [
            {**{key: each[key] for key in ("database", "app", "name")}, "compatible": planned.get(_key(each), {}).get("compatible")}
            for each in unfinished
        ]
    if perhaps:
        told["perhaps"] = perhaps
    return {"kind": "migration", **kept, **told, "restore_point": restore_point}


def migration_done_text(entry: Mapping[str, Any]) -> str:
    """What was done, for the person who waits. `entry`: of the ledger."""
    backwards = any(each.get("backwards") for each in entry["migrations"])
    seconds = sum(float(each["seconds"]) for each in entry["migrations"])
    lines = [f"{len(entry['migrations'])} migrations {'reversed' if backwards else 'applied'} in {seconds:.1f} s"]
    return "\n".join([*lines, *(f"  {each['seconds']:8.2f} s  {each['database']} {migration_name(each)}" for each in entry["migrations"])])


def migration_failure(entry: Mapping[str, Any], plan: Mapping[str, Any], inventory: str, clusters: Sequence[str]) -> str:
    """Why migrations failed, what state that leaves, what to type next. `entry`: of the ledger, `clusters`: they have its restore point."""
    backwards = any(each.get("backwards") for each in plan["pending"])
    done = [
        each for each in entry["migrations"] if (each["database"], each["name"]) in {(p["database"], p["name"]) for p in plan["pending"]}
    ]
    names = ", ".join(f"{migration_name(each)} ({each['database']})" for each in done)
    lines = [f"The migrations {'were not all reversed' if backwards else 'failed'}: {entry['why']}."]
    lines.append(
        f"{'Reversed' if backwards else 'Applied'}, and so they stay: {names}." if done else "None is known to have been carried out."
    )
    lines.append("No host was switched: the release that ran before still runs.")
    broken = [each for each in done if each["compatible"] is False and not backwards]
    if broken:
        lines.append(f"That one may not work on what was applied: {broken[0]['why']}. Go on soon, or go back.")
    playbook = "rollback" if backwards else "deploy"
    lines += [
        "When the cause is mended (in the database, or by a new release), plan what is left; it needs an approval of its own:",
        f"  ansible-playbook -i {inventory} playbooks/{playbook}.yml -e release={plan['release']}",
    ]
    if entry["restore_point"]:
        lines += [
            "If data is wrong now, the databases can be restored as they were just before (what was written since is lost):",
            f"  ansible-playbook -i {inventory} playbooks/restore.yml -e cluster={','.join(clusters)} -e name={entry['restore_point']}",
        ]
    return "\n".join(lines)


def _records(entries: Sequence[Mapping[str, Any]], after: int = 0) -> dict[tuple[str, str], dict[str, Any]]:
    """(database, app.name) to what the ledger says of the migrations that are applied now; `after`: only of later entries.

    Those of which a part may be there, because they failed midway and are not atomic, have `partial`; those of a run that was cut off
    before it could tell, `perhaps`.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        if entry["kind"] != "migration" or int(entry.get("seq", 1)) <= after:
            continue
        for each in entry["migrations"]:
            key = (str(each["database"]), migration_name(each))
            found.pop(key, None)
            if not each.get("backwards"):
                found[key] = {**each, "release": entry["release"]}
        for each in entry.get("perhaps", []):
            found.setdefault((str(each["database"]), migration_name(each)), {**each, "perhaps": True, "release": entry["release"]})
        for each in entry.get("partial", []):
            why = "it failed midway, is not atomic, and what it did before stays"
            key = (str(each["database"]), migration_name(each))
            found[key] = {**each, "partial": True, "reversible": False, "why": why, "release": entry["release"]}
    return found


# --- The way back -------------------------------------------------------------------------------------------------------------------------


def rollback_verdict(
    state: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], target: str, reversal_possible: bool
) -> dict[str, Any]:
    """Whether release `target` may run on the databases as they are.

    `state`: JSON of the command `state`, run with the target; empty when the contract has none, and the ledger must do. `entries`: the
    ledger. `reversal_possible`: whether the release that runs can reverse. Returns {verdict: allow | approval | refuse, why,
    ahead: [{database, migration, compatible, reversible, why, release}], to: {database: {app: migration | zero}}}; `to` is what must be
    gone back to, and empty when nothing must.
    """
    ahead = _ahead(state, entries, target)
    to, stuck = _way_back(state, ahead)
    result: dict[str, Any] = {"verdict": "refuse", "why": "", "ahead": ahead, "to": {}}
    reversal_possible = reversal_possible and bool(state)  # without it nobody knows how far back is far enough
    missing = [f"{name} ({database})" for database, names in state.get("pending", {}).items() for name in names]
    if missing:
        result["why"] = (
            f"release {target} expects {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, which the databases do "
            "not have: they were built otherwise (by a squash that the release does not know), or were restored to an earlier time"
        )
        return result
    if not ahead:
        return result | {"verdict": "allow", "why": f"the databases have no migration that release {target} does not know"}
    names = ", ".join(dict.fromkeys(each["migration"] for each in ahead))
    if all(each["compatible"] is True for each in ahead):
        return result | {"verdict": "allow", "why": f"release {target} can run after {names}: nothing that it uses has changed"}
    broken = [each for each in ahead if each["compatible"] is not True]
    known_broken = [each for each in broken if each["compatible"] is False]
    rehearsal = _rehearsal(state, entries, target, ahead)
    if rehearsal and not known_broken:
        return result | {"verdict": "allow", "why": f"release {target} ran its checks on a copy with {names} at {rehearsal['at']}"}
    first = (known_broken or broken)[0]
    why = f"release {target} may not run after {first['migration']} of {first['database']}: {first['why']}"
    releases = list(dict.fromkeys(each["release"] for each in ahead if each["release"]))
    if not known_broken:
        what = f"the migrations of {_and(releases)} together" if len(releases) > 1 else "it"
        why += f"; {what} did not pass a rehearsal with this release"
    if stuck:
        return result | {"why": f"{why}; and {stuck[0]['migration']} cannot be reversed"}
    if not reversal_possible:
        return result | {"why": f"{why}; and the release that runs cannot reverse it"}
    return result | {"verdict": "approval", "why": why, "to": to}


def _and(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _ahead(state: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], target: str) -> list[dict[str, Any]]:
    """What is applied and not known to the target, in the order in which it was applied.

    The target has lived with what was applied before it ran well last: migrations of an app that was taken out, or that a squash replaced.
    """
    ran = max((int(each["seq"]) for each in entries if each["kind"] in ("deploy", "rollback") and _runs(each) == target), default=0)
    later = _records(entries, after=ran)
    if state:
        records = _records(entries)
        keys = [(database, name) for database, names in state["unknown"].items() for name in names]
        keys = [key for key in keys if (key in later if key in records else not _left_behind(state, *key))]
        known = {(database, name) for database, names in state.get("known", {}).items() for name in names}
        keys += [key for key, record in later.items() if record.get("partial") and key not in known and key not in keys]
    else:
        records = later
        keys = list(records)
    unrecorded = {"compatible": None, "reversible": None, "why": "the ledger has no record of it", "release": ""}
    kept = ("compatible", "reversible", "why", "release")
    found = []
    for database, name in keys:
        record = records.get((database, name), unrecorded)
        found.append({"database": database, "migration": name, **{key: record[key] for key in kept}})
    return found


def migrations_unbearable(
    entries: Sequence[Mapping[str, Any]], migrated: Mapping[str, Any], previous: str, applied: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """The migrations because of which the hosts stay on a release that fails: `previous`, to which they would go back, cannot bear them.

    entries: the ledger before this run. migrated: what this run has applied, as the ledger keeps it. applied: database to the migrations
    that it had before. A deploy that was interrupted may have applied some, too.
    """
    ran = [each for each in entries if each["kind"] in ("deploy", "rollback") and _runs(each)]
    own = [each for each in entries if each["kind"] == "migration" and each["release"] == previous]
    since = [each for each in ran if _runs(each) == previous] + own or ran  # one that never ran well may run now all the same
    found = []
    for (database, name), each in _records(entries, max((int(entry["seq"]) for entry in since), default=0)).items():
        if each.get("compatible") is False and (not each.get("perhaps") or name in applied.get(database, [])):
            found.append(each)
    return found + [each for each in migrated.get("migrations", []) if each.get("compatible") is False]


def _left_behind(state: Mapping[str, Any], database: str, name: str) -> bool:
    """Whether a migration that the target does not know was applied before one that it knows: of an app taken out, or of a squash."""
    applied = list(state.get("applied", {}).get(database, []))
    known = [each for each in applied if each not in state["unknown"][database]]
    return name in applied and bool(known) and applied.index(name) < applied.index(known[-1])


def _runs(entry: Mapping[str, Any]) -> str:
    """The release that ran after a deploy or rollback."""
    return str(entry["release"]) if entry["outcome"] == "succeeded" else ""


def _way_back(state: Mapping[str, Any], ahead: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[str, str]], list[Mapping[str, Any]]]:
    """What to go back to, so that only what the target can bear is left; and what of the way cannot be reversed.

    What is gone back in one database is so in all: else another release without it would meet a row of it in the others.
    """
    unbearable = {each["migration"] for each in ahead if each["compatible"] is not True}
    to: dict[str, dict[str, str]] = {}
    stuck: list[Mapping[str, Any]] = []
    last: dict[tuple[str, str], str] = {}
    for each in ahead:
        database, (app, name) = each["database"], each["migration"].split(".", 1)
        if app not in to.get(database, {}):
            if each["migration"] not in unbearable:
                last[database, app] = name
                continue
            heads = state.get("heads", {}).get(database, {}).get(app, ["zero"])
            left = _applied_before(state, database, each["migration"])
            to.setdefault(database, {})[app] = left[-1] if left else last.get((database, app), heads[0])
        if each["reversible"] is False:
            stuck.append(each)
    return to, stuck


def _applied_before(state: Mapping[str, Any], database: str, migration: str) -> list[str]:
    """The migrations of the same app that were applied before this one: they stay, also those that the target does not know."""
    applied = list(state.get("applied", {}).get(database, []))
    before = applied[: applied.index(migration)] if migration in applied else []
    app = migration.split(".", 1)[0]
    return [name for own, name in (each.split(".", 1) for each in before) if own == app]


def _rehearsal(
    state: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], target: str, ahead: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """The last rehearsal in which the target ran on a copy with exactly these migrations of this release beyond its own, if it passed."""
    known = {(database, name) for database, names in state.get("known", {}).items() for name in names}
    wanted = {(each["database"], each["migration"]) for each in ahead}
    last = None
    for entry in entries:
        if entry["kind"] == "rehearsal" and entry["current"] == target and entry["release"] == ahead[-1]["release"]:
            applied = {(each["database"], migration_name(each)) for each in entry["migrations"]}
            last = entry if applied - known == wanted else last  # the backup may lack some of the target's own
    return last if last and last["outcome"] == "passed" else None


class FilterModule:
    """Gives the filters to Ansible."""

    def filters(self) -> dict[str, Any]:
        return {
            "approval_problem": approval_problem,
            "approval_statement": approval_statement,
            "gate_refusal": gate_refusal,
            "migration_command": migration_command,
            "migration_done_text": migration_done_text,
            "migration_entry": migration_entry,
            "migration_failure": migration_failure,
            "migration_limits": migration_limits,
            "migration_plan_complete": migration_plan_complete,
            "migration_plan_entry": migration_plan_entry,
            "migration_plan_text": migration_plan_text,
            "migration_program": migration_program,
            "migrations_unbearable": migrations_unbearable,
            "migrations_unknown": migrations_unknown,
            "reversal_problem": reversal_problem,
            "rollback_verdict": rollback_verdict,
        }

"""Pure functions on what hosts say of the ledger and the lock: which copy is right, what it tells of releases, migrations and approvals.

An entry is a dictionary as docs/reference/ledger.md describes it; `entries` are those of one copy, oldest first. A read is a result of
the module `ledger`; a host that did not answer has one without `entries`. A note is {seq, hash} of the newest entry that this controller
has seen, empty when it has seen none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

Entry = Mapping[str, Any]
RAN = ("deploy", "rollback")
WIDEST_RELEASE = 28
WIDEST_WHY = 100


def ledger_reads(results: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Host to its read, of a task that looped over the hosts."""
    return {result["item"]: result for result in results}


def ledger_choice(reads: Mapping[str, Mapping[str, Any]], note: Mapping[str, Any], inventory: str = "INVENTORY") -> dict[str, Any]:
    """The copy to believe: {host, entries, head, problem, notes}.

    That is the longest whole one that begins with what this controller has seen. problem: why there is none, and what to type; then host is
    empty. notes: what is wrong with other copies.
    """
    told = _judged(reads, note)
    best = told["best"]
    if not best:
        problem = "\n".join(_advised(told, reads, note, inventory)) or _nobody(reads)
        return {"host": "", "entries": [], "head": {}, "problem": problem, "notes": []}
    chosen = reads[best]
    notes = [*told["notes"], *(f"Ledger on {host}: {what}" for host, what in told["problems"].items())]
    return {"host": best, "entries": chosen["entries"], "head": chosen["head"], "problem": "", "notes": notes}


def ledger_problems(reads: Mapping[str, Mapping[str, Any]], note: Mapping[str, Any], inventory: str = "INVENTORY") -> list[str]:
    """A sentence for each copy that is changed, cut, forked or behind, with what to type; empty when all that answer are well and agree."""
    told = _judged(reads, note)
    return _advised(told, reads, note, inventory) or ([] if told["best"] else [_nobody(reads)])


def _nobody(reads: Mapping[str, Any]) -> str:
    return f"No host of the ledger answers ({', '.join(reads) or 'the inventory names none'})"


def _judged(reads: Mapping[str, Mapping[str, Any]], note: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the copies.

    best: host or empty. problems, behind: host to what is wrong, or only missing and there elsewhere. good: host to the number of its good
    entries. silent: hosts without an answer. notes: what is no problem.
    """
    answered = {host: read for host, read in reads.items() if "entries" in read}
    silent = [host for host in reads if host not in answered]
    notes = [f"Ledger on {host}: {_words(reads[host])}, so its copy was not looked at" for host in silent]
    notes += [f"Ledger on {host}: {read['problem']}; the next entry sets it aside" for host, read in answered.items() if read["torn"]]
    problems = {host: problem for host, read in answered.items() if (problem := _alone(read, note))}
    lengths = {host: read["head"]["seq"] for host, read in answered.items()}
    whole = sorted((host for host in answered if host not in problems), key=lambda host: -lengths[host])
    best = whole[0] if whole else ""
    behind: dict[str, str] = {}
    for host in whole[1:]:
        fork = _fork(answered[host], answered[best])
        if fork:
            problems[host] = f"from entry {fork} on it tells another story than the copy on {whole[0]}"
        elif lengths[host] < lengths[best]:
            has = f"missing, which {best} has: its end was cut, or it was down when they were written"
            behind[host] = f"{_entries(lengths[host] + 1, lengths[best])} {has}"
    seen = note["seq"] if note else 0
    if best and lengths[best] < seen:
        for host in set(whole) - set(problems):
            problems[host] = f"entries after {lengths[host]} were cut: this controller has seen {seen}"
        best, behind = "", {}
    elif any(host in problems and lengths[host] >= seen for host in whole):
        problems[best] = f"it tells another story than that on {next(host for host in whole[1:] if host in problems)}"
        best, behind = "", {}
    return {"best": best, "problems": problems, "behind": behind, "good": lengths, "silent": silent, "notes": notes}


def _words(read: Mapping[str, Any]) -> str:
    return "it does not answer" if read.get("unreachable") else str(read.get("msg") or "it did not tell").strip().rstrip(".")


def _entries(first: int, last: int) -> str:
    return f"entry {first} is" if first == last else f"entries {first} to {last} are"


def _alone(read: Mapping[str, Any], note: Mapping[str, Any]) -> str:
    """What is wrong with a copy by itself, and where it differs from what this controller has seen."""
    if read["problem"] and not read["torn"]:
        return str(read["problem"])
    if not note:
        return ""
    seen = {entry["seq"]: entry["hash"] for entry in read["entries"]}.get(note["seq"], note["hash"])
    if seen != note["hash"]:
        return f"entry {note['seq']} is not the one that this controller has seen: the end was written anew"
    return ""


def _fork(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Number of the first entry in which two whole copies differ; 0 when one is the beginning of the other."""
    theirs = {entry["seq"]: entry["hash"] for entry in other["entries"]}
    return next((entry["seq"] for entry in one["entries"] if theirs.get(entry["seq"], entry["hash"]) != entry["hash"]), 0)


def _advised(told: Mapping[str, Any], reads: Mapping[str, Any], note: Mapping[str, Any], inventory: str) -> list[str]:
    """Every problem with what to type."""
    sentences = []
    for host, problem in {**told["problems"], **told["behind"]}.items():
        heal = f"ansible-playbook -i {inventory} playbooks/ledger.yml -e heal={host}"
        other = _judged({name: read for name, read in reads.items() if name != host}, note)["best"]
        if told["best"]:
            then = f"To take the copy of {told['best']}, type:\n  {heal}"
        elif other:
            then = f"Find out which of the two is right. To take the copy of {other}, type:\n  {heal}"
        elif told["silent"]:
            then = f"{told['silent'][0]}, which does not answer, may have a good copy: bring it back first"
        else:
            good = f"{told['good'][host]} good entries"
            then = f"There is no better copy. Find out who did it. To go on with the {good} of this one, type:\n  {heal} -e alone=yes"
        sentences.append(f"Ledger on {host}: {problem}. {then}")
    return sentences


def ledger_remedy(reads: Mapping[str, Mapping[str, Any]], note: Mapping[str, Any], host: str, alone: str = "") -> dict[str, Any]:
    """What the copy on `host` shall become: {entries, problem}. That is the best copy of the others; with `alone`, its own good entries."""
    if host not in reads:
        return {"entries": [], "problem": f"{host} is no host of the ledger: one of {', '.join(reads)}"}
    if "entries" not in reads[host]:
        return {"entries": [], "problem": f"Ledger on {host}: {_words(reads[host])}"}
    if alone:
        return {"entries": reads[host]["entries"], "problem": ""}
    others = {other: read for other, read in reads.items() if other != host}
    told = _judged(others, note)
    if told["best"]:
        return {"entries": others[told["best"]]["entries"], "problem": ""}
    why = [f"on {name} {what}" for name, what in told["problems"].items()] + [f"{name} does not answer" for name in told["silent"]]
    return {"entries": [], "problem": f"No other copy is good enough to take: {'; '.join(why) or 'there is none'}"}


def ledger_bad(entries: Sequence[Entry]) -> list[str]:
    """Releases whose last deploy failed or was rolled back, and that did not run well since.

    The one that ran well last is not: when it fails on a host to which it is deployed once more, that tells of the host.
    """
    bad: dict[str, None] = {}
    good = ""
    for entry in entries:
        if entry["kind"] == "deploy" and entry.get("outcome") in ("failed", "rolled back") and entry["release"] != good:
            bad[entry["release"]] = None
        elif entry["kind"] in RAN and entry.get("outcome") == "succeeded":
            good = entry["release"]
            bad.pop(good, None)
    return list(bad)


def ledger_previous(entries: Sequence[Entry], current: str, kept: Sequence[str]) -> str:
    """The release to go back to: the newest that ran well before `current`, is among `kept` and not bad; empty when there is none.

    What a rollback has left is not gone back to, until it is deployed again.
    """
    ran: list[str] = []  # the running one last
    for entry in entries:
        if entry["kind"] not in RAN or entry.get("outcome") != "succeeded":
            continue
        release, before = entry["release"], entry.get("previous") or ""
        if entry["kind"] == "deploy" and before and before not in ran:
            ran.append(before)  # it ran before the ledger knew of it
        if entry["kind"] == "rollback" and release in ran:
            del ran[ran.index(release) + 1 :]
        else:
            ran = [*(other for other in ran if other != release), release]
    bad = ledger_bad(entries)
    return next((release for release in reversed(ran) if release != current and release in kept and release not in bad), "")


def ledger_unfinished(entries: Sequence[Entry], current: str, kept: Sequence[str], resumed: Mapping[str, str]) -> str:
    """The release, among `kept`, to which a way back leads that did not come to its end; empty when there is none.

    current: the release that the hosts run, of several the one that did not run well last. resumed: {run, purpose} of the run that was
    interrupted. Without this, a rollback that is repeated would turn round, for its target runs already on some hosts or on all.
    """
    good = ledger_previous(entries, "", kept)
    last = next((each for each in reversed(entries) if each["kind"] in RAN and each.get("outcome") != "refused"), {})
    run = str(resumed.get("run", ""))
    target = ""
    if run.startswith("rollback-"):
        target = current if current != good else ""
    elif run.startswith("deploy-"):
        target = good
    elif last.get("outcome") == "failed" and last["kind"] == "rollback":
        target = str(last["release"])
    elif last.get("outcome") == "failed" and last.get("went_back"):
        target = str(last.get("previous") or "")
    return target if target in kept else ""


def _newest(entries: Sequence[Entry], kind: str, **wanted: str) -> Entry:
    found = (e for e in reversed(entries) if e["kind"] == kind and all(e.get(key) == value for key, value in wanted.items()))
    return next(found, {})


def ledger_rehearsal(entries: Sequence[Entry], current: str, release: str) -> dict[str, Any]:
    """The newest rehearsal of `release` while `current` ran; empty when there was none."""
    return dict(_newest(entries, "rehearsal", current=current, release=release))


def ledger_longest(reads: Mapping[str, Mapping[str, Any]]) -> list[Entry]:
    """The longest good part of any copy, where no copy is right."""
    return max((list(read.get("entries", [])) for read in reads.values()), key=len, default=[])


def ledger_text(entries: Sequence[Entry], limit: int | str = 20, run: str = "", kind: str = "") -> str:
    """The newest `limit` entries as a table for people, oldest first; of one run or kind, when they are named."""
    chosen = [e for e in entries if run in ("", e["run"]) and kind in ("", e["kind"])]
    rows = [["no.", "when (UTC)", "kind", "release", "outcome", "who", "why"]]
    rows += [_row(entry) for entry in chosen[max(len(chosen) - int(limit), 0) :]]
    if len(rows) == 1:
        return "The ledger has no such entry." if entries else "The ledger is empty."
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    left_out = len(chosen) - (len(rows) - 1)
    return "\n".join([*lines, f"and {left_out} older: -e limit={len(chosen)} shows all"] if left_out else lines)


def _row(entry: Entry) -> list[str]:
    when = datetime.fromisoformat(entry["at"]).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    release = str(entry.get("release") or "")
    release = release if len(release) <= WIDEST_RELEASE else f"{release[: WIDEST_RELEASE - 1]}…"
    why = " ".join(_why(entry).split())
    why = why if len(why) <= WIDEST_WHY else f"{why[: WIDEST_WHY - 1]}…"
    return [str(entry["seq"]), when, entry["kind"], release, str(entry.get("outcome") or ""), entry["who"], why]


def _why(entry: Entry) -> str:
    """The rest of an entry in one line: its reason, or what its kind has instead."""
    fingerprint, seconds = entry.get("fingerprint", ""), entry.get("seconds")
    parts = {
        "plan": [f"plan {fingerprint} was shown"],
        "approval": [f"plan {fingerprint} approved by {entry.get('by')} ({entry.get('how')})"],
        "migration": [f"{len(entry.get('migrations', []))} migrations of plan {fingerprint}"],
        "rehearsal": [f"while {entry.get('current')} ran"],
        "deploy": [f"after {entry['previous']}"] if entry.get("previous") else [],
        "rollback": [f"from {entry.get('previous')}"],
    }.get(entry["kind"], [])
    took = [f"{seconds:.0f} s"] if isinstance(seconds, int | float) else []
    return "; ".join([*([str(entry["why"])] if entry.get("why") else []), *parts, *took])


def record_notes(choice: Mapping[str, Any], appended: Mapping[str, Any], copied: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a person should know after an entry was recorded. copied: the results of the other copies."""
    results = ledger_reads(copied)
    notes = [note for note in choice["notes"] if not any(note.startswith(f"Ledger on {host}:") for host in results)]
    if appended.get("note"):
        notes.append(f"Ledger on {choice['host']}: {appended['note']}")
    for host, result in results.items():
        if "entries" not in result:
            notes.append(f"Ledger on {host}: the entry was not copied: {_words(result)}")
        elif result["added"] > 1:
            notes.append(f"Ledger on {host}: it lacked {result['added'] - 1} entries, and has them now")
        if result.get("note"):
            notes.append(f"Ledger on {host}: {result['note']}")
    return notes


def lock_judged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the hosts say of the lock: {problem, notes, taken: hosts on which this call took it, resumed: {run, purpose} or {}, who}."""
    asked = [result for result in results if not result.get("skipped")]
    answers = [result for result in asked if "lock" in result]
    silent = [result["item"] for result in asked if result.get("unreachable")]
    refused = [answer["refused"] for answer in answers if answer.get("refused")]
    refused += [f"{result['item']}: {_words(result)}" for result in asked if "lock" not in result and not result.get("unreachable")]
    if not answers and not refused:
        refused = [f"Whether another run is at work cannot be known: no answer from {', '.join(silent)}"]
    told = {(answer["lock"].get("id"), str(answer.get("resumed"))): answer["note"] for answer in reversed(answers) if answer.get("note")}
    notes = list(reversed(told.values()))
    if answers and silent:
        notes.append(f"No answer from {', '.join(silent)}: the lock counts on {', '.join(answer['item'] for answer in answers)} alone")
    return {
        "problem": refused[0] if refused else "",
        "notes": notes,
        "taken": [answer["item"] for answer in answers if answer.get("taken")],
        "resumed": next((answer["resumed"] for answer in answers if answer.get("resumed")), {}),
        "who": answers[0]["who"] if answers else "",
    }


def unlock_notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the lock was not given back, in words: a host that is down, or somebody has taken it over."""
    notes = []
    for result in results:
        if result.get("unreachable"):
            notes.append(f"{result['item']} does not answer: if it holds the lock, your next run takes it over")
        elif "lock" not in result:
            notes.append(f"{result['item']}: the lock was not given back: {_words(result)}")
        elif result["note"]:
            notes.append(f"{result['item']}: {result['note']}")
    return notes


class FilterModule:
    """Filters of the ledger and the lock."""

    def filters(self) -> dict[str, Any]:
        return {
            "ledger_reads": ledger_reads,
            "ledger_choice": ledger_choice,
            "ledger_problems": ledger_problems,
            "ledger_remedy": ledger_remedy,
            "ledger_bad": ledger_bad,
            "ledger_previous": ledger_previous,
            "ledger_unfinished": ledger_unfinished,
            "ledger_rehearsal": ledger_rehearsal,
            "ledger_longest": ledger_longest,
            "ledger_text": ledger_text,
            "record_notes": record_notes,
            "lock_judged": lock_judged,
            "unlock_notes": unlock_notes,
        }

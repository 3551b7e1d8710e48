"""The ledger: whatever is changed, cut or forked is found and named, a crash costs nothing, and what deploys ask it for is right."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, load

import filter_plugins.ledger as ledger

module = load(ROOT / "library/ledger.py", "evk_ledger")

COMMON = {"run": "deploy-20261122-234151-1f3a", "who": "alice@controller"}
ZERO = "0" * 64


def run(directory: Path, state: str = "read", check_mode: bool = False, **params: Any) -> dict[str, Any]:
    """The module's result."""
    given = {name: option.get("default") for name, option in module.ARGUMENT_SPEC.items()}
    result: dict[str, Any] = module.work({**given, "state": state, "directory": str(directory), **params}, check_mode=check_mode)
    return result


def append(directory: Path, release: str = "1.0", **data: Any) -> dict[str, Any]:
    return run(directory, "appended", entry={**COMMON, "kind": "deploy", "release": release, "outcome": "succeeded", **data})


def file_of(directory: Path) -> Path:
    return directory / "ledger.jsonl"


def lines_of(directory: Path) -> list[str]:
    return file_of(directory).read_text().splitlines()


def write(directory: Path, lines: Sequence[str]) -> None:
    file_of(directory).write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A ledger of five entries."""
    directory = tmp_path / "state/one"
    for number in range(5):
        append(directory, f"1.{number}", why="größer\n„als“")
    return directory


@pytest.fixture
def two(one: Path, tmp_path: Path) -> Path:
    """Its copy."""
    directory = tmp_path / "state/two"
    run(directory, "copied", entries=run(one)["entries"])
    return directory


def forged(line: str, **changes: Any) -> str:
    """A line that was changed by somebody who knows how its hash is made."""
    entry = {key: value for key, value in {**json.loads(line), **changes}.items() if key != "hash"}
    style: dict[str, Any] = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False}
    return json.dumps({**entry, "hash": hashlib.sha256(json.dumps(entry, **style).encode()).hexdigest()}, **style)


def test_entries_are_chained_and_can_be_verified_by_hand(one: Path) -> None:
    assert (one.stat().st_mode & 0o777, file_of(one).stat().st_mode & 0o777) == (0o750, 0o640)
    lines = lines_of(one)
    entries = [json.loads(line) for line in lines]
    assert [entry["seq"] for entry in entries] == [1, 2, 3, 4, 5]
    assert [entry["prev"] for entry in entries] == [ZERO, *(entry["hash"] for entry in entries[:-1])]
    for line, entry in zip(lines, entries, strict=True):
        rest = line.replace(f'"hash":"{entry["hash"]}",', "", 1)
        assert hashlib.sha256(rest.encode()).hexdigest() == entry["hash"], "as docs/reference/ledger.md says"
    told = run(one)
    assert (told["entries"], told["problem"], told["changed"]) == (entries, "", False)
    assert told["head"] == {key: entries[-1][key] for key in ("seq", "hash", "at")}
    assert [entry["seq"] for entry in run(one, after=3)["entries"]] == [4, 5]


def test_the_program_of_the_documentation_verifies_it(one: Path) -> None:
    page = (ROOT / "docs/reference/ledger.md").read_text()
    program = page.partition("```python\n")[2].partition("```")[0].replace("/var/lib/evenkeel/ledger", str(one))
    done = subprocess.run(["python", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == f"5 entries are whole; the last hash is {run(one)['head']['hash']}\n", done.stderr
    for lines, _sentence in damages(lines_of(one)).values():
        write(one, lines)
        assert subprocess.run(["python", "-c", program], capture_output=True, check=False).returncode == 1, lines


def test_a_ledger_that_does_not_exist_is_empty_and_check_mode_makes_none(tmp_path: Path) -> None:
    assert (run(tmp_path / "none")["head"], run(tmp_path / "none")["problem"]) == ({"seq": 0, "hash": ZERO, "at": ""}, "")
    told = run(tmp_path / "none", "appended", check_mode=True, entry={**COMMON, "kind": "plan"})
    assert (told["changed"], told["entry"]["seq"], list(tmp_path.iterdir())) == (True, 1, [])


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({**COMMON, "kind": "plan", "seq": 9}, "must not bring seq along"),
        ({**COMMON, "kind": ""}, "needs kind"),
        ({"kind": "plan", "run": "x"}, "needs who"),
        ({**COMMON, "kind": "plan", "seconds": float("nan")}, "cannot be written as JSON"),
    ],
)
def test_an_entry_that_cannot_be_is_refused_in_one_sentence(one: Path, entry: dict[str, Any], sentence: str) -> None:
    before = file_of(one).read_bytes()
    with pytest.raises(module.LedgerError, match=sentence):
        run(one, "appended", entry=entry)
    assert file_of(one).read_bytes() == before


def damages(lines: list[str]) -> dict[str, tuple[list[str], str]]:
    at = [json.loads(line)["at"] for line in lines]
    return {
        "changed": ([*lines[:2], lines[2].replace("1.2", "6.6"), *lines[3:]], f"entry 3 of {at[2]} was changed"),
        "blanks": ([lines[0].replace(",", ", "), *lines[1:]], f"entry 1 of {at[0]} was changed"),
        "garbage": ([*lines[:4], "x" * 20], "entry 5 was changed"),
        "forged": ([*lines[:2], forged(lines[2], release="6.6"), *lines[3:]], f"entry 4 of {at[3]} does not follow entry 3"),
        "cut out": ([lines[0], *lines[3:]], "entries 2 to 3 are missing"),
        "first cut": (lines[1:], "entry 1 is missing"),
        "doubled": ([*lines[:3], lines[1], *lines[3:]], "entry 2 stands where entry 4 should"),
    }


@pytest.mark.parametrize("damage", ["changed", "blanks", "garbage", "forged", "cut out", "first cut", "doubled"])
def test_the_first_broken_place_is_named_and_nothing_is_written_behind_it(one: Path, damage: str) -> None:
    lines, sentence = damages(lines_of(one))[damage]
    write(one, lines)
    told = run(one)
    assert told["problem"].startswith(sentence)
    assert not told["torn"]
    before = file_of(one).read_bytes()
    with pytest.raises(module.LedgerError, match="so nothing is added behind it"):
        append(one)
    assert file_of(one).read_bytes() == before


@pytest.mark.parametrize("keep", [1, 40, -1])
def test_a_line_that_a_crash_tore_is_kept_aside_and_nothing_before_it_is_lost(one: Path, keep: int) -> None:
    whole = file_of(one).read_bytes()
    torn = (lines_of(one)[4].encode() + b"\n")[:keep]
    file_of(one).write_bytes(whole + torn)
    told = run(one)
    assert (told["torn"], told["problem"], len(told["entries"])) == (True, "the last line is torn: a crash while it was written", 5)
    told = append(one, "1.5")
    kept = next(path for path in one.iterdir() if ".torn-" in path.name)
    assert (kept.read_bytes(), str(kept) in told["note"]) == (torn, True)
    assert (run(one)["problem"], len(run(one)["entries"])) == ("", 6)
    assert file_of(one).read_bytes().startswith(whole)


def test_a_full_disk_leaves_no_half_line(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file_of(one).read_bytes()
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) < 60:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:50])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(module.LedgerError, match=r"nothing was added: .*No space left on device"):
        append(one)
    assert file_of(one).read_bytes() == before


def test_two_writers_at_once_lose_nothing(one: Path) -> None:
    code = "import sys; sys.path[:0] = ['tests/unit', '.']; import conftest, test_ledger as t; from pathlib import Path\n"
    code += f"for n in range(20): t.append(Path({str(one)!r}))"
    writers = [subprocess.Popen(["python", "-c", code], cwd=ROOT) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert (run(one)["problem"], len(run(one)["entries"])) == ("", 65)


def test_a_copy_takes_what_it_lacks_once_and_byte_for_byte(one: Path, two: Path) -> None:
    told = append(one, after=0)
    more = run(one, after=3)["entries"]
    assert run(two, "copied", check_mode=True, entries=more)["added"] == 1
    assert (run(two, "copied", entries=more)["added"], run(two, "copied", entries=more)["changed"]) == (1, False)
    assert file_of(two).read_bytes() == file_of(one).read_bytes()
    assert told["entry"] == run(two)["entries"][-1]
    append(one)
    append(one)
    with pytest.raises(module.LedgerError, match="entry 7 is missing here, and not among those to copy"):
        run(two, "copied", entries=run(one, after=7)["entries"])


def test_a_fork_is_named_and_never_overwritten_unless_asked_for(one: Path, two: Path) -> None:
    append(one, "2.0")
    append(two, "3.0")
    before = file_of(two).read_bytes()
    with pytest.raises(module.LedgerError, match=r"entry 6 of .* differs from the one of the other copy"):
        run(two, "copied", entries=run(one)["entries"])
    forged_entry = json.loads(forged(lines_of(one)[5], release="6.6", seq=7))
    with pytest.raises(module.LedgerError, match=r"does not continue this copy: entry 7 of .* does not follow entry 6"):
        run(two, "copied", entries=[forged_entry])
    assert file_of(two).read_bytes() == before
    told = run(two, "copied", entries=run(one)["entries"], aside=True)
    kept = next(path for path in two.iterdir() if path.name != "ledger.jsonl")
    assert (kept.read_bytes(), str(kept) in told["note"], told["changed"]) == (before, True, True)
    assert file_of(two).read_bytes() == file_of(one).read_bytes()
    assert run(two, "copied", entries=run(one)["entries"], aside=True)["changed"] is False


def test_the_module_runs_as_ansible_runs_it(one: Path) -> None:
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
    entry = {**COMMON, "kind": "plan", "fingerprint": "0123456789abcdef", "why": "{{ 7 * 7 }}"}
    asked = json.dumps({"state": "appended", "directory": str(one), "entry": entry})
    words = ["localhost", "-i", "localhost,", "-c", "local", "-m", "ledger", "-a", asked]
    done = subprocess.run(["ansible", *words], cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run(one)["entries"][-1]["seq"] == 6


# what the controller makes of the copies


def judge(*directories: Path, note: dict[str, Any] | None = None, down: str = "") -> tuple[dict[str, Any], list[str]]:
    """Choice and problems of these copies, on hosts with the directories' names."""
    reads: dict[str, Any] = {directory.name: run(directory) for directory in directories}
    if down:
        reads[down] = {"unreachable": True, "msg": "no route"}
    return ledger.ledger_choice(reads, note or {}, "INV"), ledger.ledger_problems(reads, note or {}, "INV")


def note_of(directory: Path) -> dict[str, Any]:
    head = run(directory)["head"]
    return {"seq": head["seq"], "hash": head["hash"]}


def test_copies_that_agree_are_no_problem(one: Path, two: Path) -> None:
    choice, problems = judge(one, two, note=note_of(one))
    assert (choice["host"], len(choice["entries"]), choice["problem"], choice["notes"], problems) == ("one", 5, "", [], [])
    choice, problems = judge(one, note=note_of(one), down="two")
    assert (choice["host"], problems) == ("one", [])
    assert choice["notes"] == ["Ledger on two: it does not answer, so its copy was not looked at"]


def test_nobody_answers() -> None:
    choice, problems = judge(down="one")
    assert choice["problem"] == "No host of the ledger answers (one)"
    assert problems == ["No host of the ledger answers (one)"]


def test_a_changed_copy_is_named_and_the_other_believed(one: Path, two: Path) -> None:
    write(one, damages(lines_of(one))["changed"][0])
    choice, problems = judge(one, two, note=note_of(two))
    assert (choice["host"], choice["problem"], len(choice["entries"])) == ("two", "", 5)
    assert "entry 3 of" in choice["notes"][0]
    assert len(problems) == 1
    assert problems[0].startswith("Ledger on one: entry 3 of ")
    assert problems[0].endswith("To take the copy of two, type:\n  ansible-playbook -i INV playbooks/ledger.yml -e heal=one")


def test_a_cut_end_is_seen_by_the_other_copy_and_by_this_controller(one: Path, two: Path) -> None:
    note = note_of(one)
    write(one, lines_of(one)[:3])
    choice, problems = judge(one, two)
    assert choice["host"] == "two"
    assert "Ledger on one: entries 4 to 5 are missing, which two has" in problems[0]
    choice, problems = judge(one, note=note)
    assert (choice["host"], "Ledger on one: entries after 3 were cut: this controller has seen 5" in choice["problem"]) == ("", True)
    assert "go on with the 3 good entries of this one" in problems[0] and "-e heal=one -e alone=yes" in problems[0]
    assert "two, which does not answer, may have a good copy" in judge(one, note=note, down="two")[1][0]
    write(two, lines_of(two)[:3])
    choice, problems = judge(one, two, note=note)
    assert (choice["host"], len(problems), "alone=yes" in problems[0]) == ("", 2, True)


def test_an_end_that_was_written_anew_is_seen_by_this_controller(one: Path, two: Path) -> None:
    note = note_of(one)
    write(one, lines_of(one)[:4])
    append(one, "6.6")
    choice, problems = judge(one, note=note)
    assert "entry 5 is not the one that this controller has seen" in choice["problem"]
    choice, problems = judge(one, two, note=note)
    assert (choice["host"], len(problems)) == ("two", 1)


def test_a_fork_that_nobody_can_decide_stops_and_is_a_persons_choice(one: Path, two: Path) -> None:
    note = note_of(one)
    append(one, "2.0")
    append(two, "3.0")
    choice, problems = judge(one, two, note=note)
    assert choice["host"] == ""
    assert "Ledger on two: from entry 6 on it tells another story than the copy on one" in choice["problem"]
    assert len(problems) == 2
    assert all("Find out which of the two is right" in problem for problem in problems)
    assert judge(one, two, note=note_of(two))[0]["host"] == "two"


def test_the_remedy_is_the_others_copy_or_the_own_good_part(one: Path, two: Path) -> None:
    note = note_of(one)
    write(one, lines_of(one)[:2])
    reads = {"one": run(one), "two": run(two), "three": {"unreachable": True}}
    assert len(ledger.ledger_remedy(reads, note, "one")["entries"]) == 5
    assert len(ledger.ledger_remedy(reads, note, "one", "yes")["entries"]) == 2
    refused = ledger.ledger_remedy(reads, note, "two")["problem"]
    assert refused.startswith("No other copy is good enough to take: on one entries after 2 were cut")
    assert refused.endswith("; three does not answer")
    assert ledger.ledger_remedy({"one": reads["one"]}, note, "one")["problem"].endswith("take: there is none")
    assert ledger.ledger_remedy(reads, note, "three")["problem"] == "Ledger on three: it does not answer"
    assert ledger.ledger_remedy(reads, note, "four")["problem"] == "four is no host of the ledger: one of one, two, three"


def test_a_torn_copy_is_a_note(one: Path) -> None:
    with file_of(one).open("a") as file:
        file.write("{")
    choice, problems = judge(one)
    assert (choice["host"], problems) == ("one", [])
    assert choice["notes"] == ["Ledger on one: the last line is torn: a crash while it was written; the next entry sets it aside"]


def test_what_a_record_tells() -> None:
    choice = {"host": "a", "notes": ["Ledger on b: entry 3 was changed", "Ledger on d: it does not answer"]}
    copied = [{"item": "b", "msg": "entry 3 was changed"}, {"item": "c", "entries": [], "added": 3, "note": ""}]
    assert ledger.record_notes(choice, {"note": "torn"}, copied) == [
        "Ledger on d: it does not answer",
        "Ledger on a: torn",
        "Ledger on b: the entry was not copied: entry 3 was changed",
        "Ledger on c: it lacked 2 entries, and has them now",
    ]
    assert ledger.record_notes({"host": "a", "notes": []}, {"note": ""}, [{"item": "c", "entries": [], "added": 1, "note": ""}]) == []


# what deploys ask it for


def story(*told: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Entries from (kind, release, outcome, previous)."""
    return [
        {
            **COMMON,
            "seq": n,
            "at": f"2026-11-22T23:{n:02}:00+00:00",
            **dict(zip(("kind", "release", "outcome", "previous"), one, strict=True)),
        }
        for n, one in enumerate(told, 1)
    ]


A_B = (("deploy", "A", "succeeded", ""), ("deploy", "B", "succeeded", "A"))
A_C = (*A_B, ("deploy", "C", "succeeded", "B"))


@pytest.mark.parametrize(
    ("told", "bad"),
    [
        (A_B, []),
        ((*A_B, ("deploy", "C", "rolled back", "B")), ["C"]),
        ((*A_B, ("deploy", "C", "failed", "B"), ("deploy", "D", "refused", "B")), ["C"]),
        ((*A_B, ("deploy", "C", "failed", "B"), ("deploy", "C", "succeeded", "B")), []),
        ((*A_B, ("deploy", "C", "failed", "B"), ("rollback", "C", "succeeded", "B")), []),
        ((*A_B, ("deploy", "C", "failed", "B"), ("rollback", "C", "failed", "B")), ["C"]),
        ((*A_B, ("deploy", "B", "failed", "B")), []),  # that tells of a host
    ],
)
def test_bad_releases(told: tuple[Any, ...], bad: list[str]) -> None:
    assert ledger.ledger_bad(story(*told)) == bad


@pytest.mark.parametrize(
    ("told", "current", "kept", "previous"),
    [
        (A_B, "B", "AB", "A"),
        (A_B, "B", "B", ""),
        (A_B, "A", "AB", "B"),
        ((), "B", "AB", ""),
        ((("deploy", "B", "succeeded", "A"),), "B", "AB", "A"),  # A ran before there was a ledger
        ((*A_B, ("deploy", "C", "failed", "B")), "C", "ABC", "B"),
        ((*A_C, ("deploy", "B", "failed", "C"), ("deploy", "D", "succeeded", "C")), "C", "ABD", "D"),
        ((*A_C, ("deploy", "B", "failed", "C"), ("deploy", "D", "succeeded", "C")), "D", "ABD", "A"),  # B is bad
        ((*A_B, ("rollback", "A", "succeeded", "B")), "A", "AB", ""),  # not back to what was left
        ((*A_B, ("rollback", "A", "succeeded", "B"), ("deploy", "B", "succeeded", "A")), "B", "AB", "A"),
        ((*A_B, ("rollback", "A", "succeeded", "B"), ("rollback", "B", "succeeded", "A")), "B", "AB", "A"),
        ((*A_B, ("deploy", "C", "succeeded", "B"), ("rollback", "A", "succeeded", "C")), "A", "ABC", ""),
        ((*A_B, ("rollback", "A", "failed", "B")), "B", "AB", "A"),
        ((*A_B, ("deploy", "A", "succeeded", "B")), "A", "AB", "B"),
    ],
)
def test_the_release_to_go_back_to(told: tuple[Any, ...], current: str, kept: str, previous: str) -> None:
    assert ledger.ledger_previous(story(*told), current, list(kept)) == previous


WENT_BACK = {"kind": "deploy", "release": "C", "outcome": "failed", "previous": "B", "went_back": True}


@pytest.mark.parametrize(
    ("told", "current", "resumed", "target"),
    [
        (A_B, "B", "", ""),
        (A_B, "A", "rollback-1", "A"),  # on some hosts, or on all
        (A_B, "B", "rollback-1", ""),  # it had switched none: it chooses anew
        (A_B, "C", "deploy-1", "B"),
        (A_B, "B", "deploy-1", "B"),  # it had switched none: that is where it goes back to
        (A_B, "X", "rollback-1", ""),  # not on all hosts
        ((*A_B, ("rollback", "A", "failed", "B")), "A", "", "A"),
        ((*A_B, ("rollback", "A", "failed", "B"), ("rollback", "A", "refused", "B")), "A", "", "A"),
        ((*A_B, ("rollback", "A", "failed", "B"), ("rollback", "A", "succeeded", "B")), "A", "", ""),
        ((*A_B, ("deploy", "C", "failed", "B")), "C", "", ""),  # it stays on C: the usual way back
        ((*A_B, ("deploy", "C", "rolled back", "B")), "B", "", ""),
    ],
)
def test_a_way_back_that_was_not_finished_is_gone_on_with(told: tuple[Any, ...], current: str, resumed: str, target: str) -> None:
    assert ledger.ledger_unfinished(story(*told), current, ["A", "B", "C"], {"run": resumed} if resumed else {}) == target


def test_so_is_one_that_a_deploy_began_by_itself() -> None:
    entries = [*story(*A_B), {**COMMON, **WENT_BACK, "seq": 3, "at": "t3"}]
    assert ledger.ledger_unfinished(entries, "B", ["A", "B", "C"], {}) == "B"


def test_the_newest_rehearsal_of_a_release_while_another_ran() -> None:
    base = {**COMMON, "release": "B", "kind": "rehearsal"}
    entries = [
        {**base, "at": "t5", "current": "A", "outcome": "failed"},
        {**base, "at": "t6", "current": "A", "outcome": "passed"},
        {**base, "at": "t7", "current": "Z", "outcome": "failed"},
    ]
    assert (ledger.ledger_rehearsal(entries, "A", "B")["at"], ledger.ledger_rehearsal(entries, "B", "A")) == ("t6", {})


def test_the_table_for_people() -> None:
    entries = story(*A_B, ("deploy", "C", "rolled back", "B"))
    entries[2].update(why="/login answered 500,\n" + "x" * 200, seconds=31.6)
    text = ledger.ledger_text(entries, "2")
    assert text.splitlines()[0].split() == ["no.", "when", "(UTC)", "kind", "release", "outcome", "who", "why"]
    assert "3    2026-11-22 23:03:00  deploy  C        rolled back  alice@controller  /login answered 500, xxx" in text
    assert text.splitlines()[-1] == "and 1 older: -e limit=3 shows all"
    assert len(text.splitlines()) == 4
    assert ledger.ledger_text(entries, 20, kind="plan") == "The ledger has no such entry."
    assert ledger.ledger_text([]) == "The ledger is empty."


def test_a_text_that_is_no_utf8_does_not_lose_the_entry(tmp_path: Path) -> None:
    append(tmp_path, why="no file \udcff", migrations=[{"name": "a\udc80"}])
    (entry,) = run(tmp_path, "read")["entries"]
    assert (entry["why"], entry["migrations"]) == ("no file ?", [{"name": "a?"}])

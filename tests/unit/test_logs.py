"""The program that writes the log files (P2): every line once, whatever it is interrupted by."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, load

logs = load(ROOT / "roles/process/files/logs.py", "evk_logs")

Entry = dict[str, bytes]
WEB, WORKER = "pier-web.service", "pier-worker.service"


class PowerCut(BaseException):
    """The program ends here, as by SIGKILL."""


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test does not wait for the disk."""

    def fsync(descriptor: int) -> None:
        os.fstat(descriptor)

    monkeypatch.setattr(logs.os, "fsync", fsync)


def entry(text: str, unit: str = WEB, **more: str) -> Entry:
    fields = {"_SYSTEMD_UNIT": unit, "MESSAGE": text, "_STREAM_ID": "s1", **more}
    return {name: value.encode() for name, value in fields.items()}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "log").mkdir()
    (tmp_path / "state").mkdir()
    return {"directory": str(tmp_path / "log"), "max_bytes": 100, "backups": 3, "units": {WEB: "web", WORKER: "worker"}}


@pytest.fixture
def begin(settings: dict[str, Any], tmp_path: Path) -> Callable[[], Any]:
    """A start of the program, without the journal."""
    return lambda: logs.Logs(settings, tmp_path / "state/state.json")


def feed(instance: Any, journal: list[Entry], *, end: bool = True) -> None:
    """Read on in the journal, whose cursors are positions in it."""
    for number in range(int(instance.cursor) + 1 if instance.cursor else 0, len(journal)):
        instance.add(journal[number], str(number))
    instance.flush()
    if end:
        instance.save()


def text_of(folder: Path, name: str = "web") -> str:
    """What the file and its backups hold, oldest first."""
    files = [folder / "log" / f"{name}.log{suffix}" for suffix in (".3", ".2", ".1", "")]
    return "".join(file.read_text() for file in files if file.exists())


def test_each_process_has_its_file_and_others_are_left_alone(begin: Callable[[], Any], tmp_path: Path) -> None:
    (tmp_path / "log/gone.log").write_text("of a process that has left the contract\n")
    feed(begin(), [entry("a"), entry("b", WORKER), entry("x", "other.service"), entry("c")])
    assert text_of(tmp_path) == "a\nc\n"
    assert text_of(tmp_path, "worker") == "b\n"
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["gone.log", "web.log", "worker.log"]
    assert (tmp_path / "log/web.log").stat().st_mode & 0o777 == 0o640 & ~os.umask(os.umask(0))


def test_files_are_rotated_at_their_size_with_whole_lines_and_three_backups(begin: Callable[[], Any], tmp_path: Path) -> None:
    feed(begin(), [entry(f"{number:09}") for number in range(75)])  # ten bytes each
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "log").glob("web*")}
    assert sizes == {"web.log": 50, "web.log.1": 100, "web.log.2": 100, "web.log.3": 100}
    assert text_of(tmp_path).split() == [f"{number:09}" for number in range(40, 75)]


def test_a_line_that_does_not_fit_begins_the_next_file(begin: Callable[[], Any], tmp_path: Path) -> None:
    feed(begin(), [entry("a" * 60), entry("b" * 60), entry("c" * 300), entry("d")])
    assert [len((tmp_path / "log" / name).read_text()) for name in ("web.log.3", "web.log.2", "web.log.1", "web.log")] == [61, 61, 301, 2]


def test_a_line_that_the_journal_has_cut_comes_out_whole_and_unmixed(begin: Callable[[], Any], tmp_path: Path) -> None:
    cut = {"_LINE_BREAK": "line-max"}
    journal = [entry("be", **cut), entry("other", _STREAM_ID="s2"), entry("gin", **cut)]
    first = begin()
    feed(first, journal)
    assert text_of(tmp_path) == "other\n"
    feed(begin(), [*journal, entry("ning"), entry("no newline", _LINE_BREAK="eof")])
    assert text_of(tmp_path) == "other\nbeginning\nno newline\n"


def test_a_line_without_an_end_is_written_after_a_while_and_an_endless_one_in_pieces(
    begin: Callable[[], Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["max_bytes"] = 10_000_000
    instance = begin()
    feed(instance, [entry("half", _LINE_BREAK="line-max")])
    instance.end_lines()
    assert text_of(tmp_path) == ""
    later = instance.clock() + 11
    instance.clock = lambda: later
    instance.end_lines()
    feed(instance, [])
    assert text_of(tmp_path) == "half\n"
    feed(begin(), [entry("half"), *[entry("x" * 400_000, _LINE_BREAK="line-max")] * 5])
    assert [len(line) for line in text_of(tmp_path).splitlines()] == [4, 1_200_000]


def test_what_was_written_after_the_last_save_is_written_once(begin: Callable[[], Any], tmp_path: Path) -> None:
    journal = [entry(str(number)) for number in range(8)]
    feed(begin(), journal[:3])
    feed(begin(), journal[:6], end=False)  # killed before it saved
    assert text_of(tmp_path).split() == list("012345")
    feed(begin(), journal)
    assert text_of(tmp_path).split() == list("01234567")


STEPS = ("replace", "fsync", "open", "write", "ftruncate")


@pytest.fixture
def cut_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Arms a power cut at the n-th call that touches the disk; half of the calls have had their effect by then."""
    calls = {"left": -1}

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls["left"] -= 1
            if calls["left"] == 0:
                raise PowerCut
            if calls["left"] == 1 and real.__name__ == "write":
                return real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            return real(*arguments, **options)

        return call

    for name in STEPS:
        monkeypatch.setattr(logs.os, name, wrap(getattr(os, name)))
    yield lambda number: calls.update(left=number)
    calls["left"] = -1


def test_killed_at_any_step_it_writes_every_line_once(
    begin: Callable[[], Any], settings: dict[str, Any], tmp_path: Path, cut_at: Callable[[int], None]
) -> None:
    """The whole way, rotations included, is cut at its first step, then at its second, and so on until it ends by itself."""
    settings["backups"] = 9
    journal: list[Entry] = []
    wanted: dict[str, list[str]] = {"web": [], "worker": []}
    for number in range(120):
        process, unit = ("worker", WORKER) if number % 3 == 0 else ("web", WEB)
        text = f"{number:09}"
        if number % 4 == 0:  # the journal has cut this one
            journal.append(entry(text[:4], unit, _LINE_BREAK="line-max"))
        journal.append(entry(text[4:] if number % 4 == 0 else text, unit))
        wanted[process].append(text)
    ends = 0
    for step in range(1, 400):
        for path in [*(tmp_path / "log").iterdir(), *(tmp_path / "state").iterdir()]:
            path.unlink()
        cut_at(step)
        try:
            for stop in (61, 90, len(journal)):
                feed(begin(), journal[:stop])
        except PowerCut:
            pass
        else:
            ends += 1
        cut_at(-1)
        feed(begin(), journal)
        for name, lines in wanted.items():
            files = sorted((tmp_path / "log").glob(f"{name}.log*"), key=lambda path: int(path.suffix[1:] if path.suffix != ".log" else 0))
            assert "".join(path.read_text() for path in reversed(files)).split() == lines, (step, name)
            assert all(path.stat().st_size <= 100 for path in files), step
        if ends:
            return
    raise AssertionError("it never came to its end")


def test_a_full_disk_costs_nothing_once_there_is_room(begin: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = [entry(str(number)) for number in range(9)]
    feed(begin(), journal[:3])

    def full(descriptor: int, data: bytes) -> int:
        os.pwrite(descriptor, data[:1], 0)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(logs.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            feed(begin(), journal[:7])
    feed(begin(), journal)
    assert text_of(tmp_path).split() == list("012345678")


def test_a_file_that_somebody_took_away_is_begun_anew(begin: Callable[[], Any], tmp_path: Path) -> None:
    instance = begin()
    journal = [entry("a")]
    feed(instance, journal)
    (tmp_path / "log/web.log").rename(tmp_path / "taken")
    feed(instance, [*journal, entry("b")])
    assert text_of(tmp_path) == "b\n"
    (tmp_path / "taken").write_text("put there by hand, longer than what was recorded\n")
    (tmp_path / "taken").rename(tmp_path / "log/web.log")
    feed(begin(), [*journal, entry("b"), entry("c")])
    assert text_of(tmp_path).endswith("recorded\nc\n"), "only its own file is cut"


def test_fewer_backups_than_before_remove_the_rest(begin: Callable[[], Any], settings: dict[str, Any], tmp_path: Path) -> None:
    journal = [entry(f"{number:09}") for number in range(45)]
    feed(begin(), journal)
    settings["backups"] = 1
    feed(begin(), [*journal, *[entry(f"{number:09}") for number in range(45, 60)]])
    assert sorted(path.name for path in (tmp_path / "log").glob("web*")) == ["web.log", "web.log.1"]


def test_the_state_is_saved_after_the_files_have_reached_the_disk(
    begin: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut could leave a state that promises more than the files hold."""
    order: list[str] = []
    real_replace = os.replace
    instance = begin()
    names = {instance.files["web"].descriptor: "web.log"}

    def fsync(descriptor: int) -> None:
        order.append(f"sync {names.get(descriptor, 'other')}")

    def replace(source: Any, target: Any, **options: Any) -> None:
        order.append(f"replace {Path(target).name}")
        real_replace(source, target, **options)

    monkeypatch.setattr(logs.os, "fsync", fsync)
    monkeypatch.setattr(logs.os, "replace", replace)
    feed(instance, [entry("a")])
    assert order == ["sync web.log", "sync other", "replace state.json", "sync other"]
    saved: Mapping[str, Any] = json.loads((tmp_path / "state/state.json").read_text())
    assert saved["files"]["web"][1] == 2

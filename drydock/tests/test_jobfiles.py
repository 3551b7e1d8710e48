"""Job files: many processes read and write one, some are killed, and every update that was made is there."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import portalocker
import pytest

from conftest import SERVERS
from drydock import jobfiles
from drydock.jobfiles import JobFile, JobFileError

PROCESSES, INCREMENTS = 32, 25
# Forked: they touch nothing but the file, and start at once.
FORK = multiprocessing.get_context("fork")
# A file of many pages: a torn read would show.
PADDING = "x" * 40_000


@pytest.fixture
def file(tmp_path: Path) -> JobFile:
    return JobFile(tmp_path / "job.json", timeout_seconds=60)


def whole(content: dict[str, Any]) -> bool:
    """Say whether this is the content after some number of updates, all of them and no half ones."""
    counts = [value for key, value in content.items() if key.startswith("by-")]
    return content == {} or (sum(counts) == content["total"] and content["padding"] == PADDING)


def increment(file: JobFile, who: int) -> None:
    def more(content: dict[str, Any]) -> dict[str, Any]:
        assert whole(content), "a half-made update was read"
        mine = f"by-{who}"
        return content | {
            "total": content.get("total", 0) + 1, mine: content.get(mine, 0) + 1, "padding": PADDING,
        }  # fmt: skip

    file.change(more)


def hammer(file: JobFile, who: int, increments: int, told: Connection) -> None:
    """Read and increment, and tell of each increment that was made."""
    for _ in range(increments):
        increment(file, who)
        told.send_bytes(b"1")
        assert whole(file.read()), "a half-made update was read"


def start(file: JobFile, who: int, increments: int) -> tuple[Any, Connection]:
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=hammer, args=(file, who, increments, theirs))
    process.start()
    theirs.close()
    return process, ours


def increments_told(told: Connection) -> int:
    count = 0
    with contextlib.suppress(EOFError):
        while told.recv_bytes():
            count += 1
    return count


def test_u2_no_reader_sees_half_a_file_and_no_update_of_32_processes_is_lost(file: JobFile) -> None:
    workers = [start(file, who, INCREMENTS) for who in range(PROCESSES)]
    told = [increments_told(pipe) for _, pipe in workers]
    for process, _ in workers:
        process.join()
    assert [process.exitcode for process, _ in workers] == [0] * PROCESSES
    content = file.read()
    assert told == [INCREMENTS] * PROCESSES
    assert [content[f"by-{who}"] for who in range(PROCESSES)] == told
    assert content["total"] == PROCESSES * INCREMENTS


def test_u2_a_killed_process_loses_no_update_and_leaves_no_lock_and_no_half_file(file: JobFile) -> None:
    victims = [start(file, who, 1_000_000) for who in range(PROCESSES // 2)]
    others = [start(file, who, INCREMENTS) for who in range(PROCESSES // 2, PROCESSES)]
    for process, pipe in victims:
        # In the midst of its work, wherever that is.
        pipe.poll(60)
        os.kill(process.pid, signal.SIGKILL)
    told = [increments_told(pipe) for _, pipe in (*victims, *others)]
    for process, _ in (*victims, *others):
        process.join()
    assert [process.exitcode for process, _ in others] == [0] * len(others)
    content = file.read()
    assert whole(content)
    made = [content[f"by-{who}"] for who in range(PROCESSES)]
    # Who was killed between an increment and the word of it has made one more than was told.
    for who in range(PROCESSES):
        assert told[who] <= made[who] <= told[who] + (who < len(victims))
    assert content["total"] == sum(made)


def test_u2_without_the_lock_the_same_hammering_loses_updates(file: JobFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Show that the test above would notice."""
    monkeypatch.setattr(JobFile, "_locked", lambda _: contextlib.nullcontext())
    # Each its own temporary file, so that only the lock is missing and not the rename.
    monkeypatch.setattr(Path, "with_name", lambda path, name: path.parent / f"{name}.{os.getpid()}")
    workers = [start(file, who, INCREMENTS) for who in range(PROCESSES)]
    told = sum(increments_told(pipe) for _, pipe in workers)
    for process, _ in workers:
        process.join()
    monkeypatch.undo()
    assert file.read()["total"] < told


def kill_while_writing(file: JobFile) -> None:
    """Be killed with half of the new content written."""

    def die(path: Path, content: str) -> int:
        path.open("w").write(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    Path.write_text = die  # type: ignore[assignment, method-assign]
    file.update(total=0)


def test_u2_a_writer_that_is_killed_in_the_midst_leaves_the_old_content(file: JobFile) -> None:
    file.update(step="gather", percent=40)
    process = FORK.Process(target=kill_while_writing, args=(file,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert file.read() == {"step": "gather", "percent": 40}
    assert file.update(percent=50) == {"step": "gather", "percent": 50}


def test_a_file_that_is_not_there_is_empty_and_a_look_makes_none(file: JobFile) -> None:
    assert file.read() == {}
    file.remove()
    assert list(file.path.parent.iterdir()) == []


def test_removing_takes_the_lock_file_too(file: JobFile) -> None:
    file.update(a=1)
    file.remove()
    assert list(file.path.parent.iterdir()) == []


def remove_often(file: JobFile, done: Any, told: Connection) -> None:
    while not done.is_set():
        told.send(file.remove().get("total", 0))


def test_u2_no_update_is_lost_while_others_remove_the_file(file: JobFile) -> None:
    """A process that waited for the lock of a removed file takes the lock of the new one."""
    done = FORK.Event()
    ours, theirs = FORK.Pipe(duplex=False)
    removing = FORK.Process(target=remove_often, args=(file, done, theirs))
    removing.start()
    theirs.close()
    workers = [start(file, who, INCREMENTS) for who in range(8)]
    removed = 0
    for process, _ in workers:
        while process.is_alive():
            removed += ours.recv()
    done.set()
    with contextlib.suppress(EOFError):
        while True:
            removed += ours.recv()
    removing.join()
    assert sum(increments_told(pipe) for _, pipe in workers) == 8 * INCREMENTS
    content = file.read()
    assert whole(content)
    assert removed + content.get("total", 0) == 8 * INCREMENTS


def test_a_change_that_fails_changes_nothing(file: JobFile) -> None:
    file.update(a=1)
    with pytest.raises(ZeroDivisionError):
        file.change(lambda content: {"a": content["a"] / 0})
    with pytest.raises(TypeError):
        file.update(a=object())
    assert file.update(b=2) == {"a": 1, "b": 2}


def test_a_lock_that_is_not_given_back_is_an_error_that_says_so(tmp_path: Path) -> None:
    file = JobFile(tmp_path / "job.json", timeout_seconds=0.1)
    file.update(a=1)
    with portalocker.Lock(tmp_path / "job.json.lock", "a"), pytest.raises(JobFileError) as caught:
        file.read()
    assert "job.json has been locked by another process for 0.1 s. See who holds it (fuser" in str(caught.value)
    assert file.read() == {"a": 1}


@pytest.mark.parametrize("text", ["{", "[]", "1", ""])
def test_what_somebody_else_wrote_is_an_error_that_says_so(file: JobFile, text: str) -> None:
    file.path.write_text(text)
    for use in (file.read, file.update):
        with pytest.raises(JobFileError, match="somebody else wrote it"):
            use()
    with pytest.raises(JobFileError, match="somebody else wrote it"):
        file.remove()
    assert file.read() == {}


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a b", "x" * 101, "a\n"])
def test_a_name_cannot_leave_the_directory(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a job file"):
        jobfiles.job_file(name)


def test_a_job_file_is_in_the_configured_directory() -> None:
    file = jobfiles.job_file("export-4f1c.a1")
    file.update(percent=3)
    assert (SERVERS.root / "run" / "jobs" / "export-4f1c.a1.json").read_text() == '{"percent": 3}'
    file.remove()


@pytest.fixture
def no_directory(tmp_path: Path) -> str:
    (tmp_path / "file").touch()
    return str(tmp_path / "file")


def test_a_directory_that_cannot_be_used_is_named_with_its_variable(no_directory: str) -> None:
    code = "from drydock.jobfiles import job_file; job_file('x')"
    environment = SERVERS.child_environment(DRYDOCK_RUN_DIR=no_directory)
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert f"{no_directory}/jobs cannot be made" in ended.stderr
    assert "Is DRYDOCK_RUN_DIR writable?" in ended.stderr

"""The slots of a processor and the process of each run.

A run is a process of its own session. It ends with its script, its time limit, a request, or its processor: what is
left of it is killed with its whole group, and the kernel ends it when the processor is killed (`run_script`).
"""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from drydock import config
from drydock.jobfiles import JobFileError, job_file
from drydock.processor import scripts
from drydock.processor.client import ProcessorError, State

logger = logging.getLogger(__name__)

# What a worker did not fetch for so long, nobody will.
KEPT_SECONDS = 600
JOB = re.compile(r"[0-9a-f-]{1,40}")


@dataclass
class Run:
    """One run of a script."""

    script: str
    parameters: Mapping[str, Any]
    job: str
    attempt: int
    state: State = State.RUNNING
    reason: str = ""
    process: subprocess.Popen[bytes] | None = None
    stopping: bool = False
    over: threading.Event = field(default_factory=threading.Event)
    ended: float = 0.0

    @property
    def id(self) -> str:
        """Return its id: whoever asks again for the same attempt gets the same run."""
        return f"{self.job}-{self.attempt}"

    @property
    def file_name(self) -> str:
        """Return the name of its job file."""
        return f"run-{self.id}"

    def describe(self) -> dict[str, Any]:
        """Return what a worker may want to know."""
        note = job_file(self.file_name).read()
        return {
            "id": self.id,
            "script": self.script,
            "state": self.state,
            "progress": note.get("progress", 0),
            "result": note.get("result") if self.state == State.DONE else None,
            "reason": self.reason,
            "again": bool(note.get("again")),
            "pid": self.process.pid if self.process else None,
        }


class Runs:
    """All runs of this processor."""

    def __init__(self, slots: int, limit_seconds: float) -> None:
        self.slots = slots
        self.limit_seconds = limit_seconds
        self.closed = False
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()

    def busy(self) -> int:
        """Return how many slots are taken."""
        with self._lock:
            return self._busy()

    def _busy(self) -> int:
        return sum(not run.over.is_set() for run in self._runs.values())

    def get(self, run_id: str) -> Run:
        """Return a run; a ProcessorError says that there is none."""
        with self._lock:
            if run := self._runs.get(run_id):
                return run
        raise ProcessorError("UNKNOWN_RUN", f"this script processor knows no run {run_id}: it was restarted since")

    def start(self, script: str, parameters: Mapping[str, Any], *, job: str, attempt: int) -> Run:
        """Start a run in a free slot; a ProcessorError says why that cannot be."""
        if script not in scripts.known():
            raise ProcessorError("UNKNOWN_SCRIPT", f"there is no script {script!r} here")
        if not JOB.fullmatch(job):
            raise ProcessorError("INVALID_INPUT", f"{job!r} is no id of a job")
        run = Run(script, parameters, job, attempt)
        self._end_older_attempts(run)
        with self._lock:
            self._forget_old()
            if run.id in self._runs:
                return self._runs[run.id]
            if not self.slots:
                raise ProcessorError("PROCESSORS_DISABLED", "script processors are disabled here")
            if self.closed:
                raise ProcessorError("PROCESSOR_BUSY", "the script processor is shutting down")
            if self._busy() >= self.slots:
                raise ProcessorError("PROCESSOR_BUSY", f"all {self.slots} slots of the script processor are taken")
            self._runs[run.id] = run
        # The kernel ends a process with the *thread* that started it, hence one that lives as long.
        threading.Thread(target=self._work, args=[run], name=f"run-{run.id}").start()
        return run

    def stop(self, run_id: str) -> None:
        """End a run, if it is still going on, and forget it."""
        run = self.get(run_id)
        self._end(run)
        run.over.wait()
        with self._lock:
            self._runs.pop(run_id, None)
        job_file(run.file_name).remove()

    def close(self) -> None:
        """Take no more runs and end those that are going on; workers have them run again."""
        self.closed = True
        with self._lock:
            runs = list(self._runs.values())
        for run in runs:
            self._end(run)
        for run in runs:
            run.over.wait()

    def _end_older_attempts(self, newer: Run) -> None:
        """Give the slot back that a lost worker's attempt at the same job still holds."""
        with self._lock:
            older = [run.id for run in self._runs.values() if run.job == newer.job and run.attempt < newer.attempt]
        for run_id in older:
            with suppress(ProcessorError):
                self.stop(run_id)

    def _forget_old(self) -> None:
        old = time.monotonic() - KEPT_SECONDS
        for run in [run for run in self._runs.values() if run.over.is_set() and run.ended < old]:
            del self._runs[run.id]
            job_file(run.file_name).remove()

    def _end(self, run: Run) -> None:
        run.stopping = True
        _kill(run)

    def _work(self, run: Run) -> None:
        """See a run through, from its start to its end."""
        try:
            job_file(run.file_name).update(progress=0)
            run.state, run.reason = self._execute(run)
        except (OSError, JobFileError) as error:
            run.state, run.reason = State.LOST, f"the script processor could not run it: {error}"
        except Exception as error:
            logger.exception("run %s", run.id)
            run.state, run.reason = State.LOST, f"the script processor could not run it: {type(error).__name__}"
        finally:
            run.ended = time.monotonic()
            run.over.set()
        logger.info("run %s of %s is %s %s", run.id, run.script, run.state, run.reason)

    def _execute(self, run: Run) -> tuple[State, str]:
        order = {"run": run.file_name, "job": run.job, "attempt": run.attempt, "parameters": run.parameters}
        command = [sys.executable, "-m", "drydock", "run_script", run.script, "--processor", str(os.getpid())]
        run.process = subprocess.Popen(  # noqa: S603 - our own program
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
        if run.stopping:
            _kill(run)
        try:
            run.process.communicate(json.dumps(order).encode(), timeout=self.limit_seconds)
        except subprocess.TimeoutExpired:
            _kill(run)
            run.process.communicate()
            return State.TIMED_OUT, f"it took longer than {self.limit_seconds:g} s"
        note = job_file(run.file_name).read()
        if run.process.returncode == 0 and "result" in note:
            return State.DONE, ""
        if run.stopping:
            return State.STOPPED, "the script processor was stopped" if self.closed else "it was stopped"
        if run.process.returncode < 0:
            return State.LOST, f"its process was ended by {signal.Signals(-run.process.returncode).name}"
        return State.FAILED, note.get("reason") or f"its process ended with status {run.process.returncode}"


def _kill(run: Run) -> None:
    """Kill the whole process group, unless its leader is gone and its number may be another's."""
    if run.process and run.process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)


def remove_leftovers() -> None:
    """Remove the job files of runs whose processor was killed; nobody asks for them any more."""
    for path in (config.load().run_dir / "jobs").glob("run-*.json"):
        job_file(path.stem).remove()

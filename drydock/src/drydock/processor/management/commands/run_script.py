"""`drydock run_script NAME`: one run, in a process of its own. Started by the processor, which sends the order."""

import ctypes
import json
import os
import signal
import sys
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import InterfaceError, OperationalError

from drydock.jobfiles import job_file
from drydock.jobs import context
from drydock.processor import scripts

PR_SET_PDEATHSIG = 1


class Command(BaseCommand):
    """Run the script with the parameters from standard input; progress and result go to the run's job file."""

    help = "Run one script for the processor: the order comes by standard input, the result goes to a job file."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """Describe the arguments."""
        parser.add_argument("name")
        parser.add_argument("--processor", type=int, required=True, help="process that this run must not outlive")

    def handle(self, *_: Any, name: str, processor: int, **__: Any) -> None:
        """Run it and note how that ended."""
        end_with(processor)
        order = json.load(sys.stdin)
        file = job_file(order["run"])
        told = 0

        def progress(percent: int) -> None:
            nonlocal told
            if percent > told:
                told = percent
                file.update(progress=percent)

        with context.bound(job=order["job"], attempt=str(order["attempt"])):
            try:
                file.update(result=scripts.known()[name].function(order["parameters"], progress))
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                file.update(reason=reason, again=passing(error))
                raise CommandError(reason) from error


def end_with(processor: int) -> None:
    """Have the kernel kill this process with its processor, also when that is killed; or end now if it is gone."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise CommandError(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != processor:
        raise CommandError("the processor is gone: nobody waits for this run")


def passing(error: Exception) -> bool:
    """Say whether it is a matter of time: a part of the platform did not answer, and may later."""
    if isinstance(error, ClientError):
        return bool(error.response["ResponseMetadata"].get("HTTPStatusCode", 500) >= 500)
    return isinstance(error, BotoCoreError | OperationalError | InterfaceError)

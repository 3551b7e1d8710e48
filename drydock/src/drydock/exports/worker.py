"""The worker's side of an export: have a script processor make the file, verify what it stored, record it."""

import hashlib
import logging
import random
import time
from contextlib import suppress
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from django.db.models import F

from drydock import config, storage
from drydock.exports import service
from drydock.exports.models import Export
from drydock.exports.scripts import EXPORT
from drydock.jobs import engine, kinds
from drydock.jobs.models import Job
from drydock.processor.client import Client, ProcessorError, State

logger = logging.getLogger(__name__)

DISABLED = "script processors are disabled (omero.scripts.processors=0): exports cannot be made here"
# The processor answers a poll at once when the run is over.
POLL_SECONDS = 1.0
RENEWAL_SECONDS = 3.0
# A processor that is silent for so long is lost, and the run with it.
SILENCE_SECONDS = 20.0
MAX_RUNS_LOST = 5


def build_export(job: Job) -> None:
    """Have the file made that the job is about, and publish it once it has been read back."""
    export = Export.objects.get(pk=job.payload["export"])
    client, run_id = start(export, job)
    try:
        run = follow(client, run_id, job, export)
    finally:
        # Lost the lease, out of time, or over: either way nobody needs the run any more.
        with suppress(ProcessorError):
            client.stop(run_id)
    result = result_of(run, export)
    verify(result, export)
    service.complete(job, **result)
    logger.info("exported %d documents, %d bytes", result["documents"], result["size"])


def start(export: Export, job: Job) -> tuple[Client, str]:
    """Start the run at a processor that has a free slot; `engine.Again` if there is none."""
    settings = config.load()
    if settings.script_processors == 0:
        raise engine.Failure(DISABLED)
    why: list[str] = []
    for number, url in enumerate(random.sample(settings.processor_urls, len(settings.processor_urls)), start=1):
        # A processor whose answer was lost may be at work all the same: no two runs share a key.
        key = f"exports/{export.pk}/a{job.attempt}-{number}.{export.format}"
        parameters = {"owner": export.owner_id, "format": export.format, "key": key}
        client = Client(url, settings.internal_token, settings.platform_ca_file)
        try:
            return client, client.start(EXPORT, parameters, job=str(job.uuid), attempt=job.attempt)
        except ProcessorError as error:
            if error.code == "PROCESSORS_DISABLED":
                raise engine.Failure(DISABLED) from error
            why.append(str(error))
    raise engine.Again(f"no script processor is free: {'; '.join(why)}")


def follow(client: Client, run_id: str, job: Job, export: Export) -> dict[str, Any]:
    """Wait for the run's end and tell its progress; keep the lease, and raise `Fenced` once it is lost."""
    kind = kinds.get(service.EXPORT)
    heard = renewed = time.monotonic()
    told = 0
    while True:
        try:
            run = client.run(run_id, wait_seconds=POLL_SECONDS)
        except ProcessorError as error:
            if error.code == "UNKNOWN_RUN" or time.monotonic() - heard > SILENCE_SECONDS:
                raise lost(export, f"the script processor was lost: {error}") from error
            time.sleep(POLL_SECONDS / 4)
            continue
        heard = time.monotonic()
        if run["state"] != State.RUNNING:
            return run
        if run["progress"] != told or heard - renewed > RENEWAL_SECONDS:
            told, renewed = run["progress"], heard
            if not engine.renew(kind, job, progress=told):
                raise engine.Fenced(f"attempt {job.attempt} does not hold job {job.uuid}")


def result_of(run: dict[str, Any], export: Export) -> dict[str, Any]:
    """Return what a run gave, or raise what its end means for the job."""
    state, reason = run["state"], run["reason"]
    if state == State.DONE:
        return dict(run["result"])
    if state == State.TIMED_OUT:
        raise engine.Failure(kinds.get(service.EXPORT).time_limit_reason)
    if state == State.LOST:
        raise lost(export, f"the run was lost: {reason}")
    if state == State.STOPPED or run["again"]:
        raise engine.Again(reason)
    raise engine.Failure(reason)


def verify(result: dict[str, Any], export: Export) -> None:
    """Read the stored file back: what is published is what was made."""
    digest = hashlib.sha256()
    try:
        for chunk in storage.get(result["key"]).iter_chunks(1024 * 1024):
            digest.update(chunk)
    except (BotoCoreError, ClientError) as error:
        raise engine.Again(f"the object storage did not give the file back: {error}") from error
    if digest.hexdigest() != result["sha256"]:
        raise lost(export, f"the stored file is not the one that was made: its SHA-256 is {digest.hexdigest()}")


def lost(export: Export, reason: str) -> engine.Again | engine.Failure:
    """Count a run that came to nothing: it is tried again, but not for ever."""
    Export.objects.filter(pk=export.pk).update(runs_lost=F("runs_lost") + 1)
    export.refresh_from_db(fields=["runs_lost"])
    if export.runs_lost >= MAX_RUNS_LOST:
        return engine.Failure(f"gave up after {export.runs_lost} runs that came to nothing; the last: {reason}")
    return engine.Again(reason)

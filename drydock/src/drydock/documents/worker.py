"""The worker's side of a compile: claim, compile, store, apply."""

import hashlib
import json
import logging
import ssl
import time
import urllib.error
import urllib.request
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from drydock import config, storage
from drydock.documents import latex
from drydock.documents.models import Revision, pdf_key
from drydock.jobs import engine
from drydock.jobs.models import Job
from drydock.operations.errors import DATABASE_AWAY

logger = logging.getLogger(__name__)

STALE = "LATEX_JOB_RESULT_INVALID"
APPLY_RETRIES = 8
APPLY_TIMEOUT_SECONDS = 10


class ApplyError(engine.Failure):
    """The web tier did not take a result; the message says why."""


def compile_latex(job: Job) -> None:
    """Compile the revision that the job is about and hand the result to the web tier, which ends the job."""
    revision = Revision.objects.get(pk=job.payload["revision"])
    started = time.monotonic()
    try:
        outcome = latex.compile_source(revision.source)
    except (latex.UnavailableError, OSError) as error:
        # It is this host that cannot compile, not the source: perhaps another one can, or this one soon.
        logger.warning("this host cannot compile: %s", error)
        raise engine.Again(f"this worker cannot compile now: {error}".splitlines()[0]) from error
    report: dict[str, Any] = {"job": str(job.uuid), "attempt": job.attempt, "log": outcome.log}
    if outcome.pdf is None:
        report |= {"succeeded": False, "reason": outcome.reason}
    else:
        sha256 = hashlib.sha256(outcome.pdf).hexdigest()
        key = pdf_key(revision.document_id, revision.number, job.attempt)
        try:
            storage.put(key, outcome.pdf, content_type="application/pdf", sha256=sha256)
        except (BotoCoreError, ClientError) as error:
            raise engine.Again(f"the object storage did not take the PDF: {error}") from error
        report |= {"succeeded": True, "sha256": sha256, "size": len(outcome.pdf)}
    apply(report)
    logger.info(
        "compiled revision %s in %.1f s: %s", revision, time.monotonic() - started, outcome.reason or "PDF stored"
    )


def apply(report: dict[str, Any]) -> None:
    """Call the internal apply endpoint; try again only while it calls the result stale."""
    settings_ = config.load()
    request = urllib.request.Request(  # noqa: S310 - the configuration allows http and https only
        f"{settings_.internal_api_url}/internal/latex/apply",
        data=json.dumps(report).encode(),
        headers={"Authorization": f"Bearer {settings_.internal_token}", "Content-Type": "application/json"},
    )
    context = None
    if settings_.internal_api_url.startswith("https://"):
        context = ssl.create_default_context(cafile=settings_.platform_ca_file or None)
    for retry in range(APPLY_RETRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=APPLY_TIMEOUT_SECONDS, context=context):  # noqa: S310
                return
        except urllib.error.HTTPError as error:
            with error:
                code, message = _problem(error.read(4096))
            if code == DATABASE_AWAY:
                # Nobody can end the job now: that says nothing about the result.
                raise engine.Again(f"the result was not applied: {message}") from error
            if error.code != 409 or code != STALE:
                raise ApplyError(
                    f"the result was not applied: the web tier answered {error.code} {code} {message}".strip()
                ) from error
            if retry == APPLY_RETRIES:
                raise ApplyError(f"the result was not applied: {STALE}: {message}") from error
        except OSError as error:
            raise ApplyError(f"the result was not applied: the web tier is not reachable: {error}") from error
        time.sleep(min(2.0, 0.25 * 2**retry))


def _problem(body: bytes) -> tuple[str, str]:
    try:
        answer = json.loads(body)
        return str(answer.get("code", "")), str(answer.get("message", ""))
    except (ValueError, AttributeError):
        return "", ""

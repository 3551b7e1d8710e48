"""The worker's side of an export: claim, gather, build, store, record."""

import csv
import hashlib
import io
import logging
import re
import tempfile
import zipfile
from typing import IO

from drydock import storage
from drydock.documents.models import Document, Revision
from drydock.exports import service
from drydock.exports.models import Export
from drydock.jobs.models import Job

logger = logging.getLogger(__name__)

COLUMNS = ("id", "title", "revision", "state", "created", "updated", "pdf_sha256", "pdf_bytes")
CONTENT_TYPES = {"zip": "application/zip", "csv": "text/csv; charset=utf-8"}


def build_export(job: Job) -> None:
    """Build the file that the job is about, store it with its hash and record it."""
    export = Export.objects.get(pk=job.payload["export"])
    with tempfile.TemporaryFile() as file:
        documents = write_export(export, file)
        size = file.tell()
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        key = f"exports/{export.pk}/a{job.attempt}.{export.format}"
        storage.put(key, file, content_type=CONTENT_TYPES[export.format], sha256=sha256)
    service.complete(job, key=key, sha256=sha256, size=size, documents=documents)
    logger.info("exported %d documents, %d bytes", documents, size)


def write_export(export: Export, file: IO[bytes]) -> int:
    """Write the export's file; return how many documents are in it."""
    rows = []
    archive = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) if export.format == Export.Format.ZIP else None
    for number, document in enumerate(Document.objects.filter(owner_id=export.owner_id).order_by("created"), start=1):
        revision = Revision.objects.get(document=document, number=document.latest)
        rows.append(_row(document, revision))
        if archive:
            name = f"{number:04d}-{_file_name(document.title)}"
            archive.writestr(f"{name}.tex", revision.source)
            if revision.pdf_key:
                with archive.open(f"{name}.pdf", "w") as member:
                    for chunk in storage.get(revision.pdf_key).iter_chunks():
                        member.write(chunk)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    if archive:
        archive.writestr("documents.csv", table.getvalue())
        archive.close()
    else:
        file.write(table.getvalue().encode())
    return len(rows)


def _file_name(title: str) -> str:
    return re.sub(r"[^\w-]+", "-", title).strip("-")[:80] or "document"


def _row(document: Document, revision: Revision) -> tuple[object, ...]:
    # A spreadsheet must not take a title for a formula.
    title = f"'{document.title}" if document.title[0] in "=+-@\t\r" else document.title
    return (
        document.pk, title, revision.number, revision.state, document.created.isoformat(),
        document.updated.isoformat(), revision.pdf_sha256, revision.pdf_size,
    )  # fmt: skip

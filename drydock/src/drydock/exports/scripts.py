"""The export as a script of the processor: gather, build, store."""

import csv
import hashlib
import io
import re
import tempfile
import zipfile
from typing import IO, Any

from drydock import storage
from drydock.documents.models import Document, Revision
from drydock.exports.models import CONTENT_TYPES
from drydock.processor import preparation, scripts
from drydock.processor.scripts import Progress

EXPORT = "export"
COLUMNS = ("id", "title", "revision", "state", "created", "updated", "pdf_sha256", "pdf_bytes")
# What is left for the hash and the upload.
GATHERED_PERCENT = 90


def export(parameters: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Store a file of a user's documents under the given key; return its hash and size."""
    # Without a name, it is gone with this process, however that ends.
    with tempfile.TemporaryFile(dir=preparation.work_directory()) as file:
        documents = write_export(parameters["owner"], parameters["format"], file, progress)
        size = file.tell()
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        storage.put(parameters["key"], file, content_type=CONTENT_TYPES[parameters["format"]], sha256=sha256)
    return {"key": parameters["key"], "sha256": sha256, "size": size, "documents": documents}


def write_export(owner_id: int, file_format: str, file: IO[bytes], progress: Progress) -> int:
    """Write the export's file; return how many documents are in it."""
    rows = []
    archive = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) if file_format == "zip" else None
    documents = Document.objects.filter(owner_id=owner_id).order_by("created")
    total = len(documents)
    for number, document in enumerate(documents, start=1):
        revision = Revision.objects.get(document=document, number=document.latest)
        rows.append(_row(document, revision))
        if archive:
            _add(archive, f"{number:04d}-{_file_name(document.title)}", revision)
        progress(GATHERED_PERCENT * number // total)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    if archive:
        archive.writestr("documents.csv", table.getvalue())
        archive.close()
    else:
        file.write(table.getvalue().encode())
    return total


def _add(archive: zipfile.ZipFile, name: str, revision: Revision) -> None:
    archive.writestr(f"{name}.tex", revision.source)
    if revision.pdf_key:
        with archive.open(f"{name}.pdf", "w") as member:
            for chunk in storage.get(revision.pdf_key).iter_chunks():
                member.write(chunk)


def _file_name(title: str) -> str:
    return re.sub(r"[^\w-]+", "-", title).strip("-")[:80] or "document"


def _row(document: Document, revision: Revision) -> tuple[object, ...]:
    # A spreadsheet must not take a title for a formula.
    title = f"'{document.title}" if document.title[0] in "=+-@\t\r" else document.title
    return (
        document.pk, title, revision.number, revision.state, document.created.isoformat(),
        document.updated.isoformat(), revision.pdf_sha256, revision.pdf_size,
    )  # fmt: skip


scripts.add(EXPORT, export)

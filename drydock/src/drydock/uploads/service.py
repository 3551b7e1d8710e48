"""What can be done with uploads: receive a file, check it, and store it, completely or not at all."""

import hashlib
import logging
import re
import threading

from botocore.exceptions import BotoCoreError, ClientError
from django.core.files.uploadedfile import UploadedFile
from django.db import IntegrityError, transaction
from django.http import HttpRequest
from django.template.defaultfilters import filesizeformat
from PIL import Image

from drydock import config, storage
from drydock.uploads.models import Upload
from drydock.uploads.temporary import TemporaryUpload

logger = logging.getLogger(__name__)

PHOTO_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PHOTO_PIXELS = 64_000_000
CONTENT_TYPE = re.compile(r"[a-z0-9.+-]{1,40}/[a-z0-9.+-]{1,59}")
# Decoded, a photo takes a hundred times its room: one at a time in each process.
_decoding = threading.Lock()


class InvalidUploadError(ValueError):
    """The file cannot be accepted; the message is for its sender."""

    status = 400
    code = "INVALID_INPUT"


class TooLargeError(InvalidUploadError):
    """The file is larger than its kind may be."""

    status = 413
    code = "TOO_LARGE"


class UnavailableError(Exception):
    """Files cannot be stored or fetched at the moment; nothing was changed, and the same may be tried again later."""


def received(request: HttpRequest, kind: str) -> UploadedFile:
    """Return the file of the form field that is named after its kind, or raise why there is none."""
    if refusal := getattr(request, "refused_uploads", {}).get(kind):
        raise refusal
    file = request.FILES.get(kind)
    if not isinstance(file, UploadedFile):
        raise InvalidUploadError(f"Choose a file: the form has a field “{kind}” for it.")
    return file


def check_size(kind: str, size: int) -> None:
    """Refuse what is larger than its kind may be."""
    limit = config.load().upload_max_bytes[kind]
    if size > limit:
        article = "An" if kind == Upload.Kind.ATTACHMENT else "A"
        raise TooLargeError(f"The file is too large. {article} {kind} may have at most {filesizeformat(limit)}.")


def earlier(owner_id: int, request_key: str | None) -> Upload | None:
    """Return what this person's request with this key has made already."""
    if request_key is None:
        return None
    return Upload.objects.filter(owner_id=owner_id, request_key=request_key).first()


def store(owner_id: int, kind: str, file: UploadedFile, request_key: str | None = None) -> Upload:
    """Check a file, put it into object storage and record it; who can see the record can have the file."""
    if made := earlier(owner_id, request_key):
        return made
    if kind not in Upload.Kind.values:
        raise InvalidUploadError(f"The kind must be one of: {', '.join(Upload.Kind.values)}.")
    size = file.size or 0
    if not size:
        raise InvalidUploadError("The file is empty.")
    check_size(kind, size)
    upload = Upload(owner_id=owner_id, kind=kind, name=str(file.name), size=size, request_key=request_key)
    upload.content_type = _photo_type(file) if kind == Upload.Kind.PHOTO else _declared_type(file)
    upload.sha256 = _sha256(file)
    upload.key = f"uploads/{upload.pk}"
    file.seek(0)
    try:
        storage.put(upload.key, file.file, content_type=upload.content_type, sha256=upload.sha256)
    except (BotoCoreError, ClientError) as error:
        logger.warning("the object storage did not take %s: %s", upload, error)
        raise UnavailableError("The platform cannot store files at the moment.") from error
    try:
        with transaction.atomic(using="plugins"):
            upload.save(force_insert=True)
    except IntegrityError:
        # The same request, at the same time; its file is stored.
        if made := earlier(owner_id, request_key):
            _discard(upload)
            return made
        raise
    return upload


def _discard(upload: Upload) -> None:
    """Remove an object that nothing will ever refer to; one that stays costs room and nothing else."""
    try:
        storage.delete(upload.key)
    except (BotoCoreError, ClientError) as error:
        logger.warning("the object %s was left behind: %s", upload.key, error)


def _sha256(file: UploadedFile) -> str:
    if isinstance(file, TemporaryUpload):
        return file.sha256
    return hashlib.file_digest(file.open(), "sha256").hexdigest()


def _declared_type(file: UploadedFile) -> str:
    declared = (file.content_type or "").lower()
    return declared if CONTENT_TYPE.fullmatch(declared) else "application/octet-stream"


def _photo_type(file: UploadedFile) -> str:
    """Return the type of a photo that can be shown, to its last byte."""
    try:
        file.seek(0)
        with _decoding, Image.open(file, formats=PHOTO_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PHOTO_PIXELS:
                raise InvalidUploadError(
                    f"The photo has {width} × {height} pixels: make it smaller, at most"
                    f" {MAX_PHOTO_PIXELS // 1_000_000} megapixels."
                )
            image.verify()
            file.seek(0)
            with Image.open(file, formats=PHOTO_FORMATS) as whole:
                # JPEG's small scale is read from the same bytes; the others know no such thing.
                whole.draft("RGB", (1, 1))
                whole.load()
                return Image.MIME[str(whole.format)]
    except InvalidUploadError:
        raise
    except Exception as error:  # a decoder has many ways to say that a file is broken
        raise InvalidUploadError("The file is no photo that can be shown. Send a JPEG, PNG or WebP image.") from error

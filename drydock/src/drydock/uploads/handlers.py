"""How files in forms are received: straight into a locked temporary file, no further than the limit of their kind.

The name of a form's file field is the kind of the upload. Other files, and those of strangers, are not kept at all.
"""

import logging
from typing import Any, Never

from django.core.files.uploadedfile import UploadedFile
from django.core.files.uploadhandler import FileUploadHandler, SkipFile

from drydock.uploads import service
from drydock.uploads.models import Upload
from drydock.uploads.temporary import TemporaryUpload

logger = logging.getLogger(__name__)


class LockedFileHandler(FileUploadHandler):
    """Receives the files of one request; `service.received` gives them to the view, or the reason for a refusal."""

    request: Any
    file: TemporaryUpload

    def new_file(self, *args: Any, **kwargs: Any) -> None:
        """Open the file that is to come."""
        super().new_file(*args, **kwargs)
        if self.field_name not in Upload.Kind.values or not self.request.user.is_authenticated:
            raise SkipFile
        try:
            self.file = TemporaryUpload(self.field_name, str(self.file_name), self.content_type)
        except OSError as error:
            self._refuse_for_want_of_room(error)
        # They are closed when the request is over, however it ends: see `middleware.TemporaryFiles`.
        self.request.temporary_uploads = [*getattr(self.request, "temporary_uploads", ()), self.file]

    def receive_data_chunk(self, raw_data: bytes, start: int) -> None:
        """Write on, up to the limit."""
        try:
            service.check_size(str(self.field_name), start + len(raw_data))
            self.file.append(raw_data)
        except service.InvalidUploadError as error:
            self._refuse(error)
        except OSError as error:
            self._refuse_for_want_of_room(error)

    def file_complete(self, file_size: int) -> UploadedFile:  # noqa: ARG002 - it counted itself
        """Hand the file over."""
        file = self.file
        # Django closes `self.file` when a later file of the request is refused.
        del self.file
        file.seek(0)
        return file

    def _refuse_for_want_of_room(self, error: OSError) -> Never:
        logger.error("an upload cannot be written: %s", error)
        self._refuse(service.UnavailableError("The platform has no room for the file at the moment."))

    def _refuse(self, error: Exception) -> Never:
        self.request.refused_uploads = {**getattr(self.request, "refused_uploads", {}), self.field_name: error}
        raise SkipFile

"""Documents and their PDFs."""

from django.apps import AppConfig


class DocumentsConfig(AppConfig):
    """LaTeX documents, compiled by workers."""

    name = "drydock.documents"

"""Uploads."""

from django.apps import AppConfig


class UploadsConfig(AppConfig):
    """Photos and attachments that people send."""

    name = "drydock.uploads"

"""Exports."""

from django.apps import AppConfig


class ExportsConfig(AppConfig):
    """A user's documents as one file."""

    name = "drydock.exports"

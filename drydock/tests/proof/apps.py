"""The app of the proof."""

from django.apps import AppConfig


class ProofConfig(AppConfig):
    """Jobs whose effects can be counted."""

    name = "proof"

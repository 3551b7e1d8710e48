"""What operators and machines ask of the platform."""

from django.apps import AppConfig


class OperationsConfig(AppConfig):
    """Health, readiness and the enqueue ping."""

    name = "drydock.operations"

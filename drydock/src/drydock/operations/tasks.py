"""Where Celery looks for this app's tasks."""

from drydock.operations.broker import ping

__all__ = ["ping"]

"""The Celery application: `celery -A drydock.celery worker -Q <queue>`."""

import logging.config
import os
from typing import Any

from celery import Celery, signals

from drydock import kombu_transport

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "drydock.settings")

kombu_transport.install()
app = Celery("drydock")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@signals.setup_logging.connect
def use_our_log_lines(**_: Any) -> None:
    """Log as the web tier does."""
    from django.conf import settings

    logging.config.dictConfig(settings.LOGGING)

"""The platform's settings, and the app of the proof with a queue of its own."""

import os

from kombu import Exchange, Queue

from drydock import routers
from drydock.settings import *  # noqa: F403
from drydock.settings import CELERY_TASK_QUEUES, INSTALLED_APPS, QUEUES

INSTALLED_APPS = [*INSTALLED_APPS, "proof"]
ROOT_URLCONF = "proof.urls"
QUEUES = (*QUEUES, "proof")
CELERY_TASK_QUEUES = [*CELERY_TASK_QUEUES, Queue("proof", Exchange("drydock"), routing_key="proof")]
routers.PLUGINS_APPS |= {"proof"}
# The product's own, but where a test of the proof itself has no time for it.
PROOF_LEASE_SECONDS = float(os.environ.get("PROOF_LEASE_SECONDS", "30"))

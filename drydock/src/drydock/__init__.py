"""Drydock: a small, real platform for learners' documents on Django and Celery."""

__version__ = "0.1.0"

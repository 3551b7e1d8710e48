"""Units, attempts, photos, and which units are open for whom."""

from django.apps import AppConfig


class LearningConfig(AppConfig):
    """What a learner works through."""

    name = "drydock.learning"

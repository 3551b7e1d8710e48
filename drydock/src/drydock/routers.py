"""Which app lives on which database."""

from typing import Any

from django.db.models import Model

PLUGINS_APPS = frozenset({"exports", "processor", "uploads"})
# The job table exists on both: a job commits together with what it is about.
SHARED_APPS = frozenset({"jobs"})


class ClusterRouter:
    """Keep exports on `plugins`, jobs on both, and everything else on `core` (which is also called `default`)."""

    def db_for_read(self, model: type[Model], **hints: Any) -> str:
        """Return the database to read `model` from."""
        label = model._meta.app_label
        if label in SHARED_APPS:
            instance = hints.get("instance")
            if instance is None or instance._state.db is None:
                raise LookupError(f"{model.__name__} lives on two databases: say which, with using=")
            return str(instance._state.db)
        return "plugins" if label in PLUGINS_APPS else "core"

    db_for_write = db_for_read

    def allow_relation(self, left: Model, right: Model, **hints: Any) -> bool:  # noqa: ARG002
        """Allow references within one database only."""
        return self._home(left) == self._home(right)

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool:  # noqa: ARG002
        """Create an app's tables only where it lives."""
        if app_label in SHARED_APPS:
            return True
        return (db == "plugins") == (app_label in PLUGINS_APPS)

    def _home(self, instance: Model) -> str | None:
        if instance._meta.app_label in SHARED_APPS:
            return instance._state.db
        return "plugins" if instance._meta.app_label in PLUGINS_APPS else "core"

"""Which scripts are registered, and which processors are alive. On the plugins database, by its clock."""

from django.db import models
from django.db.models.functions import Now


class Script(models.Model):
    """One version of a script; an older one stays, for it says what older exports were made with."""

    name = models.CharField(max_length=64)
    sha256 = models.CharField(max_length=64)
    registered = models.DateTimeField(db_default=Now())

    class Meta:
        """Registering the same version again changes nothing."""

        constraints = (models.UniqueConstraint(fields=["name", "sha256"], name="processor_script_once"),)

    def __str__(self) -> str:
        """Name the script for logs."""
        return f"{self.name} {self.sha256[:12]}"


class Processor(models.Model):
    """A processor that has been heard of; it is alive if its heartbeat is fresh."""

    url = models.CharField(max_length=200, unique=True)
    slots = models.PositiveSmallIntegerField()
    busy = models.PositiveSmallIntegerField(default=0)
    heartbeat = models.DateTimeField(db_default=Now())

    def __str__(self) -> str:
        """Name the processor for logs."""
        return self.url

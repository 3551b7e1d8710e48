"""The scripts that a processor can run, each registered once by the app that it belongs to."""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from drydock.processor.models import Script

# What a script gets (JSON), how it tells its progress (percent), and what it gives back (JSON).
Progress = Callable[[int], None]
Function = Callable[[dict[str, Any], Progress], dict[str, Any]]


@dataclass(frozen=True)
class Runnable:
    """A script: a function that may take minutes and is run in a process of its own."""

    name: str
    function: Function

    @property
    def sha256(self) -> str:
        """Return the hash of its module's source: another source is another script."""
        return hashlib.sha256(inspect.getsource(inspect.getmodule(self.function)).encode()).hexdigest()  # type: ignore[arg-type]


_known: dict[str, Runnable] = {}


def add(name: str, function: Function) -> None:
    """Make a script known; a second one of the same name is a mistake."""
    if name in _known:
        raise ValueError(f"there is a script named {name!r} already")
    _known[name] = Runnable(name, function)


def known() -> dict[str, Runnable]:
    """Return the scripts that this release brings, by name."""
    return dict(_known)


def register() -> list[str]:
    """Register this release's scripts in the database; return the names of those that were new."""
    return [
        script.name
        for script in _known.values()
        if Script.objects.get_or_create(name=script.name, sha256=script.sha256)[1]
    ]


def registered() -> list[str]:
    """Return the names of this release's scripts that are registered in this very version."""
    versions = set(Script.objects.filter(name__in=_known).values_list("name", "sha256"))
    return sorted(script.name for script in _known.values() if (script.name, script.sha256) in versions)

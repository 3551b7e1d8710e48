"""Filters that turn what was collected into text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def check_failures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each post-deploy check (a result of `uri` with `item`) whose answer is not as it should be."""
    failures = []
    for result in results:
        check = result["item"]
        status = result.get("status", -1)
        request = f"{check['name']}: {check['method']} {check['path']}"
        content = str(result.get("content") or "")
        missing = [text for text in check["contains"] if text not in content]
        if status == -1:
            failures.append(f"{request} got no answer: {result.get('msg', 'no reason given')}")
        elif status != check["status"]:
            failures.append(f"{request} answered {status}, not {check['status']}: {' '.join(content.split())[:300]}")
        elif missing:
            failures.append(f"{request} answered {status} without {', '.join(map(repr, missing))}: {' '.join(content.split())[:300]}")
    return failures


def command_words(result: Mapping[str, Any]) -> list[str]:
    """What a command printed, complaints last, as lines."""
    return [line for stream in ("stdout", "stderr") for line in str(result.get(stream) or "").splitlines() if line.strip()]


class FilterModule:
    """Filters that make text for people."""

    def filters(self) -> dict[str, Any]:
        return {"check_failures": check_failures, "command_words": command_words}

"""Filters that turn what was collected into text for people: the migration plan, failed checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def migration_plan_text(plan: Mapping[str, Any], release: str) -> str:
    """What the gate shows: every pending migration by database, with its operations, and the fingerprint of the whole."""
    if not plan["pending"]:
        return f"No migration is pending for release {release}."
    lines = [f"{len(plan['pending'])} migrations are pending for release {release}:"]
    database = None
    for step in plan["pending"]:
        if step["database"] != database:
            database = step["database"]
            lines.append(f"  database {database}")
        way_back = "" if step["reversible"] else "  (cannot be reversed)"
        lines.append(f"    {step['app']}.{step['name']}{way_back}")
        lines += [f"      - {operation}" for operation in step["operations"]]
    return "\n".join([*lines, f"fingerprint of this plan: {plan['fingerprint']}"])


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
        return {"migration_plan_text": migration_plan_text, "check_failures": check_failures, "command_words": command_words}

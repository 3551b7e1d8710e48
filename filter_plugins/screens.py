"""Filters that turn what was collected into text for people: the migration plan, failed checks, the status screen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
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


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _cluster_line(name: str, answer: Mapping[str, Any]) -> tuple[str, bool]:
    """One line for a PostgreSQL cluster from Patroni's /cluster, and whether it has a primary."""
    members = (answer.get("json") or {}).get("members", [])
    leaders = [m for m in members if m.get("role") in ("leader", "primary", "master")]
    standbys = [f"{m['name']} ({m.get('role')}, {m.get('state')}, lag {m.get('lag', '?')})" for m in members if m not in leaders]
    if len(leaders) != 1 or leaders[0].get("state") != "running":
        return f"postgresql {name:<8} NO PRIMARY  ({answer.get('msg', 'Patroni does not answer')})", False
    return f"postgresql {name:<8} primary {leaders[0]['name']}" + (f", standby {', '.join(standbys)}" if standbys else ""), True


def status_report(
    collected_by_host: Mapping[str, Mapping[str, Any]],
    addresses: Mapping[str, str],
    answers: Sequence[Mapping[str, Any]],
    app_hosts: Sequence[str],
    title: str,
) -> dict[str, Any]:
    """The status screen.

    collected_by_host: hostvars, with `status_health` (result of `evenkeel-health status --json`) and `status_current` (result of
    `stat`). addresses: of every host. answers: results of asking Patroni's /cluster, with `item` [cluster, member]. app_hosts: those
    that must carry a release. Returns {text, problems: [str]}.
    """
    problems: list[str] = []
    releases: dict[str, list[str]] = {}
    body: list[str] = []
    for host in sorted(addresses):
        health = collected_by_host[host].get("status_health") or {}
        target = (collected_by_host[host].get("status_current") or {}).get("stat", {}).get("lnk_target")
        try:
            rows = json.loads(health["stdout"])
        except (KeyError, ValueError, TypeError):
            reason = " ".join(str(health.get("stderr") or health.get("msg") or "no answer").split())
            body.append(f"  {host} ({addresses[host]}): DOES NOT ANSWER: {reason[:160]}")
            problems.append(f"{host} does not answer")
            continue
        if host in app_hosts:
            releases.setdefault(target.rpartition("/")[2] if target else "none", []).append(host)
        body.append(f"  {host} ({addresses[host]})")
        width = max((len(row["name"]) for row in rows), default=0)
        for row in rows:
            well = row["status"] == "healthy"
            age = f"for {_age(datetime.now(UTC).timestamp() - row['since'])}" if row.get("since") else ""
            body.append(f"    {'ok' if well else '!!'}  {row['name']:<{width}}  {row['status']:<9}  {age:<10}  {row['message']}".rstrip())
            if not well:
                problems.append(f"{row['name']} on {host} is {row['status']}: {row['message']}")
    lines = [f"{title}   {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"]
    for release, carriers in sorted(releases.items()):
        lines.append(f"release    {release} on {', '.join(carriers)}")
    if "none" in releases:
        problems.append(f"no release on {', '.join(releases['none'])}: run playbooks/release.yml, then playbooks/deploy.yml")
    if len(releases) > 1:
        problems.append("hosts carry different releases: run playbooks/deploy.yml again")
    for name in sorted({answer["item"][0] for answer in answers}):
        asked = [answer for answer in answers if answer["item"][0] == name]
        line, well = _cluster_line(name, next((answer for answer in asked if answer.get("status") == 200), asked[0]))
        lines.append(line)
        if not well:
            problems.append(f"PostgreSQL cluster {name} has no running primary")
    lines.append("services")
    verdict = [f"NOT WELL: {len(problems)} problem{'s' if len(problems) > 1 else ''}", *[f"  - {p}" for p in problems]]
    return {"text": "\n".join([*lines, *body, *(verdict if problems else ["all is well"])]), "problems": problems}


class FilterModule:
    """Filters that make text for people."""

    def filters(self) -> dict[str, Any]:
        return {"migration_plan_text": migration_plan_text, "check_failures": check_failures, "status_report": status_report}

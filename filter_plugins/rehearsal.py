"""Filters for the rehearsal of migrations: what the copies and the program on the application's host are told, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError

#: A copy listens this much above the port of its cluster, on the repository host, while a rehearsal lasts.
PORT_DISTANCE = 10000
#: What a web process is given beside its start period until its first answer.
START_SECONDS = 60
#: PostgreSQL's names of locks, and what each means to users.
LOCKS = {
    "ShareLock": "nobody could write to it",
    "ShareRowExclusiveLock": "nobody could write to it",
    "ExclusiveLock": "nobody could write to it",
    "AccessExclusiveLock": "nobody could read or write it",
}


def rehearsal_copies(contract: Mapping[str, Any], topo: Mapping[str, Any], host: str) -> list[dict[str, Any]]:
    """The copies that a rehearsal on this host needs: [{cluster, room}]; room is what `evenkeel-backup rehearsal` reads."""
    address = topo["backup"]["members"][0]["address"]
    copies = []
    for cluster, database in contract["databases"].items():
        place = topo["postgresql"][cluster]
        port = place["port"] + PORT_DISTANCE
        if port > 65535:
            raise AnsibleFilterError(
                f"the rehearsal's copy of {cluster} would listen on port {port}, which does not exist: give the cluster a port below "
                f"{65536 - PORT_DISTANCE} in platform_ports"
            )
        room = {
            "database": database["name"],
            "user": database["owner"],
            "address": address,
            "port": port,
            "client": topo["addresses"][host],
            "names": [member[key] for member in place["members"] for key in ("name", "address")],
        }
        copies.append({"cluster": cluster, "room": room})
    return copies


def rehearsal_request(
    contract: Mapping[str, Any],
    topo: Mapping[str, Any],
    host: str,
    releases: Sequence[str],
    made: Mapping[str, Any],
    jobs: Mapping[str, Any],
) -> dict[str, Any]:
    """What the program on the application's host is told.

    releases: the current one (empty before the first deploy) and the new one. made: cluster to what `evenkeel-backup rehearsal` said.
    jobs: apply and probe, each {argv, stdin}, apply with `seconds` that it may take; ca_file; platform (the name that users ask for).
    """
    paths = contract["paths"]
    copies = []
    for copy in rehearsal_copies(contract, topo, host):
        place, said = topo["postgresql"][copy["cluster"]], made[copy["cluster"]]
        copies.append(
            {
                "members": [member["address"] for member in place["members"]],
                "live_port": place["port"],
                "address": copy["room"]["address"],
                "port": copy["room"]["port"],
                "certificate": said["certificate"],
                "at": said["at"],
            }
        )
    return {
        "app": contract["name"],
        "user": contract["user"],
        "group": contract["group"],
        "command": paths["command"],
        "current": releases[0],
        "release": releases[1],
        "addresses": sorted({*topo["addresses"].values(), topo["platform"]["address"]}),
        "directories": {name: paths[name] for name in ("state", "log", "run")},
        "ca_file": jobs["ca_file"],
        "copies": copies,
        "apply": jobs["apply"],
        "probe": jobs["probe"],
        "webs": [
            _web(contract, process, topo["addresses"][host], jobs["platform"])
            for process in contract["processes"].values()
            if process["kind"] == "web"
        ],
    }


def _web(contract: Mapping[str, Any], process: Mapping[str, Any], address: str, platform: str) -> dict[str, Any]:
    """A web process as the rehearsal starts it, with the checks that it answers."""
    health = process["health"]
    checks = []
    if health["kind"] == "http" and health["port"] == process["port"] and not health.get("bearer") and "ca" not in health:
        own = {"name": "health", "method": "GET", "path": health["path"], "status": health["status"]}
        checks.append({**own, "host": health.get("host", platform), "contains": [health["contains"]] if "contains" in health else []})
    routes = [each["path"] for each in contract["processes"].values() if each["kind"] == "web"]
    for check in contract["checks"]:
        nearest = max((path for path in routes if check["path"].startswith(path)), key=len, default="")
        # others would change something, or send a secret
        if check["method"] in ("GET", "HEAD") and not check.get("bearer") and nearest == process["path"]:
            checks.append({**{name: check[name] for name in ("name", "method", "path", "status", "contains")}, "host": platform})
    return {
        "name": process["name"],
        "argv": process["command"],
        "address": address,
        "port": process["port"],
        "environment": process["environment"],
        "credentials": process["credentials"],
        "memory_mb": process["resources"]["memory_mb"],
        "patience_seconds": process["start_period_seconds"] + START_SECONDS,
        # without one, any answer tells that it runs
        "checks": checks or [{"name": "root", "method": "GET", "path": process["path"], "status": 200, "contains": [], "host": platform}],
    }


def rehearsal_probe(contract: Mapping[str, Any]) -> list[str]:
    """The command that tries the models of a release, with playbooks/files/django_probe.py as its input; empty for other than Django's."""
    migrations = contract["migrations"]
    settings = ["--settings", str(migrations["settings"])] if migrations.get("settings") else []
    return ["python", "-", *migrations["django"], *settings] if migrations["django"] else []


def rehearsal_verdict(
    said: Mapping[str, Any], locks: Mapping[str, Sequence[Mapping[str, Any]]], about: Mapping[str, Any], limit_seconds: float
) -> dict[str, Any]:
    """What came of a rehearsal: {release, current, fingerprint, held, outcome, why, seconds, migrations, checks, locks}.

    held: whether it came to its end; if not, the outcome is `failed`, and says nothing about the release.
    said: the verdict of the program, or {why} when it could not be held. locks: cluster to what `evenkeel-backup rehearsal --locks` says.
    about: release, current, fingerprint, and `data` (what was restored). limit_seconds: for so long users may wait for a lock.
    """
    held = [{"cluster": cluster, **lock, "migration": _whose(lock, said)} for cluster, found in locks.items() for lock in found]
    long = sorted((lock for lock in held if lock["seconds"] > limit_seconds), key=lambda lock: -float(lock["seconds"]))
    problems = [said["why"]] if said["why"] else []
    if "outcome" not in said:
        problems = [f"it could not be held: {said['why']}"]
    problems += [f"{_lock_text(lock)}; {limit_seconds:g} s are allowed (migrate_lock_limit_seconds)" for lock in long]
    return {
        **about,
        "held": "outcome" in said,
        "outcome": "failed" if problems else "passed",
        "why": "; ".join(problems),
        "seconds": said.get("seconds", 0),
        "migrations": said.get("migrations", []),
        "checks": said.get("checks", []),
        "locks": held,
    }


def _whose(lock: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    """The migration that held a lock: as its session said, or the only one that took as long; empty when that is not certain."""
    done = said.get("outcome") and not str(said["why"]).startswith("the migrations fail")
    long = {f"{each['app']}.{each['name']}" for each in said.get("migrations", []) if each["seconds"] > lock["seconds"] - 0.5}
    return str(lock["migration"] or (long.pop() if done and len(long) == 1 else ""))


def _lock_text(lock: Mapping[str, Any]) -> str:
    """A lock for people."""
    rows = f" with {lock['rows']} rows" if "rows" in lock else ""
    return (
        f"{lock['migration'] or 'a migration'} holds {lock['mode']} on {lock['table']}{rows} in {lock['cluster']} for "
        f"{lock['seconds']:.1f} s, in which {LOCKS[lock['mode']]}"
    )


def rehearsal_problem(results: Sequence[Mapping[str, Any]], task: str) -> str:
    """Why a rehearsal could not be held: the words of the first result that failed, of a task's results."""
    failed = next((result for result in results if result.get("failed")), results[0] if results else {})
    said = str(failed.get("stderr") or failed.get("msg") or failed.get("stdout") or "it said nothing")
    return f"{task}: {' '.join(said.split())}".rstrip(".")


def rehearsal_data(results: Sequence[Mapping[str, Any]]) -> str:
    """Which data a rehearsal had, from the results of the task that made the copies."""
    made = [
        (result["item"]["cluster"], json.loads(result["stdout"])) for result in results if str(result.get("stdout", "")).startswith("{")
    ]
    return ", ".join(f"the backup of {cluster} of {said['backup_ended']}" for cluster, said in made)


def rehearsal_entry(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """What the ledger keeps of one that was held."""
    names = ("release", "current", "fingerprint", "outcome", "why", "seconds", "migrations")
    return {"kind": "rehearsal", **{name: verdict[name] for name in names}}


def rehearsal_text(verdict: Mapping[str, Any]) -> str:
    """What came of it, for people."""
    data = f" on {verdict['data']}" if verdict.get("data") else ""
    lines = [f"rehearsal of {verdict['release']}{data}: {verdict['outcome']} ({verdict['seconds']:.0f} s)"]
    lines += [f"  {each['seconds']:8.2f} s  {each['database']}: {each['app']}.{each['name']}" for each in verdict["migrations"]]
    lines += [f"  lock: {_lock_text(lock)}" for lock in verdict["locks"] if lock["seconds"] >= 1]
    for release in dict.fromkeys(row["release"] for row in verdict["checks"] if row["when"] == "after"):
        rows = [row for row in verdict["checks"] if row["release"] == release and row["when"] == "after"]
        good, bad = sum(not row["problem"] for row in rows), [row for row in rows if row["problem"] and row["counts"]]
        whose = "current release" if release == verdict["current"] else "new release"
        lines.append(f"  {whose} {release} on the migrated copy: {good} checks as they should be, {len(bad)} not")
        lines += [f"    {row['check']}: {row['problem']}" for row in bad]
    uncounted = sorted({row["check"] for row in verdict["checks"] if row["problem"] and not row["counts"]})
    if uncounted:
        lines.append(f"  not judged, because the current release fails it on an untouched copy, too: {', '.join(uncounted)}")
    return "\n".join([*lines, *([f"  {verdict['why']}"] if verdict["why"] else [])])


def rehearsal_refusal(verdict: Mapping[str, Any], inventory: str) -> str:
    """Why the release must not go on, and what to type; empty when it may."""
    if verdict["outcome"] == "passed":
        return ""
    again = f"ansible-playbook -i {inventory} playbooks/rehearse.yml -e release="
    if not verdict["held"]:
        cure = f"Mend that, then type:\n  {again}{verdict['release']}"
    else:
        cure = f"Change the migration, build the release anew (playbooks/release.yml), and rehearse that:\n  {again}latest"
    return f"The rehearsal of {verdict['release']} failed: {verdict['why']}.\nNothing was changed: it ran on copies. {cure}"


class FilterModule:
    """Gives the filters to Ansible."""

    def filters(self) -> dict[str, Any]:
        return {
            "rehearsal_copies": rehearsal_copies,
            "rehearsal_request": rehearsal_request,
            "rehearsal_probe": rehearsal_probe,
            "rehearsal_verdict": rehearsal_verdict,
            "rehearsal_problem": rehearsal_problem,
            "rehearsal_data": rehearsal_data,
            "rehearsal_entry": rehearsal_entry,
            "rehearsal_text": rehearsal_text,
            "rehearsal_refusal": rehearsal_refusal,
        }

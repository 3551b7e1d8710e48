"""Pure functions for playbooks/restore.yml: what was asked for, the plan and its fingerprint, the record."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

WAYS = ("time", "name", "latest")
FINGERPRINT_LENGTH = 16
#: What makes a plan this plan. The timeline, because after a restore the same words mean another one.
DECISIVE = ("repository", "backup", "timeline", "member", "others", "lost")


def restore_request_problem(request: Mapping[str, str], topology: Mapping[str, Any], begun: Mapping[str, Any]) -> str:
    """What is wrong with what a person typed, in one sentence; empty when nothing is.

    request: cluster, time, name, latest, scratch, confirm, abort as typed; empty where nothing was. begun: the record of the restore
    with this fingerprint, empty when there is none.
    """
    known_by = request["confirm"] or request["abort"]
    if known_by and not re.fullmatch(f"[0-9a-f]{{{FINGERPRINT_LENGTH}}}", known_by):
        return f"'{known_by}' is no fingerprint of a plan"
    if "ended" in begun:
        return f"The restore {known_by} ended at {begun['ended']} ({begun['outcome']}). For another one leave the fingerprint out"
    if request["abort"] and not begun:
        return f"No restore {request['abort']} has begun from here"
    if begun:
        return ""
    known = list(topology["postgresql"])
    clusters = _clusters(request["cluster"])
    if not clusters:
        return f"Which cluster? Add -e cluster={known[0]}, or -e cluster={','.join(known)} for both at one time"
    unknown = [name for name in clusters if name not in known]
    if unknown:
        return f"There is no cluster {unknown[0]}: one of {', '.join(known)}, or {','.join(known)}"
    if request["scratch"] not in ("", "yes", "drop"):
        return f"scratch={request['scratch']} is neither yes nor drop"
    if request["scratch"] and len(clusters) > 1:
        return "A copy beside is of one cluster: name one"
    ways = [way for way in WAYS if request[way]]
    if request["scratch"] == "drop":
        return f"scratch=drop removes the copy and needs no {ways[0]}" if ways else ""
    if len(ways) != 1:
        told = f"both {ways[0]} and {ways[1]} are given" if ways else "none is given"
        return f"To which state? Exactly one of -e time='2026-11-22 03:14:00+00', -e name=POINT and -e latest=yes; {told}"
    if request["latest"] not in ("", "yes"):
        return f"latest={request['latest']} is not yes"
    return ""


def restore_target_options(request: Mapping[str, str]) -> list[str]:
    """The same as options of evenkeel-backup."""
    if request["latest"]:
        return ["--latest"]
    return ["--time", request["time"]] if request["time"] else ["--name", request["name"]]


def _clusters(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def restore_typed(request: Mapping[str, str]) -> str:
    """The same as a person types it."""
    way = next(way for way in WAYS if request[way])
    return f"-e cluster={request['cluster']} -e \"{way}='{request[way]}'\""


def restore_clusters(request: Mapping[str, str]) -> list[str]:
    """The clusters that were named."""
    return _clusters(request["cluster"])


def restore_plan(
    backups: Mapping[str, Any], looked: Mapping[str, Sequence[Mapping[str, Any]]], topology: Mapping[str, Any], platform: str
) -> dict[str, Any]:
    """What a restore in place would do, and the fingerprint of exactly that.

    backups: of `evenkeel-backup plan`. looked: host to what its members said (`restore.py look`); a host that did not answer is absent.
    The restore happens on the member that leads; when none does, on the first that answers.
    """
    clusters: dict[str, Any] = {}
    for cluster, chosen in backups["clusters"].items():
        members = [member["name"] for member in topology["postgresql"][cluster]["members"]]
        said = {host: each for host in members for each in looked.get(host, []) if each["cluster"] == cluster}
        leaders = [host for host, each in said.items() if each["role"] == "primary"]
        first = (leaders or list(said) or [""])[0]
        clusters[cluster] = {
            **chosen,
            "member": first,
            "leads": bool(leaders),
            "others": [host for host in said if host != first],
            "lost": [host for host in members if host not in said],
            "last_commit": str(said.get(first, {}).get("last_commit") or ""),
        }
    decisive = {
        "platform": platform,
        "target": backups["target"],
        "clusters": {
            cluster: {key: each[key] for key in DECISIVE} for cluster, each in clusters.items()
        },
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    return {
        "fingerprint": digest[:FINGERPRINT_LENGTH],
        "target": backups["target"],
        "clusters": clusters,
        # of two clusters, one must not be written to while the other is still on its way to the same time
        "stops_application": len(clusters) > 1,
    }


def restore_plan_problem(plan: Mapping[str, Any], looked: Mapping[str, Sequence[Mapping[str, Any]]], confirm: str) -> str:
    """Why this plan must not be carried out; empty when nothing speaks against it."""
    for cluster, each in plan["clusters"].items():
        if not each["member"]:
            return f"no member of cluster {cluster} can be reached: switch one on, or rebuild it with playbooks/replace_host.yml"
    under_way = {each["restoring"] for said in looked.values() for each in said if each.get("restoring")}
    if under_way:
        other = sorted(under_way)[0]
        return f"a restore is under way ({other}): finish it with -e confirm={other}, or give it up with -e abort={other}"
    if confirm and confirm != plan["fingerprint"]:
        return f"confirm={confirm} is of another plan; this one has the fingerprint {plan['fingerprint']}. Read it above, then confirm that"
    return ""


def _ago(moment: str, now: float) -> str:
    seconds = now - datetime.fromisoformat(moment).timestamp()
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"


def _goal(target: Mapping[str, Any]) -> str:
    if target["kind"] == "latest":
        return "the newest state that the archive holds"
    return f"the restore point {target['text']}" if target["kind"] == "name" else str(target["text"]).replace(".000000", "")


def _loss(target: Mapping[str, Any], last_commit: str, now: float) -> str:
    if target["kind"] == "latest":
        return "nothing that was archived"
    newest = f"; the newest commit is of {last_commit}" if last_commit else ""
    age = f", {_ago(target['text'], now)} of work at most" if target["kind"] == "time" else ""
    return f"all that was committed after it{age}{newest}"


def restore_plan_text(plan: Mapping[str, Any], now: float) -> str:
    """The plan for the person who confirms it."""
    target = plan["target"]
    lines = [f"Restore {' and '.join(plan['clusters'])} to {_goal(target)}:"]
    for cluster, each in plan["clusters"].items():
        lines.append(f"  cluster {cluster}")
        lines.append(f"    backup      {each['backup']} of repository {each['repository']}, ended {each['backup_ended']}")
        lines.append(f"    possible    from {each['from']} to {each['to']}")
        role = "leads now" if each["leads"] else "none leads now"
        copied = f"; copied by {', '.join(each['others'])}" if each["others"] else ""
        lines.append(f"    restored    on {each['member']} ({role}){copied}")
        if each["lost"]:
            lines.append(f"    not there   {', '.join(each['lost'])}: it follows when it is back")
        lines.append(f"    is lost     {_loss(target, each['last_commit'], now)}")
    if plan["stops_application"]:
        lines.append("  The application is stopped until both clusters are back.")
    else:
        lines.append("  The application goes on, without this cluster, until it is back.")
    lines.append(f"fingerprint of this plan: {plan['fingerprint']}")
    return "\n".join(lines)


def restore_members_here(plan: Mapping[str, Any], host: str, place: str) -> list[str]:
    """The clusters of which this host is the member that is restored (place: member), or one of the others (place: others)."""
    clusters = plan.get("clusters", {})
    return [cluster for cluster, each in clusters.items() if host in (each["others"] if place == "others" else [each["member"]])]


def restore_failures(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why clusters were not recovered. answers: loop results of `restore.py run`."""
    bad = [answer for answer in answers if not answer.get("skipped") and answer.get("rc") != 0]
    return [str(answer.get("stderr") or answer.get("msg") or "it was interrupted").strip() for answer in bad]


def restore_results(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the members said at the end of recovery, by cluster. answers: loop results of commands, those that were skipped among them."""
    said = [json.loads(answer["stdout"]) for answer in answers if answer.get("rc") == 0 and answer.get("stdout")]
    return {each["cluster"]: {key: value for key, value in each.items() if key != "cluster"} for each in said}


def restore_looks(answers: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Host to what its members said. answers: host to the registered loop result of `restore.py look`."""
    looked: dict[str, list[dict[str, Any]]] = {}
    for host, answer in answers.items():
        for result in (answer or {}).get("results", []):
            if result.get("rc") == 0:
                looked.setdefault(host, []).append(json.loads(result["stdout"]))
    return looked


def restore_report(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    plan = record["plan"]
    lines = [
        f"# Restore {plan['fingerprint']}",
        "",
        f"{' and '.join(plan['clusters'])} to {_goal(plan['target'])}; begun {record['started']}, ended {record['ended']}.",
        "",
        "| cluster | on | backup | recovery ended | newest commit | restore | recovery | old data |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cluster, each in plan["clusters"].items():
        result = record["results"].get(cluster, {})
        lines.append(
            f"| {cluster} | {each['member']} | {each['backup']} ({each['repository']}) "
            f"| {result.get('ended', '')} {result.get('reason', '')} | {result.get('last_commit') or 'unknown'} "
            f"| {result.get('restore_seconds', '')} s | {result.get('recover_seconds', '')} s | {result.get('kept') or 'not kept'} |"
        )
    return "\n".join(lines) + "\n"


def restore_farewell(record: Mapping[str, Any]) -> str:
    """The last words of the playbook."""
    if record["outcome"] != "restored":
        return f"The restore {record['plan']['fingerprint']} was given up: {' and '.join(record['plan']['clusters'])} as before it."
    lines = [f"{' and '.join(record['plan']['clusters'])} restored to {_goal(record['plan']['target'])}."]
    for cluster, each in record["results"].items():
        lines.append(f"  {cluster}: newest commit {each['last_commit'] or 'unknown'}; {each['reason']}")
        if each["kept"]:
            host = record["plan"]["clusters"][cluster]["member"]
            lines.append(f"    the old data are on {host} in {each['kept']}: remove them when nobody misses anything")
    lines.append("  A full backup of the restored state has begun: playbooks/backup.yml shows it.")
    return "\n".join(lines)


class FilterModule:
    """Gives the filters to Ansible."""

    def filters(self) -> dict[str, Any]:
        return {
            "restore_request_problem": restore_request_problem,
            "restore_target_options": restore_target_options,
            "restore_typed": restore_typed,
            "restore_clusters": restore_clusters,
            "restore_members_here": restore_members_here,
            "restore_failures": restore_failures,
            "restore_plan": restore_plan,
            "restore_plan_problem": restore_plan_problem,
            "restore_plan_text": restore_plan_text,
            "restore_results": restore_results,
            "restore_looks": restore_looks,
            "restore_report": restore_report,
            "restore_farewell": restore_farewell,
        }

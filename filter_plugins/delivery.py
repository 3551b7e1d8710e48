"""Pure functions for deploy.yml and rollback.yml: what speaks against beginning, which release was before, what is asked of a host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

ROOM_FACTOR = 5  # a release unpacked and installed, beside its archive and with some air
LEAST_FREE_MB = 1024


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _found(hosts: Sequence[str]) -> str:
    return "have" if len(hosts) > 1 else "has"


def deploy_obstacle(
    facts: Mapping[str, Mapping[str, Any]],
    answers: Mapping[str, Mapping[str, Any]],
    dangers: Sequence[str],
    archive_mb: float,
    app: str,
    delivered: bool = True,
) -> str:
    """Why a deploy should not begin, in one sentence; empty when nothing speaks against it.

    facts: host to what `release_facts` returned. answers: host to what `platform_state` returned. dangers: of the filter `status_report`.
    delivered: whether a release has ever run well here; a first deploy that ended midway leaves hosts without one, and may be repeated.
    Processes of the application may be unwell: the deploy may be what mends them. What they stand on may not.
    """
    fresh = [host for host, each in facts.items() if not each.get("converged")]
    if fresh:
        return f"{_and(fresh)} {_found(fresh)} not been converged: run playbooks/site.yml first"
    needed = int(max(archive_mb * ROOM_FACTOR, LEAST_FREE_MB))
    full = [f"{host} has {each['free_mb']} MB" for host, each in facts.items() if each["free_mb"] < needed]
    if full:
        return f"a release needs {needed} MB of room below /opt/{app}, and {_and(full)}: run playbooks/prune.yml"
    running = {host for host, each in facts.items() if each["current"]}
    if delivered and running and len(running) < len(facts):
        without = next(host for host in facts if host not in running)
        others = sorted(running)
        return f"{without} has no release, while {_and(others)} {_found(others)} one: run playbooks/replace_host.yml -e host={without}"
    if dangers:
        return f"the platform is in danger: {dangers[0]}"
    unwell = []
    for host, answer in answers.items():
        rows = answer.get("state", {}).get("health")
        for row in rows if isinstance(rows, list) else []:
            if row["status"] != "healthy" and not row["name"].startswith(f"{app}-") and not row.get("timers"):
                unwell.append(f"{row['name']} on {host} is {row['status']}")
    if unwell:
        return f"{_and(unwell[:3])}: run playbooks/status.yml, and mend that first"
    return ""


def backup_obstacle(holdings: Mapping[str, Any], now: float, most_hours: float) -> str:
    """Why the backups are not good enough to begin; empty when they are.

    holdings: of `evenkeel-backup list --json`: cluster to its repositories. now: seconds since the epoch.
    """
    for cluster, repositories in holdings.items():
        ended = [each["stopped"] for repository in repositories for each in repository["backups"] if not each["failed"]]
        then = f"make one: playbooks/backup.yml -e action=now -e cluster={cluster}"
        if not ended:
            return f"cluster {cluster} has no backup: {then}"
        age = (now - max(ended)) / 3600
        if age > most_hours:
            return f"the newest backup of cluster {cluster} is {age:.0f} hours old, more than {most_hours:.0f}: {then}"
    return ""


def release_before(facts: Mapping[str, Mapping[str, Any]], recorded: str, release: str) -> str:
    """The release to go back to when `release` fails; '' for a first one.

    What all hosts ran a moment ago; where they differ, because a delivery was interrupted, the one that was recorded as good last, else
    what most of them run.

    facts: host to what `release_facts` returned. recorded: of the filter `ledger_previous`.
    """
    on_all = set.intersection(*(set(each["kept"]) for each in facts.values())) if facts else set()
    before = {each["current"] for each in facts.values()}
    if len(before) == 1 and before <= on_all - {release}:
        return str(before.pop())
    if recorded and recorded in on_all and recorded != release:
        return recorded
    running = Counter(each["current"] for each in facts.values() if each["current"] in on_all - {release})
    return running.most_common(1)[0][0] if running else ""


def releases_kept_on_all(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The releases that every host holds."""
    return sorted(set.intersection(*(set(each["kept"]) for each in facts.values()))) if facts else []


def contract_checks(contract: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The contract's checks as the module `http_checks` takes them, with the tokens that they send."""
    return [_check(check, contract["secrets"]) for check in contract["checks"]]


def contract_host_checks(contract: Mapping[str, Any], host: str, addresses: Mapping[str, str]) -> dict[str, Any]:
    """What is asked of the web processes of one host, past the proxy: {url, checks} of the process with the path `/`, or of the first one.

    Only what reads (GET and HEAD), and only checks whose path this process serves.
    """
    webs = [each for each in contract["processes"].values() if each["kind"] == "web" and host in each["members"]]
    if not webs:
        return {"url": "", "checks": []}
    web = min(webs, key=lambda each: len(each["path"]))
    others = [each["path"] for each in webs if each is not web]
    checks = [
        _check(check, contract["secrets"])
        for check in contract["checks"]
        if check["method"] in ("GET", "HEAD") and check["path"].startswith(web["path"]) and not check["path"].startswith(tuple(others))
    ]
    return {"url": f"http://{addresses[host]}:{web['port']}", "checks": checks}


def _check(check: Mapping[str, Any], secrets: Mapping[str, Any]) -> dict[str, Any]:
    """One check, with its token in place of the token's name."""
    plain = {key: value for key, value in check.items() if key != "bearer"}
    return plain | ({"token": str(secrets[check["bearer"]])} if check.get("bearer") else {})


def failure_words(result: Mapping[str, Any], task: str, host: str) -> str:
    """Why a task failed, in one paragraph: its own words, else the name of the task and what it returned."""
    parts = [each for each in result.get("results") or [] if isinstance(each, Mapping) and each.get("failed")] or [result]
    said = []
    for part in parts:
        words = str(part.get("stderr") or part.get("msg") or part.get("module_stderr") or part.get("stdout") or "").strip()
        said.append(words or f"exit code {part.get('rc', 'unknown')}")
    where = "" if host == "localhost" else f" on {host}"
    return f"{task}{where}: {'; '.join(dict.fromkeys(said))}"


def lost_hosts(hosts: Sequence[str], under_way: Sequence[str], problems: Sequence[str]) -> list[str]:
    """A sentence for each host that began something and neither ended it nor said why not. The lists are in the order of the hosts."""
    return [f"{host} was lost while {doing}" for host, doing, why in zip(hosts, under_way, problems, strict=True) if doing and not why]


def delivery_entry(kind: str, release: str, previous: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """What the ledger keeps of a deploy or a rollback.

    how: problems and not_back (lists of sentences), stays (migrations because of which it does not go back by itself), begun (some host
    was switched), migrated (migrations were begun), back (the hosts went back), began, noticed, back_at, now (seconds since the epoch; 0
    where it did not happen), heads, and verdict (of a rollback).
    """
    problems, not_back = list(how["problems"]), list(how["not_back"])
    if not problems:
        outcome = "succeeded"
    elif how["back"] and not not_back:
        outcome = "rolled back"
    else:
        outcome = "failed" if how["begun"] or how["migrated"] else "refused"
    unbearable = how["stays"] if problems and how["begun"] else []
    stays = [f"the hosts stay on it, for the release before cannot bear {one['app']}.{one['name']}: {one['why']}" for one in unbearable]
    entry: dict[str, Any] = {
        "kind": kind,
        "release": release,
        "previous": previous,
        "outcome": outcome,
        "why": "; ".join([*problems, *(f"and on the way back: {each}" for each in not_back), *stays]),
        "seconds": round(how["now"] - how["began"], 1),
        "heads": how["heads"],
    }
    if problems:
        entry |= {"begun": bool(how["begun"]), "went_back": bool(how["back"])}
    if how["back"] and how["noticed"]:
        entry["back_seconds"] = round(how["back_at"] - how["noticed"], 1)
    if how.get("verdict"):
        entry["verdict"] = how["verdict"]
    return entry


def deploy_farewell(entry: Mapping[str, Any], inventory: str, hosts: Sequence[str]) -> str:
    """The last words of deploy.yml: what happened, what it means, what to type next."""
    release, previous, why = entry["release"], entry["previous"], entry["why"]
    play = f"ansible-playbook -i {inventory} playbooks"
    if entry["outcome"] == "succeeded":
        way_back = f"\nto go back: {play}/rollback.yml" if previous else ""
        return f"release {release} runs on {_and(hosts)}; all checks passed after {entry['seconds']:.0f} s{way_back}"
    if entry["outcome"] == "refused":
        running = "the running release and the databases are as they were"
        return f"Release {release} was not deployed; {running if previous else 'nothing was changed'}.\n{why}"
    if entry["outcome"] == "rolled back":
        after = f" after {entry['back_seconds']:.0f} s" if "back_seconds" in entry else ""
        return (
            f"Release {release} was taken back: {why}\n"
            f"Every host is back on release {previous}{after}, and answers as it should. "
            f"{release} is marked bad in the ledger.\nnext: mend what it says, and build a new release"
        )
    state = f"{play}/status.yml shows who runs what"
    if entry.get("went_back"):
        then = f"{play}/rollback.yml -e release={previous}"
        return f"Release {release} failed, and the way back to {previous} did not end well: {why}\nnext: {state}; then {then}"
    if not previous:
        return f"Release {release} failed: {why}\nThere is no release to go back to: mend what it says, then deploy again\n{state}"
    if not entry.get("begun"):
        return f"Release {release} failed: {why}\nThe hosts still run {previous}\n{state}"
    return f"Release {release} failed: {why}\nTo go back: {play}/rollback.yml -e release={previous}\n{state}"


def release_current(facts: Mapping[str, Mapping[str, Any]], last_good: str) -> str:
    """The release that the hosts run; of several, after an interruption, the one that is not the last good one."""
    running = Counter(each["current"] for each in facts.values() if each["current"])
    odd = [release for release, _ in running.most_common() if release != last_good]
    return str((odd if len(running) > 1 else list(running) or [""])[0])


def rollback_target(facts: Mapping[str, Mapping[str, Any]], wanted: str, commit: str, previous: str, bad: Sequence[str]) -> dict[str, str]:
    """Which release a rollback goes to: {id, problem}.

    facts: host to what `release_facts` returned. wanted: an id, the start of a commit, a version, or a tag, whose commit is then `commit`;
    empty for the previous one. previous: where an unfinished way back leads, else the newest that ran well; on all hosts and not bad.
    bad: releases that are marked bad. To go to the one that runs is no mistake: it ends what was interrupted.
    """
    kept = releases_kept_on_all(facts)
    known = f"on all hosts are {_and(kept)}" if kept else "no release is on all hosts"
    if not wanted:
        if previous:
            return {"id": previous, "problem": ""}
        return {"id": "", "problem": f"no earlier release that ran well is known. Name one with -e release=<id>: {known}"}
    found = [each for each in kept if each == wanted]
    if not found:
        starts = [text[:12] for text in (commit, wanted) if len(text) >= 7]
        found = [each for each in kept if any(each.rpartition("-")[2].startswith(start) for start in starts)]
    found = found or [each for each in kept if each.rpartition("-")[0] == wanted]
    if len(found) != 1:
        return {"id": "", "problem": f"'{wanted}' names {len(found)} releases: {known}"}
    if found[0] in bad:
        return {"id": found[0], "problem": f"{found[0]} is marked bad: it did not hold when it was deployed last. See playbooks/ledger.yml"}
    return {"id": found[0], "problem": ""}


def rollback_turn(contract: Mapping[str, Any], hosts: Sequence[str], host: str) -> int:
    """Whether a host switches in the first half (0) or the second (1): each has its part of those that serve users, and of the others."""
    serving = {member for each in contract["processes"].values() if each["kind"] == "web" for member in each["members"]}
    alike = sorted(each for each in hosts if (each in serving) == (host in serving))
    return alike.index(host) % 2


def unrecorded(why: str, inventory: str) -> str:
    """What is added to the last words when the ledger could not be written; empty when it was."""
    return f"\nThe ledger does not have this: {why}. Mend it: ansible-playbook -i {inventory} playbooks/ledger.yml" if why else ""


def rollback_farewell(entry: Mapping[str, Any], inventory: str, hosts: Sequence[str], silent: Sequence[str]) -> str:
    """The last words of rollback.yml: what happened, what it means, what to type next. silent: hosts that did not answer."""
    play = f"ansible-playbook -i {inventory} playbooks"
    if silent and entry["outcome"] == "succeeded":
        return (
            f"release {entry['release']} runs on {_and(hosts)} again, but {_and(silent)} did not answer and was left as it was.\n"
            f"When it is back, type: {play}/rollback.yml -e release={entry['release']}"
        )
    if entry["outcome"] == "succeeded":
        return f"release {entry['release']} runs on {_and(hosts)} again, after {entry['seconds']:.0f} s; all checks passed"
    if entry["outcome"] == "refused":
        return f"Nothing was rolled back, and nothing was changed.\n{entry['why']}"
    again = f"{play}/rollback.yml -e release={entry['release']}"
    return f"The rollback to {entry['release']} did not end well: {entry['why']}\nnext: {play}/status.yml, then {again}"


def restore_point_places(clusters: Mapping[str, Any], databases: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where restore points are named: {cluster, host, port} of each member of each cluster that the application uses."""
    return [
        {"cluster": cluster, "host": member["name"], "port": place["port"]}
        for cluster, place in clusters.items()
        if cluster in databases
        for member in place["members"]
    ]


def watch_problem(result: Mapping[str, Any], most_percent: float, least: int = 5) -> str:
    """Whether too many requests failed in the watch window; empty when not.

    result: what `proxy_errors` returned. least: below so many failures nobody can speak of a rate.
    """
    asked, bad = result["requests"], result["failures"]
    if bad < least or bad * 100 <= asked * most_percent:
        return ""
    return f"{bad} of {asked} requests failed while the new release was watched, more than {most_percent} %: {'; '.join(result['seen'])}"


class FilterModule:
    """Gives the filters to Ansible."""

    def filters(self) -> dict[str, Any]:
        return {
            "backup_obstacle": backup_obstacle,
            "contract_checks": contract_checks,
            "contract_host_checks": contract_host_checks,
            "delivery_entry": delivery_entry,
            "deploy_farewell": deploy_farewell,
            "deploy_obstacle": deploy_obstacle,
            "failure_words": failure_words,
            "lost_hosts": lost_hosts,
            "release_before": release_before,
            "release_current": release_current,
            "releases_kept_on_all": releases_kept_on_all,
            "restore_point_places": restore_point_places,
            "rollback_farewell": rollback_farewell,
            "rollback_target": rollback_target,
            "rollback_turn": rollback_turn,
            "unrecorded": unrecorded,
            "watch_problem": watch_problem,
        }

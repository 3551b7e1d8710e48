"""The status screen: what every host says of itself, put together into one picture of the platform, and judged."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

WIDTH = 100
HOST_DOWN = "its host does not answer"  # a problem of its own, which need not be told again for each part
PRIMARY_ROLES = ("primary", "leader", "master", "standby_leader")
SYNCHRONOUS_ROLES = ("sync_standby", "quorum_standby")


@dataclass
class Screen:
    """Lines in the order in which they are read, and what is not well: (what, what to type next), the dangerous first."""

    lines: list[str] = field(default_factory=list)
    dangers: list[tuple[str, str]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def row(self, head: str, what: str, name: str = "", text: str = "") -> None:
        self.lines.append(_cut(f"{head:<10}  {what:<8}  {name:<13} {text}"))

    def problem(self, what: str, then: str) -> None:
        self.problems.append((what, then))

    def danger(self, what: str, then: str) -> None:
        self.dangers.append((what, then))


def _cut(line: str) -> str:
    """One line of the screen, no longer than that is wide."""
    line = " ".join(line.split("\n")).rstrip()
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _bytes(count: object) -> str:
    if not isinstance(count, int):
        return "unknown"
    for size, unit in ((1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "kB")):
        if count >= size:
            return f"{count / size:.0f} {unit}"
    return f"{count} B"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _said(answers: Mapping[str, Mapping[str, Any]], host: str, part: str) -> tuple[Any, str]:
    """What a part on a host says, and why it says nothing."""
    state = answers[host].get("state")
    if not isinstance(state, Mapping):
        return None, HOST_DOWN
    said = state.get(part)
    if isinstance(said, Mapping) and "error" in said:
        return None, str(said["error"])
    return (said, "") if said is not None else (None, "not asked")


def _and(names: Iterable[str]) -> str:
    words = list(names)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _etcd(screen: Screen, members: Sequence[str], answers: Mapping[str, Mapping[str, Any]]) -> None:
    said = {name: _said(answers, name, "etcd") for name in members}
    voting = [name for name, (state, _) in said.items() if state and state["has_leader"]]
    leader = next((name for name in voting if said[name][0]["leader"]), "")
    if voting:
        screen.row("etcd", "leader", leader or "unseen", f"{len(voting)}/{len(members)} voters: {' '.join(voting)}")
    else:
        screen.row("etcd", "", "NO QUORUM", f"of {' '.join(members)} none knows a leader")
    for name in members:
        if name not in voting:
            why = said[name][1] or "it knows no leader"
            screen.row("", "!!", name, why)
            if voting and why != HOST_DOWN:
                screen.problem(f"voter {name} is lost to etcd: {why}", f"on {name}: journalctl -u etcd -n 50")
    if not voting:
        screen.danger(
            "etcd has no quorum: PostgreSQL goes on as it is, but can fail over no more",
            f"bring voters back until {len(members) // 2 + 1} of {len(members)} run: systemctl status etcd on {_and(members)}",
        )


def _postgresql(screen: Screen, cluster: str, members: Sequence[str], answers: Mapping[str, Mapping[str, Any]]) -> None:
    own: dict[str, Mapping[str, Any]] = {}
    views: dict[str, Mapping[str, Any]] = {}
    silent: dict[str, str] = {}
    for name in members:
        said, why = _said(answers, name, "patroni")
        said = (said or {}).get(cluster, {"error": why})
        if "error" in said:
            silent[name] = str(said["error"])
        else:
            own[name], views[name] = said["own"], said["cluster"]
    primaries = [name for name, state in own.items() if state.get("role") in PRIMARY_ROLES and state.get("state") == "running"]
    view = next((views[name] for name in [*primaries, *views] if views[name].get("members")), {})
    known = {str(member["name"]): member for member in view.get("members", [])}
    leaders = [name for name, member in known.items() if member.get("role") in PRIMARY_ROLES and member.get("state") == "running"]
    if len(primaries) > 1:
        chosen = [name for name in leaders if name in primaries]
        others = [name for name in primaries if name not in chosen]
        screen.danger(
            f"cluster {cluster} has TWO PRIMARIES: {_and(primaries)}; what one accepts, the other lacks",
            f"etcd names {_and(chosen)}; on {_and(others)}: systemctl stop patroni@{cluster}"
            if chosen and others
            else f"see which one the application uses; on the other: systemctl stop patroni@{cluster}",
        )
    primary = (primaries or leaders or [""])[0]
    for name in primaries or leaders:
        timeline = own.get(name, {}).get("timeline", known.get(name, {}).get("timeline", "?"))
        notes = [f"timeline {timeline}"]
        notes += ["by its own word: etcd does not say"] if name not in leaders else []
        notes += [f"etcd says so, {silent[name]}"] if name in silent else []
        screen.row(cluster, "primary" if len(primaries) < 2 else "PRIMARY", name, ", ".join(notes))
    if not primary:
        screen.row(cluster, "", "NO PRIMARY", f"{len(own)} of {len(members)} members answer")
        screen.danger(
            f"cluster {cluster} has no primary: nothing can be written",
            f"a failover takes half a minute, then look again; else on {_and(members)}: journalctl -u patroni@{cluster} -n 50",
        )
    synchronous = []
    for name in members:
        if name == primary or name in primaries:
            continue
        member, state = known.get(name, {}), own.get(name, {})
        if name in silent and not member:
            screen.row("", "!!", name, silent[name])
            problem = silent[name]
        else:
            running = state.get("replication_state") or member.get("state", "?")
            role = "synchronous" if member.get("role") in SYNCHRONOUS_ROLES else "asynchronous"
            well = running == "streaming" and name not in silent
            ages = {item.get("timeline") for item in (member, known.get(primary, {})) if item.get("timeline")}
            synchronous += [name] if well and role == "synchronous" else []
            notes = [role, str(running), f"lag {_bytes(member.get('lag'))}"]
            notes += [f"timeline {member['timeline']}"] if len(ages) > 1 else []
            notes += [silent[name]] if name in silent else []
            screen.row("", "standby" if well else "!!", name, ", ".join(notes))
            problem = "" if well else silent.get(name) or f"it is {running}"
        if problem and problem != HOST_DOWN:
            screen.problem(
                f"standby {name} of cluster {cluster} does not follow: {problem}", f"on {name}: journalctl -u patroni@{cluster} -n 50"
            )
    if primary and len(members) > 1 and not synchronous:
        screen.problem(f"cluster {cluster} stands on {primary} alone: no synchronous standby", f"on {primary}: patronictl list {cluster}")
    if view.get("pause"):
        screen.row("", "!!", "paused", "nothing fails over by itself")
        screen.problem(f"the failover of cluster {cluster} is paused", f"on {members[0]}: patronictl resume {cluster}")


def _redis(screen: Screen, members: Sequence[str], answers: Mapping[str, Mapping[str, Any]]) -> None:
    said = {name: _said(answers, name, "redis") for name in members}
    masters = [name for name, (state, _) in said.items() if state and state["role"] == "master"]
    votes = {name: _said(answers, name, "sentinel") for name in members}
    named = Counter(state["master"] for state, _ in votes.values() if state and state["master"])
    chosen, agreeing = named.most_common(1)[0] if named else ("", 0)
    watch = f"Sentinels {agreeing}/{len(members)} agree" if len(members) > 1 else ""
    for name in masters:
        screen.row("redis", "master" if len(masters) == 1 else "MASTER", name, watch)
    if not masters:
        screen.row("redis", "", "NO MASTER", watch)
        screen.danger("Redis has no master that answers: no job is announced", "a failover takes ten seconds, then look again; else "
                      f"on {_and(members)}: journalctl -u redis-server -u redis-sentinel -n 50")  # fmt: skip
    if len(masters) > 1:
        others = _and(name for name in masters if name != chosen)
        screen.danger(
            f"Redis has TWO MASTERS: {_and(masters)}; the Sentinels name {chosen or 'none'}",
            f"they mend this within seconds of seeing it; else on {others}: systemctl restart redis-server redis-sentinel",
        )
    offsets = {entry["name"]: entry["offset"] for name in masters for entry in said[name][0]["replicas"]}
    for name in members:
        state, why = said[name]
        if name in masters:
            continue
        if state is None:
            screen.row("", "!!", name, why)
            if why != HOST_DOWN:
                screen.problem(f"Redis on {name} does not answer: {why}", f"on {name}: journalctl -u redis-server -n 50")
            continue
        behind = max(said[masters[0]][0]["offset"] - offsets.get(name, state["offset"]), 0) if masters else None
        well = state["link"] == "connected"
        screen.row("", "replica" if well else "!!", name, f"{state['link']} to {state['master']}, lag {_bytes(behind)}")
        if not well:
            screen.problem(f"replica {name} of Redis is not in sync: {state['link']}", f"on {name}: journalctl -u redis-server -n 50")
    for name in members if len(members) > 1 else []:
        state, why = votes[name]
        if why != HOST_DOWN and (state is None or state["master"] != chosen):
            reason = why or f"it names {state['master'] or 'no master'}, the others {chosen}"
            screen.problem(f"Sentinel on {name} is of no help: {reason}", f"on {name}: journalctl -u redis-sentinel -n 50")


def _front_door(screen: Screen, topology: Mapping[str, Any], answers: Mapping[str, Mapping[str, Any]]) -> None:
    address, proxies = topology["platform"]["address"], [member["name"] for member in topology["proxy"]["members"]]
    said = {name: _said(answers, name, "addresses") for name in proxies}
    holders = [name for name, (found, _) in said.items() if found and address in found]
    others = [name for name, (found, _) in said.items() if found is not None and name not in holders]
    if len(proxies) > 1:
        waiting = f"standing by: {' '.join(others)}" if others else "nobody stands by"
        screen.row("proxy", "address", " ".join(holders) or "NOBODY", f"{address}; {waiting}")
        if not holders:
            screen.danger(f"no proxy holds {address}: users reach nothing", f"on {_and(proxies)}: systemctl status keepalived nginx")
        if len(holders) > 1:
            screen.danger(
                f"{_and(holders)} both hold {address}: users reach now one, now the other",
                "see why they do not hear one another (VRRP, IP protocol 112); on one of them: systemctl restart keepalived",
            )
    drained = {name: _said(answers, name, "drained") for name in proxies}
    lists = {name: {entry["host"]: entry for entry in found} for name, (found, _) in drained.items() if found is not None}
    for name, (found, why) in drained.items():
        if found is None and _said(answers, name, "addresses")[0] is not None:
            screen.problem(f"which hosts are drained at {name} is unknown: {why}", f"on {name}: evenkeel-drain list")
    for host in sorted({host for found in lists.values() for host in found}):
        at = [name for name, found in lists.items() if host in found]
        entry = lists[at[0]][host]
        screen.row("drained", "", host, f"{entry.get('reason', '')} ({entry.get('by', '?')}, {entry.get('since', '?')})")
        if len(at) < len(lists):
            missing = _and(name for name in lists if name not in at)
            then = f"on all of them evenkeel-drain in {host}, or on {missing} evenkeel-drain out {host} --reason …"
            screen.problem(f"{host} is drained at {_and(at)}, but not at {missing}", then)


def _page(screen: Screen, proxies: Sequence[str], answers: Mapping[str, Mapping[str, Any]]) -> str:
    """The maintenance page; returns what the first line of the screen says of it, empty while it is off."""
    said = {name: _said(answers, name, "page") for name in proxies}
    for name, (_, why) in said.items():
        if why and why != HOST_DOWN:
            screen.problem(f"whether {name} shows the maintenance page is unknown: {why}", f"on {name}: evenkeel-page status")
    on = {name: found for name, (found, _) in said.items() if found}
    off = [name for name, (found, why) in said.items() if not found and not why]
    if not on:
        return ""
    entry = next(iter(on.values()))
    told = f"{entry.get('reason', '')} ({entry.get('by', '?')}, {entry.get('since', '?')})"
    screen.row("page", "ON", " ".join(on), told)
    where = f" at {_and(on)}, but not at {_and(off)}" if off else ""
    screen.problem(f"users get the maintenance page{where}: {told}", "when the work is done: playbooks/maintenance.yml -e page=off")
    return f"MAINTENANCE PAGE IS ON{where}: {told}"


def _hosts(screen: Screen, addresses: Mapping[str, str], answers: Mapping[str, Mapping[str, Any]]) -> int:
    """A line for each host, and one more for each service that is not well; returns how many services there are."""
    count = 0
    for host, address in addresses.items():
        state = answers[host].get("state")
        if not isinstance(state, Mapping):
            reason = " ".join(str(answers[host].get("msg") or "no answer").split()).rpartition("to the host via ssh: ")[2]
            screen.lines.append(_cut(f"  --  {host:<13}  {address:<15}  DOES NOT ANSWER: {reason}"))
            continue
        rows, why = _said(answers, host, "health")
        if rows is None:
            screen.lines.append(_cut(f"  !!  {host:<13}  {address:<15}  its health is unknown: {why}"))
            screen.problem(f"the health of {host} is unknown: {why}", "run playbooks/site.yml")
            continue
        unwell = [row for row in rows if row["status"] != "healthy"]
        failed = state.get("failures") if isinstance(state.get("failures"), Mapping) else {}
        mark = "!!" if unwell or failed else "ok"
        screen.lines.append(_cut(f"  {mark}  {host:<13}  {address:<15}  {len(rows) - len(unwell)}/{len(rows)}"))
        count += len(rows)
        for row in rows:
            if row["status"] != "healthy":
                age = f" for {_age(datetime.now(UTC).timestamp() - row['since'])}" if row.get("since") else ""
                screen.lines.append(_cut(f"        {row['name']}: {row['status']}{age}: {row['message'].partition(' Next: ')[0]}"))
            if row.get("restarts"):
                often, last = _count(len(row["restarts"]), "time"), _age(datetime.now(UTC).timestamp() - max(row["restarts"]))
                screen.lines.append(_cut(f"        {row['name']}: was unhealthy and restarted {often} within a day, last {last} ago"))
        # What has a note below is told there, with its last words.
        _unwell(screen, host, [row for row in unwell if not any(unit in (failed or {}) for unit in _units(row))])
        for unit, line in (failed or {}).items():
            told, _, then = str(line).partition(" Next: ")
            screen.lines.append(_cut(f"        {told}"))
            what = "is unhealthy and given up" if " is unhealthy and left alone " in told else "has failed"
            screen.problem(f"{unit} on {host} {what}", f"on {host}: {then or f'journalctl -u {unit} -n 50'}")
    return count


def _units(row: Mapping[str, Any]) -> list[str]:
    """The units that a row of the health checks is about."""
    started = [timer.removesuffix(".timer") + ".service" for timer in row.get("timers") or []]
    return [row["unit"]] if row.get("unit") else started


def _unwell(screen: Screen, host: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Services of a host that are not well are one problem; a timer is one of its own, and says itself what to type."""
    timers = [row for row in rows if row.get("timers")]
    services = [row for row in rows if row not in timers]
    if services:
        units = "".join(f" -u {unit}" for unit in dict.fromkeys(unit for row in services for unit in _units(row)))
        what = f"{_and(row['name'] for row in services)} on {host} {'are' if len(services) > 1 else 'is'} not healthy"
        screen.problem(what, f"on {host}: " + (f"journalctl{units} -n 50" if units else "evenkeel-health status"))
    for row in timers:
        told, _, then = row["message"].partition(" Next: ")
        screen.problem(f"{row['name']} on {host} is {row['status']}: {told.rstrip('.')}", f"on {host}: {then or 'evenkeel-health status'}")


def _releases(screen: Screen, app_hosts: Sequence[str], answers: Mapping[str, Mapping[str, Any]]) -> str:
    """The releases and who runs them; returns the one that all run, empty when there is none such."""
    carriers: dict[str, list[str]] = {}
    for host in app_hosts:
        if isinstance(answers[host].get("state"), Mapping):
            carriers.setdefault(_said(answers, host, "release")[0] or "none", []).append(host)
    for release, hosts in sorted(carriers.items(), key=lambda item: -len(item[1])):
        screen.row("release", "", release, f"on {' '.join(hosts)}")
    if "none" in carriers:
        screen.problem(f"no release on {_and(carriers['none'])}", "run playbooks/release.yml, then playbooks/deploy.yml")
    if len(set(carriers) - {"none"}) > 1:
        screen.problem("hosts carry different releases", "run playbooks/deploy.yml again")
    return next(iter(carriers)) if len(carriers) == 1 else ""


def status_report(
    answers: Mapping[str, Mapping[str, Any]], topology: Mapping[str, Any], app_hosts: Sequence[str], title: str
) -> dict[str, Any]:
    """The status screen.

    answers: result of the module `platform_state` by host (with `msg` and without `state` from a host that does not answer).
    topology: of the filter `topology`. app_hosts: those that must carry a release. Returns {text, problems: [str], dangers: [str]}, where
    dangers are problems, too.
    """
    screen = Screen()
    for host, address in topology["addresses"].items():
        if not isinstance(answers[host].get("state"), Mapping):
            then = f"switch it on; when it is lost for good: ansible-playbook playbooks/replace_host.yml -e host={host}"
            screen.problem(f"{host} ({address}) does not answer", then)
    release = _releases(screen, app_hosts, answers)
    _etcd(screen, [member["name"] for member in topology["etcd"]["members"]], answers)
    for cluster, place in topology["postgresql"].items():
        _postgresql(screen, cluster, [member["name"] for member in place["members"]], answers)
    _redis(screen, [member["name"] for member in topology["redis"]["members"]], answers)
    _front_door(screen, topology, answers)
    page = _page(screen, [member["name"] for member in topology["proxy"]["members"]], answers)
    screen.lines.append("hosts")
    services = _hosts(screen, topology["addresses"], answers)
    problems = [*screen.dangers, *screen.problems]
    number = _count(len(problems), "problem")
    if screen.dangers:
        verdict = f"DANGER: {screen.dangers[0][0]}" + (f" ({number} below)" if len(problems) > 1 else "")
    elif page:
        verdict = page + (f" ({number} below)" if len(problems) > 1 else "")
    elif problems:
        verdict = f"NOT WELL: {number}, listed below"
    else:
        verdict = f"all is well: {_count(len(topology['addresses']), 'host')}, {_count(services, 'service')}"
        verdict += f", release {release}" if release else ""
    lines = [*textwrap.wrap(verdict, WIDTH), _cut(f"{title}   {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"), *screen.lines]
    for what, then in problems:
        lines += textwrap.wrap(what, WIDTH, initial_indent="- ", subsequent_indent="  ")
        lines += textwrap.wrap(f"next: {then}", WIDTH, initial_indent="    ", subsequent_indent="    ")
    told = [f"{what}; next: {then}" for what, then in problems]
    return {"text": "\n".join(lines), "problems": told, "dangers": told[: len(screen.dangers)]}


def patroni_addresses(topology: Mapping[str, Any], host: str) -> dict[str, str]:
    """The address of Patroni's API on a host, for each cluster that it is a member of."""
    return {
        cluster: f"{member['address']}:{place['rest_port']}"
        for cluster, place in topology["postgresql"].items()
        for member in place["members"]
        if member["name"] == host
    }


class FilterModule:
    """The filters of the status screen."""

    def filters(self) -> dict[str, Any]:
        return {"status_report": status_report, "patroni_addresses": patroni_addresses}

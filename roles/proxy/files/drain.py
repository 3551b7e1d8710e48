#!/usr/bin/python3 -IS
"""Takes hosts out of this proxy, gracefully, and puts them back (``evenkeel-drain``); shows users a maintenance page (``evenkeel-page``).

A drained host gets no new requests; those that it has are finished. Which hosts are drained, since when, by whom and why is kept in
``/var/lib/evenkeel/drained/<host>.json``, that the page is on in ``/var/lib/evenkeel/page.json``: over reloads, reboots and converges.
What nginx runs is ``/etc/nginx/nginx.conf`` with ``down`` at the servers of these hosts, and the page switched; nginx.service renders it
(``evenkeel-drain render``) before every start and reload.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pwd
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIGURATION = Path("/etc/nginx/nginx.conf")
RUNNING = Path("/run/evenkeel-proxy/nginx.conf")
DRAINED = Path("/var/lib/evenkeel/drained")
PAGE = Path("/var/lib/evenkeel/page.json")
LOCK = Path("/run/lock/evenkeel-drain")
OPERATOR = "operator"

DONE, FAILED, USAGE, LAST = 0, 1, 2, 3

UPSTREAM = re.compile(r"^\s*upstream\s+(\S+)\s*\{")
SERVER = re.compile(r"^(\s*server\s+(\S+)[^;]*?)( down)?;\s+# (\S+)$")
SWITCH = re.compile(r"^(\s*map .*) [01](; \}\s+# evenkeel-page)$")


class DrainError(Exception):
    """Something that the person at the terminal can put right; `code` is the exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Server:
    """One server line of the configuration."""

    route: str
    host: str
    address: str


@dataclass
class Result:
    """What was done."""

    changed: bool
    message: str
    in_flight: int = 0


# --- the configuration ------------------------------------------------------------------------------------------------


def servers_of(configuration: str) -> list[Server]:
    """The servers of every route. The role writes a host's name behind each of its server lines."""
    servers, route = [], ""
    for line in configuration.splitlines():
        if opened := UPSTREAM.match(line):
            route = opened[1]
        elif found := SERVER.match(line):
            servers.append(Server(route, found[4], found[2]))
    return servers


def render(configuration: str, drained: Collection[str], page: bool = False) -> str:
    """The configuration with `down` at exactly the servers of the drained hosts, and the maintenance page on or off."""

    def marked(line: str) -> str:
        if found := SERVER.match(line):
            return f"{found[1]}{' down' if found[4] in drained else ''};  # {found[4]}"
        return SWITCH.sub(rf"\g<1> {int(page)}\2", line)

    return "".join(f"{marked(line)}\n" for line in configuration.splitlines())


def last_of(servers: Sequence[Server], host: str, drained: Collection[str]) -> str:
    """The first route that would have no server left without this host; empty when there is none."""
    routes = [server.route for server in servers if server.host == host]
    left = {server.route for server in servers if server.host != host and server.host not in drained}
    return next((route for route in routes if route not in left), "")


# --- what is drained --------------------------------------------------------------------------------------------------


def read_drained() -> dict[str, dict[str, Any]]:
    """host -> {host, owner, reason, by, since}. A file that cannot be read still drains its host."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(DRAINED.glob("*.json")):
        entry: Any = {}
        with contextlib.suppress(OSError, ValueError):
            entry = json.loads(path.read_text(encoding="utf-8"))
        known = entry if isinstance(entry, dict) else {}
        unknown = {"owner": OPERATOR, "reason": "not recorded", "by": "unknown", "since": ""}
        found[path.stem] = {**unknown, **known, "host": path.stem}
    return found


def read_page() -> dict[str, Any]:
    """{reason, by, since} while the page is on, empty while it is off. A file that cannot be read still keeps it on."""
    if not PAGE.exists():
        return {}
    entry: Any = {}
    with contextlib.suppress(OSError, ValueError):
        entry = json.loads(PAGE.read_text(encoding="utf-8"))
    return {"reason": "not recorded", "by": "unknown", "since": "", **(entry if isinstance(entry, dict) else {})}


def write_page(entry: Mapping[str, Any]) -> None:
    """Record that the page is on, and why; an empty entry, that it is off."""
    if entry:
        replace_file(PAGE, json.dumps(entry, ensure_ascii=False) + "\n")
    else:
        PAGE.unlink(missing_ok=True)


def write_drained(entry: Mapping[str, Any]) -> None:
    """Record a drained host in one step."""
    DRAINED.mkdir(parents=True, exist_ok=True)
    replace_file(DRAINED / f"{entry['host']}.json", json.dumps(entry, ensure_ascii=False) + "\n")


def replace_file(path: Path, text: str) -> None:
    """A reader sees the old content or the new one, after a power cut too."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def person() -> str:
    """Who types this, as well as a host can know it."""
    if name := os.environ.get("SUDO_USER"):
        return name
    uids = [os.getuid()]
    with contextlib.suppress(OSError, ValueError):
        uids.insert(0, int(Path("/proc/self/loginuid").read_text()))  # -1, nobody, where nothing keeps it
    for uid in uids:
        with contextlib.suppress(KeyError, OverflowError):
            return pwd.getpwuid(uid).pw_name
    return "unknown"


# --- nginx ------------------------------------------------------------------------------------------------------------


def configuration() -> str:
    """What the role wrote."""
    try:
        return CONFIGURATION.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DrainError(f"{CONFIGURATION} does not exist; apply the role proxy to this host") from None


def wanted() -> str:
    """What nginx shall run now."""
    return render(configuration(), read_drained(), bool(read_page()))


def run_render() -> None:
    """Write what nginx runs, once nginx has checked it. Called by nginx.service."""
    candidate = RUNNING.with_name(f".{RUNNING.name}.{os.getpid()}")
    candidate.write_text(wanted(), encoding="utf-8")
    try:
        tested = subprocess.run(["nginx", "-t", "-q", "-c", str(candidate)], capture_output=True, text=True, timeout=60, check=False)
        if tested.returncode:
            raise DrainError(f"nginx refuses {CONFIGURATION}: {tested.stderr.strip() or 'it does not say why'}")
        candidate.replace(RUNNING)
    finally:
        candidate.unlink(missing_ok=True)


def apply() -> None:
    """Let nginx run what is drained now; nothing is done when it already does, or does not run."""
    try:
        running = RUNNING.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    if running == wanted():
        return
    reloaded = subprocess.run(["systemctl", "reload", "nginx.service"], capture_output=True, text=True, timeout=90, check=False)
    if reloaded.returncode:
        raise DrainError("nginx goes on as it was, because it could not be reloaded. Next: journalctl -u nginx.service")


def in_flight(addresses: Collection[str]) -> int:
    """Connections of this proxy to these servers. A worker that nginx retires closes idle ones, so what is left carries a request."""
    filters = " or ".join(f"dst {address}" for address in sorted(addresses))
    listed = subprocess.run(
        ["ss", "-Hnt", "state", "established", f"( {filters} )"], capture_output=True, text=True, timeout=10, check=True
    )
    return len(listed.stdout.splitlines())


# --- verbs ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One change at a time: two drains at once could take the last two servers."""
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def now() -> str:
    """This moment, as it is recorded."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def unknown_host(host: str, servers: Sequence[Server]) -> DrainError:
    """A name that no route knows."""
    known = ", ".join(sorted({server.host for server in servers})) or "none"
    return DrainError(f'no route of this proxy leads to a host "{host}"; known are: {known}', USAGE)


def take_out(host: str, owner: str, reason: str, wait_seconds: float, force: bool) -> Result:
    """Give the host no new requests, and wait until it has answered those that it has."""
    servers = servers_of(configuration())
    own = {server.address for server in servers if server.host == host}
    if not own:
        raise unknown_host(host, servers)
    with locked():
        drained = read_drained()
        changed = host not in drained
        if changed:
            last = last_of(servers, host, drained)
            if last and not force:
                raise DrainError(
                    f"{host} stays: it is the last server of route {last} that is not drained, and without it its users get an error page. "
                    "Put another one back first (evenkeel-drain list), or add --force",
                    LAST,
                )
            write_drained({"host": host, "owner": owner, "reason": reason, "by": person(), "since": now()})
        try:
            apply()
        except DrainError:
            if changed:
                (DRAINED / f"{host}.json").unlink(missing_ok=True)
            raise
    deadline = time.monotonic() + wait_seconds
    while (left := in_flight(own)) and time.monotonic() < deadline:
        time.sleep(0.2)
    state = "is drained" if changed else f"was drained already ({drained[host]['reason']})"
    rest = f"; {left} requests are still in flight" if left else ""
    return Result(changed, f"{host} {state}{rest}", left)


def put_back(host: str, owner: str) -> Result:
    """Give the host requests again, unless somebody else has drained it. An operator may undo everybody's."""
    with locked():
        entry = read_drained().get(host)
        servers = servers_of(configuration())
        if not entry and host not in {server.host for server in servers}:
            raise unknown_host(host, servers)
        if entry and owner not in (OPERATOR, entry["owner"]):
            return Result(False, f"{host} stays drained: {entry['reason']} ({entry['by']}, {entry['since']})")
        if entry:
            (DRAINED / f"{host}.json").unlink()
        try:
            apply()
        except DrainError:
            if entry:
                write_drained(entry)
            raise
    return Result(bool(entry), f"{host} gets requests {'again' if entry else 'already'}")


def listing() -> list[dict[str, Any]]:
    """The drained hosts; `known` says whether a route leads to them at all."""
    known = {server.host for server in servers_of(configuration())}
    return [{**entry, "known": host in known} for host, entry in read_drained().items()]


def switch_page(on: bool, reason: str) -> Result:
    """Give users the maintenance page, or the platform again. Who passes is said in the configuration."""
    if not any(SWITCH.match(line) for line in configuration().splitlines()):
        raise DrainError(f"{CONFIGURATION} knows no maintenance page; apply the role proxy to this host")
    with locked():
        before = read_page()
        if bool(before) != on:
            write_page({"reason": reason, "by": person(), "since": now()} if on else {})
        try:
            apply()
        except DrainError:
            write_page(before)
            raise
    if bool(before) == on:
        return Result(False, f"the page is on already: {told_page(before)}" if on else "the page is off already")
    return Result(True, f"users get the maintenance page: {reason}" if on else "users get the platform again")


def told_page(entry: Mapping[str, Any]) -> str:
    """Why it is on, for people."""
    return f"{entry['reason']} ({entry['by']}, {entry['since']})"


def parser() -> argparse.ArgumentParser:
    """The command line of evenkeel-drain."""
    result = argparse.ArgumentParser(prog="evenkeel-drain", description="Take hosts out of this proxy and put them back.")
    verbs = result.add_subparsers(dest="verb", required=True, metavar="out | in | list | render")
    out = verbs.add_parser("out", help="give a host no new requests; exit code 3 when it is the last one of a route")
    out.add_argument("--reason", required=True, help="shown to whoever finds the host drained")
    out.add_argument("--wait", type=float, default=60, metavar="SECONDS", help="for requests in flight; default 60")
    out.add_argument("--force", action="store_true", help="even the last one: users get the page for bad moments")
    back = verbs.add_parser("in", help="give a host requests again")
    for verb in (out, back):
        verb.add_argument("host", metavar="HOST", help="its name in the inventory")
        verb.add_argument("--owner", default=OPERATOR, help="who drains; only the same one, or an operator, puts the host back")
    listed = verbs.add_parser("list", help="show the drained hosts")
    for verb in (out, back, listed):
        verb.add_argument("--json", action="store_true", help="for programs")
    verbs.add_parser("render", help="write what nginx runs (called by nginx.service)")
    return result


def page_parser() -> argparse.ArgumentParser:
    """The command line of evenkeel-page."""
    result = argparse.ArgumentParser(prog="evenkeel-page", description="Show users of this proxy a maintenance page, or the platform.")
    verbs = result.add_subparsers(dest="verb", required=True, metavar="on | off | status")
    on = verbs.add_parser("on", help="users get the page; the platform's own hosts and the operator's browser pass")
    on.add_argument("--reason", required=True, help="shown to whoever finds the page on")
    off = verbs.add_parser("off", help="users get the platform again")
    for verb in (on, off, verbs.add_parser("status", help="show whether it is on")):
        verb.add_argument("--json", action="store_true", help="for programs")
    return result


def show_page(options: argparse.Namespace) -> None:
    """Run a verb of evenkeel-page."""
    if options.verb == "status":
        entry = read_page()
        told = f"the page is on: {told_page(entry)}" if entry else "the page is off"
        print(json.dumps(entry, ensure_ascii=False) if options.json else told)
        return
    done = switch_page(options.verb == "on", getattr(options, "reason", ""))
    print(json.dumps({"changed": done.changed, "message": done.message}, ensure_ascii=False) if options.json else done.message)


def show(options: argparse.Namespace) -> None:
    """Run a verb of evenkeel-drain."""
    if options.verb == "render":
        run_render()
        return
    if options.verb == "list":
        entries = listing()
        lines = [
            f"{entry['host']}  since {entry['since']}  by {entry['by']} ({entry['owner']})  {entry['reason']}"
            + ("" if entry["known"] else "  [no route leads to this host any more]")
            for entry in entries
        ]
        print(json.dumps(entries, ensure_ascii=False) if options.json else "\n".join(lines) or "no host is drained")
        return
    if options.verb == "out":
        done = take_out(options.host, options.owner, options.reason, options.wait, options.force)
    else:
        done = put_back(options.host, options.owner)
    answer = {"changed": done.changed, "message": done.message, "in_flight": done.in_flight}
    print(json.dumps(answer, ensure_ascii=False) if options.json else done.message)


def main(argv: Sequence[str], program: str = "evenkeel-drain") -> int:
    """The exit code: 0 done, 1 failed, 2 a wrong name, 3 refused because it is the last server."""
    about_page = program == "evenkeel-page"
    options = (page_parser() if about_page else parser()).parse_args(argv)
    try:
        if about_page:
            show_page(options)
        else:
            show(options)
    except DrainError as error:
        if getattr(options, "json", False):
            print(json.dumps({"changed": False, "message": str(error), "in_flight": 0}, ensure_ascii=False))
        print(f"{program}: {error}", file=sys.stderr)
        return error.code
    except PermissionError as error:
        print(f"{program}: {error.filename}: permission denied; run it as root", file=sys.stderr)
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(sys.argv[0]).name))

#!/usr/bin/python3 -IS
"""Health of this host's services: a daemon that checks them, and the command line that shows and awaits the results.

The semantics are those of a container's health check. A service is *starting* until its first success, which makes it
*healthy*; failures within the start period do not count; `retries` failures in a row make it *unhealthy*; one success
makes it healthy again. A restart of the service's unit begins anew.

The daemon reads ``/etc/evenkeel/health.json`` and writes ``/run/evenkeel/health/<service>.json`` (atomically), and metrics. It has no
privileges. When a service whose row has ``restart`` is unhealthy it leaves a request; a unit of root looks for itself and decides.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import FrameType

HOPELESS_RESTARTS = 3  # a process that ended so often while somebody waited for it will not come up
TABLE = Path("/etc/evenkeel/health.json")
CREDENTIALS = Path("/etc/evenkeel/health.credentials")
STATES = Path("/run/evenkeel/health")
INVOCATIONS = Path("/run/systemd/units")
FAILURES = Path("/var/lib/evenkeel/failures")  # a note for each unit that failed for good, until it runs again
METRICS = Path("/var/lib/evenkeel/metrics")
REQUESTS = Path("/run/evenkeel/health-restart")  # from the daemons to root: an empty file with the name of a service
RESTARTS = Path("/var/lib/evenkeel/health/restarts.json")  # what root did, for the limit
CHECK_USER = "evenkeel-health"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BODY_LIMIT = 256 * 1024
MESSAGE_LIMIT = 300
# A service that has just been started is asked more often, so that those who wait for it need not wait for a turn.
STARTING_INTERVAL = 1.0
METRICS_SECONDS = 10.0  # as often as the checks; a change is written at once
NEED_SECONDS = 2.0  # to ask each service on another host that an unhealthy one needs
SHARED_SECONDS = 5.0  # rows that ask systemd so soon one after another share an answer
SHOWN_SECONDS = 86400.0  # restarts of the last day are shown beside the status
PROPERTIES = ("Id", "LoadState", "ActiveState", "Result", "ExecMainStatus", "ExecMainExitTimestampMonotonic")
RUNNING = ("activating", "active", "reloading", "deactivating")

OK, NOT_HEALTHY, USAGE = 0, 1, 2

Status = Literal["starting", "healthy", "unhealthy"]
STATUSES: tuple[Status, ...] = ("starting", "healthy", "unhealthy")


@dataclass(frozen=True)
class Service:
    """One row of the table."""

    name: str
    kind: str
    owner: str = ""
    unit: str = ""
    endpoint: str = ""
    url: str = ""
    status: int = 200
    contains: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    bearer: str = ""
    ca: str = ""
    command: list[str] = field(default_factory=list)
    expected: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    credentials: dict[str, str] = field(default_factory=dict)
    environment_files: list[str] = field(default_factory=list)
    directory: str = ""
    user: str = ""
    interval_seconds: float = 10
    timeout_seconds: float = 10
    retries: int = 30
    start_period_seconds: float = 10
    remote: bool = False
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    timers: list[str] = field(default_factory=list)
    restart: bool = False
    after: list[str] = field(default_factory=list)
    protocol: str = ""


@dataclass(frozen=True)
class Outcome:
    """The result of one check; `passed` is None while the run that will decide is under way."""

    passed: bool | None
    message: str


@dataclass(frozen=True)
class State:
    """What is known of one service. `since` and `checked` are seconds since 1970; `streak` counts successes, or failures below 0."""

    name: str
    status: Status
    streak: int
    since: float
    started: float
    checked: float
    seconds: float
    message: str
    invocation: str


class HealthError(Exception):
    """Something that the person at the terminal can put right."""


# --- the state machine ------------------------------------------------------------------------------------------------


def begin(name: str, invocation: str, now: float) -> State:
    """A service of which nothing is known yet."""
    return State(name, "starting", 0, now, now, 0.0, 0.0, "no check has been made yet", invocation)


def advance(state: State, outcome: Outcome, service: Service, now: float, seconds: float) -> State:
    """The state after one more check. `streak` counts the results in a row that speak for the same side."""
    state = replace(state, checked=now, seconds=round(seconds, 4), message=outcome.message)
    if outcome.passed is None and state.status == "unhealthy":
        return state
    if outcome.passed is not False:
        if state.status == "healthy":
            return replace(state, streak=max(state.streak, 0) + 1)
        return replace(state, status="healthy", streak=1, since=now)
    if state.status == "starting" and state.invocation and now - state.started < service.start_period_seconds:
        return state
    streak = min(state.streak, 0) - 1
    if state.status != "unhealthy" and -streak >= service.retries:
        return replace(state, status="unhealthy", streak=streak, since=now)
    return replace(state, streak=streak)


def begin_again(state: State, invocation: str, now: float) -> State:
    """The unit was stopped or started: what was known no longer counts."""
    return begin(state.name, invocation, now)


def pause_until_next(state: State, service: Service, now: float) -> float:
    """Seconds until the next check."""
    if state.status == "starting" and state.invocation and now - state.started < service.start_period_seconds:
        return min(STARTING_INTERVAL, service.interval_seconds)
    return service.interval_seconds


# --- checks -----------------------------------------------------------------------------------------------------------


def one_line(text: str, secrets: Iterable[str] = ()) -> str:
    """The last line that says something, short, and without secrets."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[-1] if lines else ""
    for secret in secrets:
        if secret:
            line = line.replace(secret, "***")
    return line if len(line) <= MESSAGE_LIMIT else line[: MESSAGE_LIMIT - 1] + "…"


def unit_invocation(unit: str) -> str:
    """The identity of the unit's present run, empty while it does not run: one link that systemd keeps."""
    if not unit:
        return "-"
    try:
        return str((INVOCATIONS / f"invocation:{unit}").readlink())
    except OSError:
        return ""


_TLS: dict[str, ssl.SSLContext] = {}


def _tls(ca: str) -> ssl.SSLContext:
    import ssl

    if ca not in _TLS:
        _TLS[ca] = ssl.create_default_context(cafile=ca or None)
    return _TLS[ca]


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _body(raw: bytes, head: str) -> bytes:
    """The body, put together again if it came in chunks."""
    if "\r\ntransfer-encoding: chunked" not in head.lower():
        return raw
    body = b""
    while raw:
        size_line, _, rest = raw.partition(b"\r\n")
        size = int(size_line.split(b";")[0] or b"0", 16)
        if size == 0:
            break
        body += rest[:size]
        raw = rest[size + 2 :]
    return body


def _exchange(service: Service, credentials: Mapping[str, str], deadline: float) -> tuple[int, bytes]:
    """One HTTP request. Plain sockets, because every byte of it must be within one deadline, and cheap."""
    url = urlsplit(service.url)
    host = url.hostname or ""
    secure = url.scheme == "https"
    headers = {"Host": url.netloc, "User-Agent": "evenkeel-health", "Accept": "*/*", "Connection": "close"}
    headers |= service.headers
    if service.bearer:
        headers["Authorization"] = f"Bearer {credentials[service.bearer]}"
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    request = f"GET {target} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    connection: socket.socket = socket.create_connection((host, url.port or (443 if secure else 80)), timeout=_left(deadline))
    try:
        if secure:
            connection = _tls(service.ca).wrap_socket(connection, server_hostname=host)
        connection.settimeout(_left(deadline))
        connection.sendall(request.encode())
        answer = b""
        while len(answer) < BODY_LIMIT:
            connection.settimeout(_left(deadline))
            part = connection.recv(65536)
            if not part:
                break
            answer += part
            expected = answer.split(None, 2)[1:2] == [str(service.status).encode()]
            if b"\r\n\r\n" in answer and expected and not service.contains:
                break
    finally:
        connection.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise HealthError("the answer is not HTTP" if answer else "the connection was closed without an answer")
    return int(words[1]), _body(body, head.decode("latin-1"))


def check_http(service: Service, credentials: Mapping[str, str]) -> Outcome:
    """Healthy means: the expected status, and the expected text when there is one, within the time-out."""
    if service.bearer and service.bearer not in credentials:
        return Outcome(False, f"the credential {service.bearer} is missing in {CREDENTIALS}")
    try:
        status, body = _exchange(service, credentials, time.monotonic() + service.timeout_seconds)
    except TimeoutError:
        return Outcome(False, f"no answer from {service.url} within {service.timeout_seconds:g} s")
    except (OSError, ValueError, HealthError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Outcome(False, f"{service.url}: {one_line(reason, credentials.values())}")
    if status != service.status:
        said = body.decode(errors="replace").strip()
        why = "" if said.startswith("<") else one_line(said, credentials.values())  # a page says nothing in one line
        return Outcome(False, f"{service.url} answered {status}, expected {service.status}" + (f": {why}" if why else ""))
    if service.contains and service.contains.encode() not in body:
        return Outcome(False, f'{service.url} answered {status}, but without "{service.contains}"')
    return Outcome(True, f"{service.url} answered {status}")


def command_environment(service: Service, credentials: Mapping[str, str], inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of a check command: the app's own for a check with `user`, else a clean one."""
    private = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "CREDENTIALS_DIRECTORY", "LISTEN_FDS", "LISTEN_PID")
    result = {"PATH": SEARCH_PATH, "LANG": "C.UTF-8"}
    if service.user:
        result |= {name: value for name, value in inherited.items() if name not in private}
    result |= service.environment
    result |= {variable: credentials[name] for variable, name in service.credentials.items()}
    return result


def check_command(service: Service, credentials: Mapping[str, str]) -> Outcome:
    """Healthy means: exit code 0, and the expected text when there is one, within the time-out."""
    program = Path(service.command[0]).name
    missing = [name for name in service.credentials.values() if name not in credentials]
    if missing:
        return Outcome(False, f"the credential {missing[0]} is missing in {CREDENTIALS}")
    secrets = [credentials[name] for name in service.credentials.values()]
    identity: dict[str, Any] = {}
    if os.geteuid() == 0:  # `evenkeel-health wait` before the start of a unit: checks never run as root
        account = pwd.getpwnam(service.user or CHECK_USER)
        identity = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    try:
        with subprocess.Popen(
            service.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=command_environment(service, credentials, os.environ),
            cwd=service.directory or "/",
            start_new_session=True,
            **identity,
        ) as process:
            try:
                output, _ = process.communicate(timeout=service.timeout_seconds)
            except subprocess.TimeoutExpired:
                return Outcome(False, f"{program} did not end within {service.timeout_seconds:g} s")
            finally:
                # Whatever it has left behind ends with it.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
    except (OSError, KeyError) as error:
        return Outcome(False, f"{program} could not be run: {error}")
    text = output.decode(errors="replace")
    said = one_line(text, secrets) or "no output"
    if process.returncode != 0:
        return Outcome(False, f"{program} ended with exit code {process.returncode}: {said}")
    if service.expected and service.expected not in text:
        return Outcome(False, f'{program} answered without "{service.expected}": {said}')
    return Outcome(True, said)


_ANSWERED: dict[str, int] = {}


def check(service: Service, credentials: Mapping[str, str], invocation: str) -> Outcome:
    """Make one check: of a service with alternatives, until one of them passes, and first the one that passed last."""
    if not service.remote and not invocation:
        return Outcome(False, f"{service.unit} is not running")
    count = 1 + len(service.alternatives)
    ways = [replace(service, **changes, timeout_seconds=service.timeout_seconds / count) for changes in [{}, *service.alternatives]]
    failures: dict[int, str] = {}
    for number in sorted(range(count), key=lambda number: number != _ANSWERED.get(service.name)):
        outcome = check_once(ways[number], credentials)
        if outcome.passed:
            _ANSWERED[service.name] = number
            return outcome
        failures[number] = outcome.message
    return Outcome(False, "; ".join(failures[number] for number in sorted(failures)))


class Systemd:
    """What systemd says of some units, asked for all rows together: each question is a program."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.units: set[str] = set()
        self.asked = -SHARED_SECONDS
        self.said: dict[str, dict[str, str]] = {}

    def show(self, units: Iterable[str], timeout: float) -> dict[str, dict[str, str]]:
        """Unit to its properties."""
        with self.lock:
            if not self.units.issuperset(units) or time.monotonic() - self.asked >= SHARED_SECONDS:
                self.units.update(units)
                self.said = show_units(sorted(self.units), timeout)
                self.asked = time.monotonic()
            return self.said


def show_units(units: Sequence[str], timeout: float) -> dict[str, dict[str, str]]:
    """Unit to what systemd says of it now."""
    command = ["systemctl", "show", f"--property={','.join(PROPERTIES)}", "--", *units]
    clean = {"PATH": SEARCH_PATH, "LANG": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=clean)
    if done.returncode != 0:
        raise HealthError(f"systemd does not answer: {one_line(done.stderr) or 'no reason given'}")
    blocks = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in done.stdout.split("\n\n")]
    return {block["Id"]: block for block in blocks if "Id" in block}


_SYSTEMD = Systemd()


def started_by(timer: str) -> str:
    """The service that a timer starts."""
    return f"{timer.removesuffix('.timer')}.service"


def check_timers(service: Service) -> Outcome:
    """Healthy means: every timer is active, and the last run of what it starts did not fail."""
    try:
        said = _SYSTEMD.show([unit for timer in service.timers for unit in (timer, started_by(timer))], service.timeout_seconds)
    except subprocess.TimeoutExpired:
        return Outcome(False, f"systemd did not answer within {service.timeout_seconds:g} s")
    except (OSError, HealthError) as error:
        return Outcome(False, str(error))
    outcomes = [judge_timer(timer, said, (FAILURES / started_by(timer)).exists()) for timer in service.timers]
    wrong = [outcome.message for outcome in outcomes if outcome.passed is False]
    if wrong:
        return Outcome(False, "; ".join(wrong))
    undecided = [outcome for outcome in outcomes if outcome.passed is None]
    return Outcome(None if undecided else True, "; ".join(dict.fromkeys(outcome.message for outcome in undecided or outcomes)))


def judge_timer(timer: str, said: Mapping[str, Mapping[str, str]], noted: bool) -> Outcome:
    """One timer. `noted`: a note says that the last run failed; it outlives a reboot, after which systemd knows nothing of that run."""
    unit = started_by(timer)
    own, run = said.get(timer, {}), said.get(unit, {})
    if own.get("ActiveState") != "active":
        state = "not installed" if own.get("LoadState") == "not-found" else own.get("ActiveState") or "unknown to systemd"
        return Outcome(False, f"{timer} is {state}: nothing starts {unit}. Next: systemctl start {timer}")
    if run.get("ActiveState") in RUNNING:
        return Outcome(None, f"{unit} is running")
    result = run.get("Result", "unknown")
    if result != "success" or noted:
        how = f" ({result}, exit status {run.get('ExecMainStatus', '?')})" if result != "success" else ""
        then = f"journalctl -u {unit} -n 50; when the cause is gone: systemctl start {unit}"
        return Outcome(False, f"the last run of {unit} failed{how}. Next: {then}")
    ran = run.get("ExecMainExitTimestampMonotonic", "0") != "0"
    return Outcome(True, "active; the last run succeeded" if ran else "active; no run since the boot")


def check_once(service: Service, credentials: Mapping[str, str]) -> Outcome:
    """Ask one place."""
    if service.kind == "timer":
        return check_timers(service)
    if service.kind == "http":
        return check_http(service, credentials)
    if service.kind == "command":
        return check_command(service, credentials)
    return Outcome(True, f"{service.unit} is running")


# --- files ------------------------------------------------------------------------------------------------------------


def load_table(path: Path) -> list[Service]:
    """The services, as the role wrote them."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["services"]
        return [Service(**row) for row in rows]
    except FileNotFoundError:
        raise HealthError(f"{path} does not exist; apply the role healthcheck to this host") from None
    except (ValueError, KeyError, TypeError) as error:
        raise HealthError(f"{path} cannot be read ({error}); apply the role healthcheck again") from None


def load_credentials(path: Path) -> dict[str, str]:
    """Name -> value; nothing when the file is not for us."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if directory and (Path(directory) / path.name).exists():
        path = Path(directory) / path.name
    try:
        values: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, PermissionError):
        return {}
    except ValueError:
        raise HealthError(f"{path} is not JSON; apply the role healthcheck again") from None
    return values


def read_state(directory: Path, name: str) -> State | None:
    """The last recorded state, if there is a usable one."""
    try:
        return State(**json.loads((directory / f"{name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def put(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    with contextlib.suppress(OSError):
        temporary.unlink()  # half a file of somebody who had this service before
    temporary.write_text(text, encoding="utf-8")
    temporary.chmod(0o644)
    temporary.replace(path)


def write_state(directory: Path, state: State) -> None:
    """Record the state."""
    put(directory / f"{state.name}.json", json.dumps(asdict(state), ensure_ascii=False) + "\n")


# --- metrics ----------------------------------------------------------------------------------------------------------


def metric(name: str, kind: str, told: str, values: Iterable[tuple[Mapping[str, str], float]]) -> str:
    """One metric in Prometheus' text format."""
    lines = [f"# HELP {name} {told}", f"# TYPE {name} {kind}"]
    for labels, value in values:
        pairs = ",".join(f'{label}="{text}"' for label, text in labels.items())  # names of services need no escapes
        lines.append(f"{name}{{{pairs}}} {value:.10g}" if value % 1 == 0 else f"{name}{{{pairs}}} {value:.4f}")
    return "\n".join(lines) + "\n"


def health_metrics(states: Sequence[State]) -> str:
    """What a daemon knows of its services."""

    def each(value: Callable[[State], float]) -> list[tuple[Mapping[str, str], float]]:
        return [({"service": state.name}, value(state)) for state in states]

    each_status = [({"service": state.name, "state": status}, float(state.status == status)) for state in states for status in STATUSES]
    checked = [state for state in states if state.checked]
    return "".join(
        (
            metric("evenkeel_health_state", "gauge", "1 for the state that the service is in, 0 for the others.", each_status),
            metric("evenkeel_health_successes", "gauge", "Checks in a row that passed.", each(lambda state: max(state.streak, 0))),
            metric(
                "evenkeel_health_failures", "gauge", "Checks in a row that failed and count.", each(lambda state: max(-state.streak, 0))
            ),
            metric(
                "evenkeel_health_last_check_timestamp_seconds",
                "gauge",
                "When the last check ended; an old one says that nobody checks.",
                [({"service": state.name}, state.checked) for state in checked],
            ),
            metric("evenkeel_health_check_duration_seconds", "gauge", "How long the last check took.", each(lambda state: state.seconds)),
        )
    )


# --- the daemon -------------------------------------------------------------------------------------------------------


def notify(message: str) -> None:
    """Tell systemd."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
        channel.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)


class Watcher(threading.Thread):
    """Checks one service for ever."""

    def __init__(
        self, service: Service, credentials: Mapping[str, str], directory: Path, offset: float, needs: Sequence[Service] = ()
    ) -> None:
        super().__init__(name=service.name, daemon=True)
        self.service = service
        self.needs = needs
        self.credentials = credentials
        self.directory = directory
        self.offset = offset
        self.restarted = threading.Event()
        self.changed = True  # for the metrics
        self.due = time.monotonic() + offset
        invocation = unit_invocation(service.unit)
        known = read_state(directory, service.name)
        # A restart of the daemon is no event in the life of the service.
        self.state = known if known and known.invocation == invocation else begin(service.name, invocation, time.time())

    def notice_restart(self) -> None:
        """Called once a second: begin at once when the unit was started or stopped."""
        if unit_invocation(self.service.unit) != self.state.invocation:
            self.restarted.set()

    def stuck(self) -> bool:
        """Whether the thread has not come back from a check long after its time-out."""
        return time.monotonic() > self.due + self.service.timeout_seconds + 60

    def run(self) -> None:
        time.sleep(self.offset)
        while True:
            self.restarted.clear()
            try:
                pause = self._turn()
            except Exception as error:  # one service's trouble (a full /run, say) must not end its watch
                print(f"{self.name}: the check itself failed: {error}", file=sys.stderr, flush=True)
                pause = self.service.interval_seconds
            self.due = time.monotonic() + pause
            self.restarted.wait(pause)
            self.due = time.monotonic()

    def _turn(self) -> float:
        """One check, its record, and the pause until the next."""
        invocation = unit_invocation(self.service.unit)
        if invocation != self.state.invocation:
            self.state = begin_again(self.state, invocation, time.time())
        before = self.state
        start = time.monotonic()
        outcome = check(self.service, self.credentials, invocation)
        self.state = advance(before, outcome, self.service, time.time(), time.monotonic() - start)
        write_state(self.directory, self.state)
        if self.state.status != before.status:
            print(f"{self.name} is {self.state.status}: {self.state.message}", flush=True)
            self.changed = True
        if wants_judgement(before, self.state, self.service):
            trouble = trouble_of(self.needs, self.credentials) if self.state.status == "unhealthy" else ""
            if trouble:
                print(f"{self.name} is unhealthy, but not restarted: it needs {trouble}", flush=True)
            else:
                (REQUESTS / self.name).touch()
        return pause_until_next(self.state, self.service, time.time())


class MetricsFile:
    """The file of one daemon's metrics, replaced at a change and every ten seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = 0.0
        self.trouble = ""

    def update(self, watchers: Sequence[Watcher]) -> None:
        """Write them if it is time; trouble with it (a full disk) is told once and stops no check."""
        changed = any(watcher.changed for watcher in watchers)
        if not changed and time.monotonic() - self.written < METRICS_SECONDS:
            return
        self.written = time.monotonic()
        for watcher in watchers:
            watcher.changed = False
        trouble = ""
        try:
            if watchers:
                put(self.path, health_metrics([watcher.state for watcher in watchers]))
            else:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            trouble = f"the metrics cannot be written: {error}"
        if trouble != self.trouble:
            print(trouble or "the metrics are written again", file=sys.stderr, flush=True)
        self.trouble = trouble


def outdated(table: Path, version: int) -> bool:
    """Whether the table is another one than we read."""
    try:
        return table.stat().st_mtime_ns != version
    except OSError:
        return False  # it is being replaced


def run_daemon(table: Path, directory: Path, user: str) -> NoReturn:
    """Watch the services that this user checks."""
    version = table.stat().st_mtime_ns
    services = {service.name: service for service in load_table(table)}
    own = [service for service in services.values() if not service.remote and service.user == user]
    credentials = load_credentials(CREDENTIALS)
    names = {f"{service.name}.json" for service in own}
    for path in directory.glob("*.json"):
        if path.name not in names and path.stat().st_uid == os.geteuid():
            path.unlink(missing_ok=True)
    # Spread over an interval's first second, so that the checks do not all want the processor at once.
    step = min(0.1, 1.0 / max(len(own), 1))
    watchers = [
        Watcher(service, credentials, directory, number * step, [services[name] for name in service.after if name in services])
        for number, service in enumerate(own)
    ]
    for watcher in watchers:
        watcher.start()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        notify("STOPPING=1")
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    notify(f"READY=1\nSTATUS=watching {len(own)} services")
    period = int(os.environ.get("WATCHDOG_USEC", "0")) / 2_000_000
    barked = time.monotonic()
    metrics = MetricsFile(METRICS / (f"health-{user}.prom" if user else "health.prom"))
    while True:
        time.sleep(1)
        if user and outdated(table, version):  # the role restarts the daemons that are needed; this one may be needed no more
            print("the table has changed; starting again", flush=True)
            os._exit(0)
        metrics.update(watchers)
        for watcher in watchers:
            watcher.notice_restart()
        if period and time.monotonic() - barked >= period:
            stuck = [watcher.name for watcher in watchers if watcher.stuck() or not watcher.is_alive()]
            if stuck:
                print(f"the check of {', '.join(stuck)} hangs; waiting for systemd to start this daemon again")
                time.sleep(3600)
            notify("WATCHDOG=1")
            barked = time.monotonic()


# --- restarts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """How often an unhealthy service is restarted."""

    limit: int
    window_seconds: float


@dataclass
class Record:
    """What was done to a service because it was unhealthy; `given_up` is the run of its unit in which it was left alone."""

    total: int = 0
    recent: list[float] = field(default_factory=list)
    given_up: str = ""


def wants_judgement(before: State, after: State, service: Service) -> bool:
    """Whether root should look: the service has become unhealthy, still is after as many failures again, or has become healthy."""
    if not service.restart:
        return False
    if after.status == "unhealthy":
        return -after.streak % service.retries == 0
    return after.status == "healthy" and before.status != "healthy"


def trusted_state(directory: Path, service: Service) -> State | None:
    """The recorded state, if the daemon whose service it is has written it: nobody else may have one restarted."""
    try:
        owner = (directory / f"{service.name}.json").lstat().st_uid
        if owner != pwd.getpwnam(service.user or CHECK_USER).pw_uid:
            return None
    except (OSError, KeyError):
        return None
    return read_state(directory, service.name)


def judge_restart(
    service: Service, state: State, record: Record, limit: Limit, now: float, hindrance: Callable[[], str]
) -> tuple[str, str]:
    """What to do, and why: nothing, `restart`, `leave` (for now), `give up`, or `forget` all trouble.

    hindrance: what stands against a restart, empty when nothing does; asked only if there is to be one.
    """
    if state.status == "healthy":
        return "forget", f"{service.name} is healthy"
    if state.status != "unhealthy":
        return "", f"{service.name} is {state.status}"
    against = hindrance()
    if against:
        return "leave", f"{service.name} is unhealthy, but not restarted: {against}"
    recent = [moment for moment in record.recent if now - moment < limit.window_seconds]
    if record.given_up == state.invocation or len(recent) >= limit.limit:
        return "give up", (
            f"{service.unit} is unhealthy and left alone after {count(limit.limit, 'restart')} within {span(limit.window_seconds)}: "
            f"{state.message.rstrip('.')}. Next: journalctl -u {service.unit} -n 50; "
            f"when the cause is gone: systemctl restart {service.unit}"
        )
    number = f"{len(recent) + 1} of {limit.limit} within {span(limit.window_seconds)}"
    return "restart", f"{service.name} is unhealthy and restarted ({number}): {state.message}"


def count(number: int, noun: str) -> str:
    """A number of things for people."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def trouble_of(needs: Sequence[Service], credentials: Mapping[str, str]) -> str:
    """The first of what a service needs that is not healthy either: a restart would end work and cure nothing."""
    for service in needs:
        if service.remote and not set(service.credentials.values()) <= set(credentials):
            continue  # not ours to ask (a daemon of an application's user); the limit bounds what that costs
        status, message = look(service, credentials, NEED_SECONDS)
        if status != "healthy":
            return f"{service.name}, which is {status} ({message})"
    return ""


def hindrance(service: Service, state: State) -> str:
    """Why a restart would be wrong now: its unit does not simply run, as what is unhealthy did."""
    if state.invocation != unit_invocation(service.unit):
        return f"{service.unit} was just started or stopped"
    active = show_units([service.unit], 20).get(service.unit, {}).get("ActiveState", "unknown")
    return "" if active == "active" else f"{service.unit} is {active}"


def load_restarts(path: Path) -> dict[str, Record]:
    """What was done before; nothing when the file is new or unusable."""
    try:
        return {name: Record(**record) for name, record in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def restart_metrics(records: Mapping[str, Record]) -> str:
    """What root did."""
    totals = [({"service": name}, float(record.total)) for name, record in records.items()]
    left = [({"service": name}, float(bool(record.given_up))) for name, record in records.items()]
    return metric("evenkeel_health_restarts_total", "counter", "Restarts of the service because it was unhealthy.", totals) + metric(
        "evenkeel_health_given_up", "gauge", "1 while the service is unhealthy and no longer restarted: it needs a person.", left
    )


def take_requests(directory: Path) -> list[str]:
    """The names of the services that daemons ask for. Whatever else lies there goes, or systemd would call us again at once."""
    names = []
    for path in sorted(directory.iterdir()):
        names.append(path.name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return names


def settle(action: str, told: str, service: Service, state: State, record: Record) -> None:
    """Say what is done, count it, and keep the operator's note true."""
    if action in ("restart", "leave", "give up"):
        print(told, flush=True)
    if action == "restart":
        record.total += 1
        record.recent = [moment for moment in record.recent if time.time() - moment < SHOWN_SECONDS] + [round(time.time(), 3)]
    if action in ("restart", "forget"):
        record.given_up = ""
        (FAILURES / service.unit).unlink(missing_ok=True)
    if action == "give up":
        record.given_up = state.invocation
        put(FAILURES / service.unit, f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {told}\n")


def run_restart() -> int:
    """Judge what the daemons ask for; called by systemd, as root. Only the table of root says what may be restarted."""
    services = {service.name: service for service in load_table(TABLE)}
    limit = Limit(**json.loads(TABLE.read_text(encoding="utf-8"))["restarts"])
    known = load_restarts(RESTARTS)
    records = {name: known.get(name, Record()) for name, service in services.items() if service.restart}
    refused = False
    for name in take_requests(REQUESTS):
        service = services.get(name)
        if service is None or not service.restart:
            print(f"a restart of {name!r} was asked for, which {TABLE} does not allow", flush=True)
            continue
        state = trusted_state(STATES, service)
        if state is None:
            continue
        against = functools.partial(hindrance, service, state)
        action, told = judge_restart(service, state, records[name], limit, time.time(), against)
        settle(action, told, service, state, records[name])
        # Written before the act: a restart that is not counted could become a storm.
        put(RESTARTS, json.dumps({name: asdict(record) for name, record in records.items()}, indent=2) + "\n")
        if action == "restart":
            # Not waited for: a gentle stop takes as long as the work in hand. The unit's own OnFailure= tells when it does not come up.
            done = subprocess.run(["systemctl", "try-restart", "--no-block", "--", service.unit], timeout=60, check=False)
            refused = refused or done.returncode != 0  # and it has said why
    put(METRICS / "health-restarts.prom", restart_metrics(records))
    return NOT_HEALTHY if refused else OK


# --- the command line -------------------------------------------------------------------------------------------------


def describe(service: Service, state: State | None, now: float, invocation: str) -> tuple[str, str]:
    """The status as others may rely on it, and why."""
    if state is None:
        return "unknown", "no state is recorded; is evenkeel-health.service running?"
    if state.invocation != invocation:
        return "starting", f"{service.unit} was just {'started' if invocation else 'stopped'}"
    age = now - state.checked
    if state.checked and age > service.interval_seconds + service.timeout_seconds + 15:
        return "unknown", f"the last check was {age:.0f} s ago; is evenkeel-health.service running?"
    return state.status, state.message


def span(seconds: float) -> str:
    """A duration for people."""
    for size, letter in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {letter}"
    return f"{max(seconds, 0):.0f} s"


def rows_of(services: Sequence[Service], directory: Path) -> list[dict[str, Any]]:
    """One row for each service of this host."""
    now = time.time()
    rows = []
    restarts = load_restarts(RESTARTS)
    for service in services:
        if service.remote:
            continue
        state = read_state(directory, service.name)
        status, message = describe(service, state, now, unit_invocation(service.unit))
        rows.append(
            {
                "name": service.name,
                "status": status,
                "streak": state.streak if state else 0,
                "since": round(state.since, 3) if state else None,
                "checked": round(state.checked, 3) if state else None,
                "message": message,
                "unit": service.unit,
                "owner": service.owner,
                "endpoint": service.endpoint,
                "kind": service.kind,
                "timers": service.timers,
                "restarts": [moment for moment in restarts.get(service.name, Record()).recent if now - moment < SHOWN_SECONDS],
            }
        )
    return rows


def run_status(as_json: bool) -> int:
    """Show every service of this host."""
    rows = rows_of(load_table(TABLE), STATES)
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
    else:
        width = max((len(row["name"]) for row in rows), default=0)
        for row in rows:
            age = f"for {span(time.time() - row['since'])}" if row["since"] else ""
            streak = f"{abs(row['streak'])} {'failures' if row['streak'] < 0 else 'passed'}" if row["streak"] else ""
            notes = f" (restarted {count(len(row['restarts']), 'time')} within {span(SHOWN_SECONDS)})" if row["restarts"] else ""
            print(f"{row['name']:<{width}}  {row['status']:<9}  {age:<10}  {streak:<12}  {row['message']}{notes}".rstrip())
    return OK if all(row["status"] == "healthy" for row in rows) else NOT_HEALTHY


def pick(services: Sequence[Service], names: Iterable[str]) -> list[Service]:
    """The named services, in the order of the names."""
    table = {service.name: service for service in services}
    unknown = [name for name in names if name not in table]
    if unknown:
        raise HealthError(
            f'no service "{unknown[0]}" in {TABLE}; known are: {", ".join(sorted(table)) or "none"}. '
            "Add it to healthcheck_services, or correct the name where it is awaited"
        )
    return [table[name] for name in names]


def look(service: Service, credentials: Mapping[str, str], left: float) -> tuple[str, str]:
    """The present status of one service: recorded by the daemon, or checked here when it lives on another host."""
    if not service.remote:
        state = read_state(STATES, service.name)
        status, message = describe(service, state, time.time(), unit_invocation(service.unit))
        # Who is about to rely on a service does not grant it the retries that its alarm has.
        return ("failing", message) if status == "healthy" and state and state.streak < 0 else (status, message)
    outcome = check(replace(service, timeout_seconds=max(1.0, min(service.timeout_seconds, left))), credentials, "")
    return ("not healthy" if outcome.passed is False else "healthy"), outcome.message


def run_wait(names: Sequence[str], timeout: float, waiter: str, fail_fast: bool = False) -> int:
    """Return once all are healthy; say whom we wait for, and give up after `timeout` seconds."""
    pending = pick(load_table(TABLE), names)
    credentials = load_credentials(CREDENTIALS)
    who = waiter or "the caller"

    def stop(_signal: int, _frame: FrameType | None) -> None:
        print(f"{who} waits no longer, because it is being stopped", flush=True)
        os._exit(OK)  # to systemd a unit that was stopped while it waited has not failed

    signal.signal(signal.SIGTERM, stop)
    start = time.monotonic()
    restarts = {service.unit: unit_restarts(service.unit)[1] for service in pending if fail_fast and service.unit and not service.remote}
    announced = start - 3600.0
    while True:
        waiting: list[tuple[Service, str, str]] = []
        for service in pending:
            status, message = look(service, credentials, start + timeout - time.monotonic())
            if status == "healthy":
                if time.monotonic() - start >= 1:
                    print(f"{service.name} is healthy after {time.monotonic() - start:.0f} s", flush=True)
            else:
                waiting.append((service, status, message))
        if not waiting:
            return OK
        pending = [service for service, _, _ in waiting]
        listed = "; ".join(f"{service.name} ({status}: {message})" for service, status, message in waiting)
        elapsed = time.monotonic() - start
        reason = hopeless(pending, restarts) if fail_fast else ""
        if reason:
            print(f"{who} waits no longer: {reason}; not healthy: {listed}", file=sys.stderr, flush=True)
            return NOT_HEALTHY
        if elapsed >= timeout:
            first = waiting[0][0]
            where = "on its own host" if first.remote else "here"
            follow = f"journalctl -u {first.unit}" if first.unit else "evenkeel-health status"
            print(
                f"{who} gave up: after {timeout:.0f} s not healthy: {listed}. Next: {follow} ({where})",
                file=sys.stderr,
                flush=True,
            )
            return NOT_HEALTHY
        if time.monotonic() - announced >= 30:
            print(f"{who} waits for {listed}; up to {timeout - elapsed:.0f} s", flush=True)
            announced = time.monotonic()
        time.sleep(min(0.3, max(0.05, timeout - elapsed)))


def unit_restarts(unit: str) -> tuple[bool, int]:
    """Whether a unit has failed for good, and how often systemd started it again by itself."""
    command = ["systemctl", "show", "--property=ActiveState", "--property=NRestarts", "--", unit]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    values = dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)
    return values.get("ActiveState") == "failed", int(values.get("NRestarts") or 0)


def hopeless(services: Sequence[Service], restarts: Mapping[str, int]) -> str:
    """The first unit that failed or keeps ending, in words; empty while there is hope. `restarts`: their counts at first."""
    for service in services:
        if service.unit and not service.remote:
            failed, count = unit_restarts(service.unit)
            if failed or count - restarts.get(service.unit, 0) >= HOPELESS_RESTARTS:
                return f"{service.unit} {'has failed' if failed else 'keeps ending'}"
    return ""


def run_check(names: Sequence[str]) -> int:
    """Make the named checks now, without the daemon and without recording anything."""
    services = load_table(TABLE)
    credentials = load_credentials(CREDENTIALS)
    failed = False
    for service in pick(services, names) if names else services:
        outcome = check(service, credentials, unit_invocation(service.unit))
        failed = failed or outcome.passed is False
        print(f"{service.name}: {'FAILED' if outcome.passed is False else 'passed'}: {outcome.message}")
    return NOT_HEALTHY if failed else OK


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="evenkeel-health", description="Health of this host's services.")
    verbs = result.add_subparsers(dest="verb", required=True, metavar="status | wait | check | daemon | restart")
    status = verbs.add_parser("status", help="show every service; exit code 1 unless all are healthy")
    status.add_argument("--json", action="store_true", help="as a list of objects")
    wait = verbs.add_parser("wait", help="return once all named services are healthy; exit code 1 after the time-out")
    wait.add_argument("names", nargs="+", metavar="NAME")
    wait.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="default 300")
    wait.add_argument("--fail-fast", action="store_true", help="end at once when a unit has failed or keeps ending")
    wait.add_argument("--for", dest="waiter", default="", metavar="WHO", help="named in the messages")
    now = verbs.add_parser("check", help="make the named checks now (all without names); exit code 1 if one fails")
    now.add_argument("names", nargs="*", metavar="NAME")
    daemon = verbs.add_parser("daemon", help="watch the services (started by systemd)")
    daemon.add_argument("--user", default="", help="only the checks that run as this user")
    verbs.add_parser("restart", help="judge which unhealthy services to restart (started by systemd)")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the verb."""
    options = parser().parse_args(argv)
    try:
        match options.verb:
            case "status":
                return run_status(options.json)
            case "wait":
                return run_wait(options.names, options.timeout, options.waiter, options.fail_fast)
            case "check":
                return run_check(options.names)
            case "restart":
                return run_restart()
            case _:
                run_daemon(TABLE, STATES, options.user)
    except HealthError as error:
        print(f"evenkeel-health: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

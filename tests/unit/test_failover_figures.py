"""The arithmetic of the failover figures, and their page: a gap, a lost commit, a failed request must all be seen."""

from __future__ import annotations

import itertools
import socket
import ssl
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import requests

sys.path.append(str(Path(__file__).resolve().parents[2] / "molecule/pairs"))

from load import broker, browsing, figures, report, run
from load.faults import FAULTS
from load.places import ROOT, Platform
from load.writing import Writer

# --- the set check ---


def test_nothing_is_reported_of_a_table_as_it_should_be() -> None:
    found = figures.compare([1, 2, 3], range(1, 4), [3, 1, 2])
    assert (found.acknowledged, found.lost, found.doubled, found.unacknowledged, found.strange) == (3, [], [], [], [])


def test_lost_doubled_unacknowledged_and_strange_rows_are_told_apart() -> None:
    found = figures.compare(acknowledged=[1, 2, 4], tried=range(1, 6), present=[1, 1, 3, 4, 9])
    assert found.lost == [2]
    assert found.doubled == [1]
    assert found.unacknowledged == [3], "tried, never acknowledged, and there: allowed, and told"
    assert found.strange == [9]


# --- gaps ---

STEADY = [float(second) for second in range(10)]


@pytest.mark.parametrize(
    ("times", "began", "ended", "longest"),
    [
        (STEADY, 2.0, 8.0, 1.0),
        ([0.0, 1.0, 2.0, 7.0, 8.0], 1.5, 7.5, 5.0),  # inside the window
        ([0.0, 1.0, 6.0, 7.0], 3.0, 4.0, 5.0),  # around it: counts whole
        ([0.0, 1.0, 6.0, 7.0], 0.5, 3.0, 5.0),  # reaches out of it
        ([0.0, 1.0, 6.0, 7.0], 6.2, 6.8, 1.0),  # before it: does not count
        ([0.0, 1.0], 0.5, 9.0, 8.0),  # nothing any more: until the window's end
        ([], 1.0, 4.0, 3.0),
    ],
)
def test_longest_gap(times: list[float], began: float, ended: float, longest: float) -> None:
    assert figures.longest_gap(times, began, ended) == longest


def test_interruption_is_what_goes_beyond_the_usual_gap() -> None:
    times = [*STEADY, 14.0, 15.0]
    assert figures.usual_gap(times) == 1.0
    assert figures.interruption(times, 8.5, 15.0) == 4.0
    assert figures.interruption(times, 2.0, 5.0) == 0.0


@pytest.mark.parametrize("times", [[], [1.0]])
def test_usual_gap_of_too_few(times: list[float]) -> None:
    assert figures.usual_gap(times) == 0.0


# --- requests ---


def test_requests_count_in_every_window_that_they_were_under_way_in() -> None:
    requests = [
        figures.Request(1.0, 0.5),  # over before
        figures.Request(9.0, 2.0, "/login 503"),  # began before
        figures.Request(11.0, 30.0, "/login no answer in time"),  # lasts longer
        figures.Request(12.0, 0.25),
        figures.Request(20.0, 1.0, "/login 502"),  # after
    ]
    assert figures.of_window(requests, 10.0, 15.0) == {
        "requests": 3,
        "failed": 2,
        "failures": {"/login 503": 1, "/login no answer in time": 1},
        "slowest_seconds": 30.0,
    }
    assert figures.of_window([], 0.0, 1.0) == {"requests": 0, "failed": 0, "failures": {}, "slowest_seconds": 0.0}


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (requests.ConnectTimeout("… timed out. (connect timeout=30)"), "no answer in time"),
        (requests.ConnectionError("[Errno 111] Connection refused"), "connection refused"),
        (requests.ConnectionError("('Connection aborted.', RemoteDisconnected('… without response'))"), "connection closed"),
        (requests.RequestException("?"), "RequestException"),
    ],
)
def test_reason_names_what_kept_a_client_from_an_answer(raised: requests.RequestException, words: str) -> None:
    assert browsing.reason(raised) == words


# --- whole again ---


@pytest.mark.parametrize(
    ("seen", "back"),
    [
        ([], None),
        ([(0, True)], None),
        ([(0, True), (1, True), (2, True), (3, True)], 0),
        ([(0, True), (1, False), (2, True), (3, True)], None),  # not steady yet
        ([(0, True), (1, False), (2, True), (5, True)], 2),  # a break begins it anew
        ([(0, True), (5, False)], None),
    ],
)
def test_whole_again_since_the_end_of_the_last_break(seen: list[tuple[float, bool]], back: float | None) -> None:
    assert figures.back_since(seen, steady_seconds=3) == back


# --- a writer ---


class FlakyWriter(Writer):
    """Acknowledges everything but each third number."""

    written: list[int]

    def connect(self) -> Any:
        return socket.socket()

    def write(self, connection: Any, number: int) -> None:
        self.written.append(number)
        if number % 3 == 0:
            raise ConnectionError("gone")


def test_writer_never_repeats_a_number_and_notes_only_what_was_acknowledged() -> None:
    writer = FlakyWriter("flaky", per_second=1000)
    writer.written = []
    writer.start()
    deadline = threading.Event()
    while len(writer.errors) < 3:
        deadline.wait(0.01)
    writer.stop()
    assert writer.written == list(range(1, writer.tried + 1))
    assert writer.acknowledged == [number for number in writer.written if number % 3]
    assert len(writer.times) == len(writer.acknowledged)
    assert all(before <= after for before, after in itertools.pairwise(writer.times))


# --- Redis' protocol ---


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"+PONG\r\n", "PONG"),
        (b":12\r\n", 12),
        (b"$3\r\nabc\r\n", "abc"),
        (b"$-1\r\n", None),
        (b"*3\r\n$5\r\nslave\r\n:6379\r\n*1\r\n+x\r\n", ["slave", 6379, ["x"]]),
    ],
)
def test_answers_of_redis(sent: bytes, answer: Any) -> None:
    assert answers(sent) == answer


def test_errors_and_ends_of_redis_are_raised() -> None:
    with pytest.raises(broker.RefusedError, match="READONLY"):
        answers(b"-READONLY You can't write against a read only replica.\r\n")
    for cut in (b"", b"$5\r\nab"):
        with pytest.raises(ConnectionError):
            answers(cut)


def answers(sent: bytes) -> Any:
    """What the client makes of these bytes, over a connection without TLS."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        connection.recv(1000)
        connection.sendall(b"+OK\r\n")
        connection.recv(1000)
        connection.sendall(sent)
        connection.close()

    class Plain(ssl.SSLContext):
        def wrap_socket(self, sock: socket.socket, **_: Any) -> Any:
            return sock

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client = broker.Connection("127.0.0.1", server.getsockname()[1], Plain(ssl.PROTOCOL_TLS_CLIENT), "user", "password")
        try:
            return client.ask("PING")
        finally:
            client.close()
    finally:
        thread.join()
        server.close()


# --- what the inventory says ---


def test_platform_is_read_from_the_inventory_without_ansible() -> None:
    platform = Platform.of(ROOT / "molecule/pairs/inventory")
    assert platform.url == "https://10.87.4.10"
    assert platform.hosts_of("core") == ["pg-core-1", "pg-core-2"]
    assert platform.address("redis-1") == "10.87.4.21"
    assert "pg-core-1:5432,pg-core-2:5432/drydock?" in platform.libpq("core")
    assert "{" not in platform.url + platform.libpq("plugins")


def test_faults_hit_both_clusters_and_have_names_of_their_own() -> None:
    assert len({fault.title for fault in FAULTS}) == len(FAULTS)
    assert {"core", "plugins", "redis"} == {name for fault in FAULTS for name in fault.interrupts}
    for fault in FAULTS:
        assert fault.promise is None or fault.promise[0] in fault.interrupts, fault.title


# --- promises and the page ---


def test_broken_promises_are_sentences() -> None:
    one = run.Run.__new__(run.Run)
    one.findings = {"core": figures.compare([1, 2], [1, 2], [1, 1])}
    one.outcome = run.Outcome(accepted=2, lost=["/api/exports/1"], wrong={"/api/exports/2": "has no result"}, refused=["key: why"])
    assert one.broken() == [
        "cluster core: 1 acknowledged commits are lost (for example number 2)",
        "cluster core: 1 commits are there twice (for example number 1)",
        "/api/exports/2 has no result",
        "1 accepted jobs are not over (for example /api/exports/1)",
        "1 jobs were never accepted (for example key: why)",
    ]
    one.findings, one.outcome = {"core": figures.compare([1], [1], [1])}, run.Outcome(accepted=2)
    assert one.broken() == []


def result(core_seconds: float) -> dict[str, Any]:
    fault = {
        "title": "the primary's host off",
        "hit": "pg-core-1",
        "promise": ["core", 22],
        "whole_after_seconds": 12.3,
        "interruption_seconds": {"core": core_seconds, "plugins": 0.04, "redis": 0.0},
        "write_errors": {"core": 7, "plugins": 0, "redis": 0},
        "commits": {"acknowledged": 1234, "lost": 0, "doubled": 0},
        "http": {"requests": 300, "failed": 2, "failures": {"/documents/ 503": 2}, "slowest_seconds": 21.5},
        "jobs": {"accepted": 9, "lost": 0, "wrong": 0},
    }
    return {
        "at": "2026-11-22T05:00:00+00:00",
        "commit": "0123456789ab",
        "machine": {"cores": 2, "processor": "some processor", "hosts": 13},
        "seconds": 480,
        "load": {"writes_per_second": 25, "requests_per_second": 8, "jobs_per_minute": 15},
        "faults": [fault],
        "commits": {"acknowledged": 24000, "lost": 0, "doubled": 0, "strange": 0, "unacknowledged": 3},
        "jobs": {"accepted": 120, "lost": [], "wrong": {}, "worst_seconds": 41.0},
        "http": {"requests": 3840, "failed": 2},
    }


def test_page_has_every_figure() -> None:
    page = report.page([result(20.66)])
    row = "| the primary's host off | 1 | 20.7 | 0.0 | 0.0 | core ≤ 22 | 2 of 300 | 21.5 | 9 / 0 | 1,234 / 0 | 12 |"
    assert row in page.splitlines()
    assert "0 of 24,000 acknowledged commits, 0 of 120 accepted jobs" in page
    assert "commit `0123456789ab` on 2026-11-22: 13 lab hosts on one machine with 2 cores" in page
    assert "2 `/documents/ 503`" in page


def test_page_marks_what_is_beyond_its_promise() -> None:
    assert "| **23.0** |" in report.page([result(23.0)])


def test_page_of_several_runs_has_the_median_the_worst_and_the_sums() -> None:
    page = report.page([result(18.0), result(23.04), result(19.0)])
    seconds = "**19.0 / 23.0** | 0.0 / 0.0 | 0.0 / 0.0"
    row = f"| the primary's host off | 3 | {seconds} | core ≤ 22 | 6 of 900 | 21.5 | 27 / 0 | 3,702 / 0 | 12 / 12 |"
    assert row in page.splitlines()
    assert "0 of 72,000 acknowledged commits, 0 of 360 accepted jobs" in page
    assert "3 runs, 1440 s in all" in page
    assert "6 `/documents/ 503`" in page

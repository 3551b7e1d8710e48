"""The address of a web process: opened once, kept by systemd over restarts, given up when it changes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "roles/process/files/listen.py"
#: What the process sees: its variables, and where the only socket listens.
SHOW = """
import os, socket
print(os.environ["LISTEN_PID"] == str(os.getpid()), os.environ["LISTEN_FDS"], os.environ["LISTEN_FDNAMES"])
found = socket.socket(fileno=3)
print(found.getsockname(), found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN), os.get_blocking(3), os.fstat(3).st_ino)
"""
#: Hands a socket on as systemd does: as descriptor 3, under a name, for this very process.
AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])
"""


class Systemd:
    """The end to which a unit sends its notifications."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "notify")
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.bind(self.path)
        self.channel.setblocking(False)

    def told(self) -> list[tuple[str, list[int]]]:
        """All messages so far, with the descriptors that came along."""
        result = []
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(self.channel, 1000, 4)
            except BlockingIOError:
                return result
            result.append((message.decode(), descriptors))


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    one = Systemd(tmp_path)
    yield one
    one.channel.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(systemd: Systemd, port: int, kept: socket.socket | None = None, name: str = "web") -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAM), "--address", "127.0.0.1", "--port", str(port), "--backlog", "16", "--", sys.executable, "-c", SHOW]
    if kept:
        command = [sys.executable, "-c", AS_SYSTEMD, str(kept.fileno()), name, *command]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, pass_fds=[kept.fileno()] if kept else [],
        env={"PATH": os.environ["PATH"], "NOTIFY_SOCKET": systemd.path},
    )  # fmt: skip


def test_first_start_opens_the_address_and_hands_it_to_systemd_and_to_the_process(systemd: Systemd) -> None:
    port = free_port()
    done = start(systemd, port)
    ((message, (descriptor,)),) = systemd.told()
    assert message == "FDSTORE=1\nFDNAME=web"
    with socket.socket(fileno=descriptor) as kept:
        inode = os.fstat(kept.fileno()).st_ino
        assert done.stdout.splitlines() == ["True 1 web", f"('127.0.0.1', {port}) 1 False {inode}"], done.stderr


def test_connections_of_the_meantime_wait_and_the_next_start_gets_the_same_socket(systemd: Systemd) -> None:
    port = free_port()
    start(systemd, port)
    ((_, (descriptor,)),) = systemd.told()
    with socket.socket(fileno=descriptor) as kept, socket.create_connection(("127.0.0.1", port), timeout=5):
        done = start(systemd, port, kept)
        assert done.stdout.splitlines()[1].endswith(f" 1 False {os.fstat(descriptor).st_ino}"), done.stderr
        assert systemd.told() == []
        kept.setblocking(True)
        kept.settimeout(5)
        kept.accept()[0].close()


def test_another_port_gives_the_kept_socket_up(systemd: Systemd) -> None:
    first, second = free_port(), free_port()
    start(systemd, first)
    ((_, (descriptor,)),) = systemd.told()
    with socket.socket(fileno=descriptor) as kept:
        done = start(systemd, second, kept)
    assert f"('127.0.0.1', {second})" in done.stdout, done.stderr
    messages = systemd.told()
    assert [message for message, _ in messages] == ["FDSTOREREMOVE=1\nFDNAME=web", "FDSTORE=1\nFDNAME=web"]
    os.close(messages[1][1][0])


def test_a_kept_socket_of_another_name_is_not_taken(systemd: Systemd) -> None:
    port = free_port()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        done = start(systemd, port, other, name="stored")
    assert f"('127.0.0.1', {port})" in done.stdout, done.stderr


def test_an_address_in_use_is_one_line_that_says_what_to_type(systemd: Systemd) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = start(systemd, port)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"127.0.0.1:{port} cannot be listened at (address already in use)" in done.stderr
    assert f"ss -ltnp 'sport = :{port}'" in done.stderr
    assert systemd.told() == []

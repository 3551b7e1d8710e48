#!/usr/bin/python3 -IS
"""Open the address of a web process, have systemd keep it over restarts, and become the process.

It runs when the start-up steps have passed: a host that boots, or whose process is given up or stopped, refuses connections at once,
and its proxy asks another. While the process is restarted, systemd holds the listening socket (``FileDescriptorStoreMax=1``), and
connections wait in its backlog instead of being refused. The process gets the socket as by socket activation (sd_listen_fds(3)).
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAME = "web"
FIRST = 3  # as in sd_listen_fds(3)
FAILED = 1


def family_of(address: str) -> socket.AddressFamily:
    """IPv6 or IPv4, by how the address is written."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def kept(environment: Mapping[str, str]) -> list[socket.socket]:
    """The sockets that systemd has kept from the process before; those that are not ours are left alone."""
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    return [socket.socket(fileno=FIRST + number) for number, name in enumerate(names) if name == NAME]


def opened(address: str, port: int) -> socket.socket:
    """A new socket with this address. Its options hold for the connections that it accepts."""
    result = socket.socket(family_of(address), socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    result.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    result.bind((address, port))
    return result


def notify(message: str, sockets: Sequence[socket.socket] = ()) -> None:
    """Tell systemd. Without it (by hand) there is nobody to tell."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect("\0" + path[1:] if path.startswith("@") else path)
        socket.send_fds(channel, [message.encode()], [each.fileno() for each in sockets])


def listening(address: str, port: int, backlog: int, found: Sequence[socket.socket]) -> socket.socket:
    """The kept socket with this address, or a new one that systemd keeps from now on; others are given up."""
    same = [each for each in found if each.family == family_of(address) and each.getsockname()[:2] == (address, port)]
    if same:
        same[0].listen(backlog)  # which may have changed
        return same[0]
    if found:
        notify(f"FDSTOREREMOVE=1\nFDNAME={NAME}")
        for each in found:
            each.close()
    result = opened(address, port)
    result.listen(backlog)
    notify(f"FDSTORE=1\nFDNAME={NAME}", [result])
    return result


def become(command: Sequence[str], found: socket.socket) -> NoReturn:
    """Be the command from now on, with the socket as its only one."""
    found.setblocking(False)
    if found.fileno() == FIRST:
        os.set_inheritable(FIRST, True)  # dup2 to itself would leave it to be closed
    else:
        os.dup2(found.fileno(), FIRST)
    for name, value in {"LISTEN_PID": os.getpid(), "LISTEN_FDS": 1, "LISTEN_FDNAMES": NAME}.items():
        os.environ[name] = str(value)
    os.execvp(command[0], list(command))


def main(argv: Sequence[str]) -> int:
    """Open the address and become the command."""
    parser = argparse.ArgumentParser(prog="listen.py", description="Open an address, have systemd keep it, become a command.")
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--backlog", type=int, required=True)
    parser.add_argument("command", nargs="+", help="program and arguments, after --")
    chosen = parser.parse_args(argv)
    try:
        found = listening(chosen.address, chosen.port, chosen.backlog, kept(os.environ))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        print(
            f"{chosen.address}:{chosen.port} cannot be listened at ({reason}); who has it: ss -ltnp 'sport = :{chosen.port}'. "
            "Stop that, or give the process another port in app.processes",
            file=sys.stderr,
        )
        return FAILED
    become(chosen.command, found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

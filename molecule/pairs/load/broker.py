"""Enough of Redis' protocol to ask and to write: over TLS, with a user's password, the master found through the Sentinels."""

from __future__ import annotations

import socket
import ssl
from typing import Any


class RefusedError(OSError):
    """Redis answered with an error."""


class Connection:
    """One connection, signed in."""

    def __init__(self, address: str, port: int, tls: ssl.SSLContext, user: str, password: str, *, limit_seconds: float = 1) -> None:
        plain = socket.create_connection((address, port), timeout=limit_seconds)
        try:
            self._socket = tls.wrap_socket(plain, server_hostname=address)
        except BaseException:
            plain.close()
            raise
        self._answers = self._socket.makefile("rb")
        try:
            self.ask("AUTH", user, password)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._answers.close()
        self._socket.close()

    def ask(self, *words: str) -> Any:
        """Send one command; its answer as text, number, list or None."""
        sent = b"".join(b"$%d\r\n%s\r\n" % (len(word.encode()), word.encode()) for word in words)
        self._socket.sendall(b"*%d\r\n%s" % (len(words), sent))
        return self._answer()

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the connection ended")
        kind, rest = line[:1], line[1:-2].decode()
        if kind == b"-":
            raise RefusedError(rest)
        if kind == b"$":
            return self._text(int(rest))
        if kind == b"*":
            return [self._answer() for _ in range(int(rest))]
        return int(rest) if kind == b":" else rest

    def _text(self, size: int) -> str | None:
        if size < 0:
            return None
        data = self._answers.read(size + 2)
        if len(data) < size + 2:
            raise ConnectionError("the connection ended")
        return data[:-2].decode()

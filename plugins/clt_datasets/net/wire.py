"""The client's connections: each can be cut by another thread at any moment, and no answer takes for ever.

`http.client` limits how long each piece of an answer may take, but not how many there are: a server could send a byte
a minute, or lines of a head without end.
"""

from __future__ import annotations

import io
import socket
import ssl
import threading
import time
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any


class Sockets:
    """The sockets of requests under way."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._lock = threading.Lock()
        self._used: set[socket.socket] = set()

    def add(self, sock: socket.socket) -> None:
        """Let `close` cut a socket.

        Raises:
            OSError: it is too late.
        """
        with self._lock:
            if self.closed.is_set():
                sock.close()
                raise OSError("closed")
            self._used.add(sock)

    def discard(self, sock: socket.socket | None) -> None:
        """Forget a socket."""
        with self._lock:
            self._used.discard(sock)  # type: ignore[arg-type]

    def close(self) -> None:
        """Cut all sockets, now and later."""
        self.closed.set()
        with self._lock:
            for each in self._used:
                try:
                    # Not the method of TLS sockets: it would first wait for the server's goodbye.
                    socket.socket.shutdown(each, socket.SHUT_RDWR)
                except OSError:
                    continue  # it is no longer connected


def connect(
    host: str, port: int | None, tls: ssl.SSLContext | None, timeout_s: float, sockets: Sockets
) -> HTTPConnection:
    """A connection to a server. Its socket is one of `sockets` from the beginning, so that `close` also ends this.

    Raises:
        OSError: there is none within `timeout_s`, for each address that the host has.
    """
    made = HTTPConnection(host, port) if tls is None else HTTPSConnection(host, port, context=tls)
    made.response_class = Answer
    problem: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, made.port, type=socket.SOCK_STREAM):
        sock: socket.socket | None = None
        try:
            sock = socket.socket(family, kind, protocol)
            sockets.add(sock)
            sock.settimeout(timeout_s)
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                sockets.discard(sock)
                # It takes the other's place.
                sock = tls.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
                sockets.add(sock)
                sock.do_handshake()
        except OSError as error:
            sockets.discard(sock)
            if sock is not None:
                sock.close()
            problem = error
            if sockets.closed.is_set():
                raise
            continue
        made.sock = sock
        return made
    raise problem


class Answer(HTTPResponse):
    """An answer whose head has to be complete, and whose body has to go on, before a deadline."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any):
        super().__init__(sock, *args, **options)
        self._timed = _Timed(sock)
        self.fp.close()
        self.fp = io.BufferedReader(self._timed)

    def more_time(self, seconds: float) -> None:
        """What comes later than so many seconds from now is not read."""
        self._timed.deadline = time.monotonic() + seconds

    def all(self, limit: int) -> bytes:
        """The rest of the body.

        Raises:
            TooLarge: it has more than `limit` bytes; no more of it is read.
            OSError, HTTPException: it did not come.
        """
        if self.length is None and not self.chunked:
            raise HTTPException("the answer does not say how long it is")
        data = self.read(limit + 1) if self.length is None or self.length <= limit else None
        if data is None or len(data) > limit:
            raise TooLarge(f"an answer of more than {limit:,} bytes, which is no data set's")
        return data


class TooLarge(Exception):
    """An answer is larger than what was asked for can be."""


class _Timed(io.RawIOBase):
    """Reads from a socket until a deadline."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        # Keeps the socket open until the answer is read, also if `http.client` closes it before.
        self._file = sock.makefile("rb", buffering=0)
        self._stalled_s = sock.gettimeout() or 60.0
        self.deadline = time.monotonic() + self._stalled_s

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int | None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer takes too long")
        self._sock.settimeout(min(left, self._stalled_s))
        return self._file.readinto(into)  # type: ignore[attr-defined]

    def close(self) -> None:
        self._file.close()
        super().close()

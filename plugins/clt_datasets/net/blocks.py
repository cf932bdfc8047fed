"""Downloads of blocks: from the socket straight into their place, by the thread that wants them.

aiohttp hands a body over in pieces that it has copied three times, in the one thread of its event loop; for blocks that
is most of what a client does. So they have connections of their own, of the standard library.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

import numpy as np

from clt_datasets.net.retry import CONNECT_S, Again, Patience, refused
from clt_plugins import DamagedError


class Blocks:
    """Connections to one data set of a server, each used by one thread at a time and kept for the next one.

    Args:
        base: the data set's address.
        headers: sent with every request.
    """

    def __init__(self, base: str, headers: Mapping[str, str], tls: ssl.SSLContext | None, patience_s: float):
        self.base, self.headers, self.tls, self.patience_s = base, headers, tls, patience_s
        self.address = urlsplit(base)
        self.idle: list[HTTPConnection] = []
        self.busy: set[HTTPConnection] = set()
        self.lock = threading.Lock()
        self.closed = threading.Event()

    def fill(self, path: str, into: list[np.ndarray]) -> None:
        """Download into arrays, one after the other; what was there before an error is not asked for again.

        Raises:
            OSError: no success for too long, or closed meanwhile.
            ValueError: the server refuses.
        """
        body, patience = Body(into), Patience(self.base, self.patience_s)
        while True:
            try:
                return self._receive(path, body, patience)
            except DamagedError:
                raise
            except (OSError, HTTPException, Again) as error:
                # It also ends the pause.
                if self.closed.is_set() or self.closed.wait(patience.after(error)):
                    raise OSError(f"{self.base}: closed") from None

    def close(self) -> None:
        """Close the connections; requests under way fail at once, or when they have waited for a connection."""
        self.closed.set()
        with self.lock:
            for connection in self.busy:
                _cut(connection)
            while self.idle:
                self.idle.pop().close()

    def _receive(self, path: str, body: Body, patience: Patience) -> None:
        """One attempt to get the rest of a body."""
        connection = self._take()
        whole = False
        try:
            if connection.sock is None:
                connection.timeout = min(CONNECT_S, patience.stalled_s)
                connection.connect()
            connection.sock.settimeout(patience.stalled_s)
            headers = {**self.headers, **({"Range": f"bytes={body.at}-"} if body.at else {})}
            connection.request("GET", f"{self.address.path}/{path}", headers=headers)
            answer = connection.getresponse()
            if answer.status >= 300:
                raise refused(self.base, answer.status, answer.reason, answer.read(4096))
            if answer.status != 206:
                body.at = 0
            if answer.length != body.size - body.at:
                raise Again(f"{answer.length} bytes came instead of {body.size - body.at}")
            while body.at < body.size:
                # What is there already, so that nothing is lost when the connection breaks.
                count = answer.fp.readinto1(body.rest())
                if not count:
                    raise Again("the connection broke off")
                body.at += count
                patience.progress(body.at)
            answer.close()
            whole = True
        finally:
            self._give_back(connection, whole)

    def _take(self) -> HTTPConnection:
        with self.lock:
            if self.closed.is_set():
                raise OSError("closed")
            if self.idle:
                connection = self.idle.pop()
            else:
                assert self.address.hostname is not None
                where = self.address.hostname, self.address.port
                connection = HTTPConnection(*where) if self.tls is None else HTTPSConnection(*where, context=self.tls)
            self.busy.add(connection)
        return connection

    def _give_back(self, connection: HTTPConnection, whole: bool) -> None:
        with self.lock:
            self.busy.discard(connection)
            if whole and not self.closed.is_set():
                self.idle.append(connection)
            else:
                connection.close()


class Body:
    """Arrays that are filled one after the other."""

    def __init__(self, arrays: list[np.ndarray]):
        self.views = [array.reshape(-1).view(np.uint8).data for array in arrays]
        self.size = sum(map(len, self.views))
        self.at = 0
        """Bytes that are there."""

    def rest(self) -> memoryview:
        """Where the next byte belongs, and those after it in the same array."""
        at = self.at
        for view in self.views:
            if at < len(view):
                return view[at:]
            at -= len(view)
        raise AssertionError("full")


def _cut(connection: HTTPConnection) -> None:
    """End a connection that another thread waits for."""
    if connection.sock is not None:
        try:
            # Not the one of TLS, which would first say farewell.
            socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)
        except OSError:
            return  # it is no longer connected

"""The server's connections: how many there are, and how long each may keep the server waiting.

A connection waits (for a request, or for the rest of its head), or its request is being answered. If there are too
many, the one that has waited longest is closed, of the address that has most of them. So clients that only hold
connections open lose them, and do not keep others out.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress

import attrs
from aiohttp import web

from clt_datasets.net.limits import Limits

log = logging.getLogger(__name__)

BACKLOG = 256
"""Connections that the system completes before they are accepted."""
BUSY = b'{"error": "the server has too many connections", "again": true}'
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(BUSY), BUSY)
)


@attrs.define(eq=False)
class Connection:
    """One of a client."""

    address: str
    socket: socket.socket
    since: float
    """When the server began to wait for the client."""
    head_since: float | None
    """When the first byte of a request came whose head is not complete."""
    transport: asyncio.Transport | None = None
    """None until the TLS handshake is done."""
    opening: asyncio.Task[None] | None = None

    def abort(self) -> None:
        """Close at once, without sending what is still to be sent."""
        if self.transport is not None:
            self.transport.abort()
        elif self.opening is not None:
            self.opening.cancel()


class Connections:
    """Accepts connections and closes those that there are too many of.

    Args:
        limits: see there.
        tls: for https.
    """

    def __init__(self, limits: Limits, tls: ssl.SSLContext | None = None):
        self.limits, self.tls = limits, tls
        self.most = limits.open_connections()
        self.most_each = max(4, self.most * 3 // 4)
        """Of one address."""
        self.refused = 0
        """Connections that were closed because there were too many."""
        self._open: dict[str, set[Connection]] = {}
        """By address."""
        self._waiting: dict[str, dict[Connection, None]] = {}
        """By address, those that have waited longest first."""
        self._by_handler: dict[object, Connection] = {}
        self.count = 0
        """Connections that are open."""

    def begin(self, request: web.Request) -> None:
        """A request's head is complete: the server does not wait for the client any more."""
        if (connection := self._by_handler.get(request.protocol)) is not None:
            self._stop_waiting(connection)

    def end(self, request: web.Request) -> None:
        """The request is answered."""
        connection = self._by_handler.get(request.protocol)
        if connection is not None and connection in self._open.get(connection.address, ()):
            connection.since, connection.head_since = time.monotonic(), None
            self._waiting.setdefault(connection.address, {})[connection] = None

    def sweep(self) -> None:
        """Close the connections that have waited for too long."""
        now, limits = time.monotonic(), self.limits
        for waiting in list(self._waiting.values()):
            for each in list(waiting):
                head = each.head_since
                if now - each.since > limits.idle_s or (head is not None and now - head > limits.head_s):
                    self._drop(each)

    async def accept(self, listening: socket.socket, make: Callable[[], asyncio.Protocol]) -> None:
        """Accept connections until cancelled.

        Args:
            make: makes the protocol of each connection.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, address = await loop.sock_accept(listening)
            except OSError as error:
                # Other parts of the process may use more descriptors than was planned.
                log.error("no connection can be accepted: %s", error.strerror or error)
                self._make_room(self._waiting)
                await asyncio.sleep(0.1)
                continue
            self._add(client, str(address[0]), make)
            await asyncio.sleep(0)  # `sock_accept` does not let others run while connections are there already

    def _add(self, client: socket.socket, address: str, make: Callable[[], asyncio.Protocol]) -> None:
        of_address = self._open.get(address, ())
        if len(of_address) >= self.most_each:
            free = self._make_room([address])
        else:
            free = self.count < self.most or self._make_room(self._waiting)
        if not free:
            self.refused += 1
            _refuse(client, self.tls is not None)
            return
        now = time.monotonic()
        connection = Connection(address, client, now, now)
        self._open.setdefault(address, set()).add(connection)
        self._waiting.setdefault(address, {})[connection] = None
        self.count += 1
        connection.opening = asyncio.get_running_loop().create_task(self._begin(connection, make))
        # A task that is cancelled before it has begun closes nothing.
        connection.opening.add_done_callback(lambda task: client.close() if task.cancelled() else None)

    async def _begin(self, connection: Connection, make: Callable[[], asyncio.Protocol]) -> None:
        """Connect a socket to its protocol, after the TLS handshake."""
        try:
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                lambda: _Watched(self, connection, make()),
                connection.socket,
                ssl=self.tls,
                ssl_handshake_timeout=self.limits.head_s if self.tls else None,
            )
        except (OSError, asyncio.CancelledError):
            # Also a failed handshake. Anybody can cause these, so that they are not logged.
            if self.tls is None:
                connection.socket.close()
            else:
                _hang_up(connection.socket)
            self.remove(connection)
            return
        connection.transport = transport

    def made(self, connection: Connection, handler: object) -> None:
        """A protocol has its transport."""
        self._by_handler[handler] = connection

    def remove(self, connection: Connection, handler: object = None) -> None:
        """Forget a connection that is closed."""
        self._by_handler.pop(handler, None)
        self._stop_waiting(connection)
        of_address = self._open.get(connection.address, set())
        if connection in of_address:
            of_address.remove(connection)
            self.count -= 1
            if not of_address:
                del self._open[connection.address]

    def _stop_waiting(self, connection: Connection) -> None:
        waiting = self._waiting.get(connection.address, {})
        waiting.pop(connection, None)
        if not waiting:
            self._waiting.pop(connection.address, None)

    def _make_room(self, addresses: object) -> bool:
        """Close the connection that has waited longest, of the address with most; False if none waits."""
        candidates = {each: self._waiting[each] for each in addresses if each in self._waiting}  # type: ignore[attr-defined]
        if not candidates:
            return False
        waiting = max(candidates.values(), key=len)
        self.refused += 1
        self._drop(next(iter(waiting)))
        return True

    def _drop(self, connection: Connection) -> None:
        connection.abort()
        self.remove(connection)


class _Watched(asyncio.Protocol):
    """Passes everything on to aiohttp's protocol, and tells `Connections` what happens."""

    def __init__(self, connections: Connections, connection: Connection, handler: asyncio.Protocol):
        self.connections, self.connection, self.handler = connections, connection, handler
        self.pause_writing, self.resume_writing = handler.pause_writing, handler.resume_writing  # type: ignore[method-assign]
        self.eof_received = handler.eof_received  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.connection.transport = transport
        self.connections.made(self.connection, self.handler)
        self.handler.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self.connection.head_since is None:
            self.connection.head_since = time.monotonic()
        self.handler.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.remove(self.connection, self.handler)
        self.handler.connection_lost(exc)


class Site(web.BaseSite):
    """Listens on an address, with limits."""

    def __init__(self, runner: web.AppRunner, connections: Connections, host: str, port: int):
        super().__init__(runner)
        self._connections, self._host, self._port = connections, host, port

    @property
    def name(self) -> str:
        return f"{self._host}:{self._port}"

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            OSError: the address cannot be used.
        """
        await super().start()
        assert self._runner.server is not None
        sockets = _sockets(self._host, self._port)
        # The runner uses no more of it than there is.
        self._server = _Listening(self._connections, sockets, self._runner.server)  # type: ignore[assignment]


class _Listening:
    """Sockets, with a task for each that accepts connections."""

    def __init__(self, connections: Connections, sockets: list[socket.socket], make: Callable[[], asyncio.Protocol]):
        self.sockets = sockets
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(connections.accept(each, make)) for each in sockets]

    def close(self) -> None:
        for task, each in zip(self._tasks, self.sockets, strict=True):
            asyncio.get_running_loop().remove_reader(each)
            task.cancel()
            each.close()
        self.sockets = []


def _sockets(host: str, port: int) -> list[socket.socket]:
    """Listening sockets of all addresses that a name has."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    problem: OSError | None = None
    fatal = False
    for family, address in dict.fromkeys((each[0], each[4]) for each in found):
        try:
            sockets.append(socket.create_server(address[:2], family=family, backlog=BACKLOG))
        except OSError as error:
            # A name may have an address of a family that the machine does not have.
            unusable = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
            problem, fatal = error, fatal or not unusable
            continue
        sockets[-1].setblocking(False)
    if problem is not None and (fatal or not sockets):
        for each in sockets:
            each.close()
        raise problem
    return sockets


def _refuse(client: socket.socket, encrypted: bool) -> None:
    with client, suppress(OSError):  # it may be gone
        client.setblocking(False)
        if not encrypted:
            client.send(REFUSAL)


def _hang_up(client: socket.socket) -> None:
    """End a connection whose transport closes the socket itself."""
    with suppress(OSError):  # it is no longer connected
        client.shutdown(socket.SHUT_RDWR)

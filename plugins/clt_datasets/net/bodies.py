"""Answers with rows: how many are in memory at a time, and for how long a client may keep one there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
from aiohttp import web

from clt_datasets.net.limits import Limits

SLICE = 2**18
"""Bytes that are given to a connection at a time; the event loop may copy what the system does not accept at once."""


class Late(ConnectionError):
    """The client did not accept an answer in time; its connection is closed."""


@attrs.define(eq=False)
class Body:
    """An answer in memory."""

    request: web.Request
    begun: float | None = None
    """When its first byte was sent."""
    moved: float = 0.0
    """When the client last accepted something."""
    expired: bool = False
    """Others wait, and it took its time: it is ended after the next slice."""


class Bodies:
    """Answers in memory.

    Args:
        limits: see there.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.sent = 0
        """Bytes of rows, of all answers."""
        self._free = asyncio.Semaphore(limits.bodies)
        self._waiting = 0
        self._held: dict[Body, None] = {}

    @asynccontextmanager
    async def one(self, request: web.Request) -> AsyncIterator[Body]:
        """The right to have an answer in memory; waits until there is room."""
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        body = Body(request)
        self._held[body] = None
        try:
            yield body
        finally:
            del self._held[body]
            self._free.release()

    async def send(
        self, body: Body, raw: bytes | memoryview, *, first: int | None = None, content_type: str
    ) -> web.StreamResponse:
        """Send an answer.

        Args:
            raw: all of it.
            first: the byte to begin with, for an answer to a Range.

        Raises:
            Late: the client does not accept it in time.
        """
        response = web.StreamResponse(status=200 if first is None else 206)
        response.content_type = content_type
        begin = first or 0
        response.content_length = len(raw) - begin
        if first is not None:
            response.headers["Content-Range"] = f"bytes {first}-{len(raw) - 1}/{len(raw)}"
        view = memoryview(raw)
        async with self.patience(body.request):
            await response.prepare(body.request)
        body.begun = body.moved = time.monotonic()
        if body.request.method != "HEAD":
            for offset in range(begin, len(view), SLICE):
                piece = view[offset : offset + SLICE]
                async with self.patience(body.request):
                    await response.write(piece)
                body.moved = time.monotonic()
                self.sent += len(piece)
                if body.expired:
                    # What was written already is still sent.
                    if body.request.transport is not None:
                        body.request.transport.close()
                    raise Late("it takes too long")
        async with self.patience(body.request):
            await response.write_eof()
        return response

    @asynccontextmanager
    async def patience(self, request: web.Request) -> AsyncIterator[None]:
        """Close the connection if the client does not accept what is written inside.

        Raises:
            Late: so it was.
        """
        try:
            async with asyncio.timeout(self.limits.stalled_s):
                yield
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise Late("nothing was accepted") from None

    def sweep(self) -> None:
        """If requests wait: close the connections that accept nothing, and end answers that take long."""
        if not self._waiting:
            return
        now = time.monotonic()
        for body in list(self._held):
            if body.begun is None:
                continue
            if now - body.moved > self.limits.body_stalled_s and body.request.transport is not None:
                # Without what is still in the system's buffers; the client asks again for what it did not get.
                body.request.transport.abort()
            elif now - body.begun > self.limits.body_s:
                body.expired = True

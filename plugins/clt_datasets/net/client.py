"""The other end of `serve`: downloads and uploads that go on where they broke off.

Small files and uploads go through aiohttp, in one thread with an event loop; blocks have connections of their own.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import xxhash

from clt_datasets.format.manifest import DATASET_NAME, MANIFEST
from clt_datasets.net.blocks import Blocks
from clt_datasets.net.retry import CONNECT_S, STALLED_S, Again, Patience, refused
from clt_plugins import Refused

T = TypeVar("T")


class Connection:
    """Requests to one data set of a server.

    Args:
        patience_s: a request fails when nothing at all has come for so long, whatever was tried.

    Raises:
        ValueError: the address or the name is none.
    """

    def __init__(self, url: str, dataset: str, *, patience_s: float, ca_file: Path | None = None):
        split = urlsplit(url)
        if split.scheme not in ("http", "https") or not split.hostname:
            raise Refused("source.url", f"expected http://HOST:PORT or https://..., got {url!r}")
        if not DATASET_NAME.fullmatch(dataset):
            raise Refused("source.dataset", f"not the name of a data set: {dataset!r}")
        self.base, self.patience_s = f"{url.rstrip('/')}/v1/datasets/{dataset}", patience_s
        token = os.environ.get("CLT_TOKEN", "")
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.tls = ssl.create_default_context(cafile=ca_file) if split.scheme == "https" else None
        self.blocks = Blocks(self.base, self.headers, self.tls, patience_s)
        self.closed = False
        self.lock = threading.Lock()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="clt-remote", daemon=True)
        self.thread.start()
        self.session = self._run(self._open())

    def get(self, path: str) -> bytes:
        """A small file."""
        return self._run(self._patiently(lambda _: self._get(path)))

    def fill(self, path: str, into: list[np.ndarray]) -> None:
        """Download into arrays; see `Blocks.fill`."""
        self.blocks.fill(path, into)

    def put(self, path: Path) -> None:
        """Upload a file, or what the server lacks of it."""
        with path.open("rb") as file:
            state = xxhash.xxh3_128()
            while piece := file.read(2**20):
                state.update(piece)
        self._run(self._patiently(lambda patience: self._put(path, state.hexdigest(), patience)))

    def close(self) -> None:
        """Close the connections; requests under way fail."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            ending = asyncio.run_coroutine_threadsafe(self._close(), self.loop)
        self.blocks.close()
        ending.result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work in the event loop's thread.

        Raises:
            OSError: the connections are closed, or were meanwhile.
        """
        with self.lock:
            if self.closed:
                work.close()
                raise OSError(f"{self.base}: closed")
            # Whatever is begun before `_close` is cancelled by it.
            future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except CancelledError:
            raise OSError(f"{self.base}: closed") from None

    # -- in the event loop's thread -----------------------------------------------------------------------------

    async def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=16, ssl=self.tls if self.tls is not None else True)
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=min(CONNECT_S, self.patience_s), sock_read=min(STALLED_S, self.patience_s)
        )
        return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self.headers, auto_decompress=False)

    async def _close(self) -> None:
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self.session.close()

    async def _patiently(self, attempt: Callable[[Patience], Awaitable[T]]) -> T:
        """Attempt until it succeeds; see `Patience.after`."""
        patience = Patience(self.base, self.patience_s)
        while True:
            try:
                return await attempt(patience)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError, Again) as error:
                await asyncio.sleep(patience.after(error))

    async def _get(self, path: str) -> bytes:
        async with self.session.get(f"{self.base}/{path}") as answer:
            await self._check(answer)
            return await answer.read()

    async def _put(self, path: Path, checksum: str, patience: Patience) -> None:
        place = f"{self.base}/files/{path.name}"
        async with self.session.get(place, params={"checksum": checksum}) as answer:
            await self._check(answer)
            there = await answer.json()
        if there["whole"]:
            return
        headers = {
            "X-Checksum": checksum,
            "Upload-Offset": str(there["offset"]),
            "Content-Length": str(path.stat().st_size - there["offset"]),
        }
        # aiohttp would wait for ever for a server that takes nothing.
        async with asyncio.timeout(patience.stalled_s) as limit:

            def taken(at: int) -> None:
                patience.progress(at)
                limit.reschedule(self.loop.time() + patience.stalled_s)

            pieces = _pieces(path, there["offset"], taken)
            async with self.session.put(place, data=pieces, headers=headers) as answer:
                if answer.status == 409 and path.name == MANIFEST and "missing" in await answer.json():
                    raise Again("another process still uploads its chunks")
                await self._check(answer)

    async def _check(self, answer: aiohttp.ClientResponse) -> None:
        """Raise what an answer other than success means."""
        if answer.status >= 300:
            raise refused(self.base, answer.status, answer.reason, await answer.content.read(4096))


async def _pieces(path: Path, offset: int, taken: Callable[[int], None]) -> AsyncIterator[bytes]:
    """A file from a byte on; `taken` is told after each piece how far it reached."""
    with path.open("rb") as file:
        file.seek(offset)
        while piece := await asyncio.to_thread(file.read, 2**20):
            yield piece
            taken(file.tell())

"""The other end of `serve`: downloads and uploads that go on where they broke off, and the source `remote`.

The connections live in one thread with an event loop; blocks go from the socket straight into their place.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import ssl
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import xxhash

from clt_datasets.folder import DatasetStore
from clt_datasets.layout import DATASET_NAME, MANIFEST, Manifest, digest
from clt_plugins import DamagedError, StoredSource

if TYPE_CHECKING:
    from clt_datasets import RemoteConfig
    from clt_plugins import Context

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
"""Between attempts; doubled each time, and up to half of it left off at random."""
AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""Answers after which it is worth trying again."""


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
            raise ValueError(f"source.url: expected http://HOST:PORT or https://..., got {url!r}")
        if not DATASET_NAME.fullmatch(dataset):
            raise ValueError(f"source.dataset: not the name of a data set: {dataset!r}")
        self.base, self.patience_s = f"{url.rstrip('/')}/v1/datasets/{dataset}", patience_s
        token = os.environ.get("CLT_TOKEN", "")
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.tls = ssl.create_default_context(cafile=ca_file) if split.scheme == "https" else None
        self.closed = False
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="clt-remote", daemon=True)
        self.thread.start()
        self.session = self.run(self._open())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of work in the connections' thread.

        Raises:
            OSError: the connections were closed meanwhile.
        """
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        while True:
            try:
                return future.result(0.5)
            except (TimeoutError, CancelledError):
                if self.closed:
                    future.cancel()
                    raise OSError(f"{self.base}: closed") from None
                if future.done():
                    raise

    async def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=16, ssl=self.tls if self.tls is not None else True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
        return aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=self.headers, read_bufsize=2**21, auto_decompress=False
        )

    def get(self, path: str) -> bytes:
        """A small file."""
        body = Filling(None)
        self.run(self._patiently(lambda: self._get(path, body), body))
        return bytes(body.grown)

    def fill(self, path: str, into: list[np.ndarray]) -> None:
        """Download into arrays, one after the other; what was there before an error is not asked for again."""
        body = Filling(into)
        self.run(self._patiently(lambda: self._get(path, body), body))

    def put(self, path: Path) -> None:
        """Upload a file, or what the server lacks of it."""
        state = xxhash.xxh3_128()
        with path.open("rb") as file:
            while piece := file.read(2**20):
                state.update(piece)
        self.run(self._patiently(lambda: self._put(path, state.hexdigest())))

    def close(self) -> None:
        """Close the connections; requests under way fail."""
        if self.closed:
            return
        self.run(self._close())
        self.closed = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    async def _close(self) -> None:
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self.session.close()

    # -- in the connections' thread -----------------------------------------------------------------------------

    async def _patiently(self, attempt: Any, body: Filling | None = None) -> None:
        """Attempt until it succeeds.

        Raises:
            OSError: no success, and nothing at all has come for too long.
            ValueError: the server's certificate is not trusted, which waiting does not change.
        """
        pause, since, before = FIRST_PAUSE_S, time.monotonic(), 0
        while True:
            try:
                return await attempt()
            except aiohttp.ClientConnectorCertificateError as error:
                why = getattr(error.certificate_error, "verify_message", "") or str(error.certificate_error)
                raise ValueError(
                    f"{self.base}: the server's certificate is not trusted: {why}: if it is of your own making, name "
                    "it in source.ca_file, or for uploads in the environment variable SSL_CERT_FILE"
                ) from error
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError, Again) as error:
                if body is not None and body.at > before:
                    pause, since, before = FIRST_PAUSE_S, time.monotonic(), body.at
                if self.session.closed or time.monotonic() - since > self.patience_s:
                    raise OSError(f"{self.base}: no success in {self.patience_s:g} s: {_text(error)}") from error
                if pause < 1 <= 2 * pause:
                    log.warning("%s: %s; tried again for %g s", self.base, _text(error), self.patience_s)
            await asyncio.sleep(pause * (1 - random.random() / 2))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _get(self, path: str, body: Filling) -> None:
        headers = {"Range": f"bytes={body.at}-"} if body.at else {}
        async with self.session.get(f"{self.base}/{path}", headers=headers) as answer:
            await self._refused(answer)
            if body.at and answer.status != 206:
                body.clear()
            async for piece in answer.content.iter_any():
                body.add(piece)
        if not body.full:
            raise Again("the answer was too short")

    async def _put(self, path: Path, checksum: str) -> None:
        place = f"{self.base}/files/{path.name}"
        async with self.session.get(place, params={"checksum": checksum}) as answer:
            await self._refused(answer)
            there = await answer.json()
        if there["whole"]:
            return
        headers = {
            "X-Checksum": checksum,
            "Upload-Offset": str(there["offset"]),
            "Content-Length": str(path.stat().st_size - there["offset"]),
        }
        async with self.session.put(place, data=_pieces(path, there["offset"]), headers=headers) as answer:
            if answer.status == 409 and path.name == MANIFEST and "missing" in await answer.json():
                raise Again("another process still uploads its chunks")
            await self._refused(answer)

    async def _refused(self, answer: aiohttp.ClientResponse) -> None:
        """Raise what an answer other than success means."""
        if answer.status < 300:
            return
        raw = await answer.content.read(4096)
        try:
            text = json.loads(raw)["error"]
        except (ValueError, KeyError, TypeError):
            text = answer.reason or ""
        if answer.status in AGAIN:
            raise Again(f"{answer.status} {text}")
        if answer.status in (401, 403):
            raise ValueError(f"{self.base}: {text}: give the server's token in CLT_TOKEN")
        if answer.status == 422:
            raise DamagedError(f"{self.base}: {text}")
        raise ValueError(f"{self.base}: {answer.status} {text}")


class Again(Exception):
    """Worth another attempt."""


class Filling:
    """A body on its way into arrays, or of unknown size."""

    def __init__(self, arrays: list[np.ndarray] | None):
        self.views = None if arrays is None else [array.reshape(-1).view(np.uint8).data for array in arrays]
        self.size = 0 if self.views is None else sum(map(len, self.views))
        self.grown = bytearray()
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        self.at = 0
        self.rest = list(self.views or [])
        self.grown.clear()

    def add(self, piece: bytes) -> None:
        """Take the next bytes.

        Raises:
            Again: there are more than there should be.
        """
        self.at += len(piece)
        if self.views is None:
            self.grown += piece
            return
        if self.at > self.size:
            self.clear()
            raise Again("the answer was too long")
        left = memoryview(piece)
        while left:
            count = min(len(left), len(self.rest[0]))
            self.rest[0][:count] = left[:count]
            left = left[count:]
            self.rest[0] = self.rest[0][count:]
            if not self.rest[0]:
                self.rest.pop(0)

    @property
    def full(self) -> bool:
        return self.views is None or self.at == self.size


def _text(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


async def _pieces(path: Path, offset: int) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while piece := await asyncio.to_thread(file.read, 2**20):
            yield piece


class Remote:
    """A data set on a server, as `folder.Folder` is one in a folder. Every byte is checked against the manifest."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.manifest = Manifest.from_json(connection.get("manifest"), connection.base)
        self._summaries: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def read(self, number: int, begin: int, into: list[np.ndarray]) -> None:
        """Read a block; see `ChunkReader.read`. What arrives damaged is fetched once more."""
        wanted = int(self._summary(number)[0][begin // self.manifest.block_rows])
        for _ in range(2):
            self.connection.fill(f"chunks/{number}/blocks/{begin}", into)
            if digest(*into) == wanted:
                return
        rows = f"rows {begin} to {begin + len(into[0]) - 1}"
        file = self.manifest.chunks[number].file
        raise DamagedError(f"{self.connection.base}: {file}: chunk {number}, {rows}: damaged on the way, twice")

    def scales(self, number: int) -> np.ndarray:
        """Of int8 rows of a chunk, [2, L]."""
        return self._summary(number)[1]

    def statistics(self) -> bytes:
        """The statistics file, checked."""
        data = self.connection.get("statistics")
        if xxhash.xxh3_128_hexdigest(data) != self.manifest.statistics:
            raise DamagedError(f"{self.connection.base}: statistics damaged on the way")
        return data

    def close(self) -> None:
        """Close the connections."""
        self.connection.close()

    def _summary(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Checksums and scales of a chunk."""
        with self._lock:
            if number in self._summaries:
                return self._summaries[number]
        chunk = self.manifest.chunks[number]
        data = self.connection.get(f"chunks/{number}/summary")
        blocks = -(-chunk.rows // self.manifest.block_rows) + 1
        checksums = np.frombuffer(data[: 8 * blocks], "<u8")
        scales = np.frombuffer(data[8 * blocks :][: 8 * self.manifest.layers], "<f4").reshape(2, -1).copy()
        whole = len(checksums) == blocks and digest(data[8 * blocks :]) == checksums[-1]
        if not whole or xxhash.xxh3_128_hexdigest(checksums.tobytes()) != chunk.checksum:
            raise DamagedError(f"{self.connection.base}: {chunk.file}: chunk {number}: its checksums are damaged")
        with self._lock:
            self._summaries[number] = checksums, scales
        return checksums, scales


def build_remote(config: RemoteConfig, context: Context) -> StoredSource:
    """The source `remote`."""
    connection = Connection(config.url, config.dataset, patience_s=config.patience_s, ca_file=config.ca_file)
    try:
        store = DatasetStore(Remote(connection), connection.base)
        return StoredSource(store, context, buffer_tokens=config.buffer_tokens, on_corrupt=config.on_corrupt)
    except BaseException:
        connection.close()
        raise

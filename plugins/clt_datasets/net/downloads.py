"""What `serve` sends: lists, manifests, statistics, summaries and blocks. Memory is bounded for any number of clients.

File work is done in threads.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from clt_datasets.format.folder import LocalData
from clt_datasets.format.manifest import DATASET_NAME, MANIFEST, Manifest
from clt_datasets.net.uploads import BadRequest
from clt_plugins import DamagedError

SLICE = 2**22
"""Bytes that are given to a connection at a time; the event loop may copy what the system does not accept at once."""
BLOCKS = 16
"""Blocks in memory at a time; other requests wait."""
LARGEST_BLOCK = 2**26
"""Bytes of a block; larger ones are not served."""
DATASETS = 256
"""Data sets whose manifests are kept in memory."""


class Downloads:
    """Reads data sets below a folder.

    Args:
        root: the folder.
        work: runs a function in a thread.
        page_cache: whether blocks are read through the page cache.
        stalled_s: a client that accepts no slice for so long is dropped; it may ask for the rest.
    """

    def __init__(self, root: Path, work: Callable[..., Awaitable[Any]], page_cache: bool, stalled_s: float):
        self.root, self.work, self.page_cache, self.stalled_s = root, work, page_cache, stalled_s
        self.blocks = asyncio.Semaphore(BLOCKS)
        self.sent = 0
        """Bytes of blocks."""
        self._opened: dict[str, tuple[int, LocalData]] = {}
        """Name -> when its manifest was changed, and the data set."""
        self._lock = threading.Lock()

    def routes(self) -> list[web.RouteDef]:
        """See `server`."""
        return [
            web.get("/v1/datasets", self._list),
            web.get("/v1/datasets/{name}/manifest", self._manifest),
            web.get("/v1/datasets/{name}/statistics", self._statistics),
            web.get("/v1/datasets/{name}/chunks/{number}/summary", self._summary),
            web.get("/v1/datasets/{name}/chunks/{number}/blocks/{row}", self._block),
        ]

    def folder(self, request: web.Request) -> Path:
        """The folder of the data set that a request names; it may not exist."""
        name = request.match_info["name"]
        if not DATASET_NAME.fullmatch(name):
            raise BadRequest(400, "not the name of a data set")
        path = self.root / name
        if path.is_symlink():
            raise BadRequest(404, "no such data set")
        return path

    async def _data(self, request: web.Request) -> LocalData:
        return await self.work(self._open, self.folder(request))

    def _open(self, path: Path) -> LocalData:
        """A data set, kept from an earlier request if its manifest is still the same."""
        try:
            changed = (path / MANIFEST).stat().st_mtime_ns
        except OSError:
            raise BadRequest(404, "no such data set") from None
        with self._lock:
            opened = self._opened.get(path.name)
        if opened is not None and opened[0] == changed:
            return opened[1]
        try:
            data = LocalData(path, page_cache=self.page_cache)
        except ValueError as error:
            raise DamagedError(str(error)) from error
        with self._lock:
            if len(self._opened) >= DATASETS:
                self._opened.pop(next(iter(self._opened)))
            self._opened[path.name] = changed, data
        return data

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response(await self.work(self._names))

    def _names(self) -> list[dict[str, Any]]:
        names = []
        for path in sorted(self.root.iterdir()):
            if DATASET_NAME.fullmatch(path.name) and not path.is_symlink() and (path / MANIFEST).is_file():
                try:
                    manifest = self._open(path).manifest
                    names.append({"name": path.name, "tokens": manifest.tokens, "dtype": manifest.dtype})
                except DamagedError as error:
                    names.append({"name": path.name, "damaged": self.without_root(error)})
        return names

    def without_root(self, error: DamagedError) -> str:
        """What clients are told: not where the root is."""
        return str(error).replace(f"{self.root}/", "")

    async def _manifest(self, request: web.Request) -> web.Response:
        data = await self._data(request)
        return web.Response(body=await self.work(data.manifest.to_json), content_type="application/json")

    async def _statistics(self, request: web.Request) -> web.Response:
        data = await self._data(request)
        return web.Response(body=await self.work(data.statistics))

    async def _summary(self, request: web.Request) -> web.Response:
        data = await self._data(request)
        number = _number(request, "number", len(data.manifest.chunks))
        summary = (await self.work(data.chunk, number)).summary
        parts = [summary.checksums, summary.scales, summary.moments, summary.errors]
        return web.Response(body=b"".join(part.tobytes() for part in parts))

    async def _block(self, request: web.Request) -> web.StreamResponse:
        data = await self._data(request)
        manifest = data.manifest
        number = _number(request, "number", len(manifest.chunks))
        begin = _number(request, "row", manifest.chunks[number].rows)
        try:
            rows = manifest.block(manifest.chunks[number], begin)
        except ValueError as error:
            raise BadRequest(404, str(error)) from error
        size = rows * manifest.row_bytes
        if size > LARGEST_BLOCK:
            raise BadRequest(400, f"a block has {size} bytes, more than the {LARGEST_BLOCK} that are served")
        first = _first_byte(request, size)
        async with self.blocks:
            raw = await self.work(_read, data, number, begin, rows)
            return await self._send(request, raw, first)

    async def _send(self, request: web.Request, raw: np.ndarray, first: int) -> web.StreamResponse:
        """Send bytes from the first that is asked for."""
        response = web.StreamResponse(status=206 if first else 200)
        response.content_type = "application/octet-stream"
        response.content_length = len(raw) - first
        if first:
            response.headers["Content-Range"] = f"bytes {first}-{len(raw) - 1}/{len(raw)}"
        await response.prepare(request)
        view = raw.data
        for begin in range(first, len(raw), SLICE):
            piece = view[begin : begin + SLICE]
            await asyncio.wait_for(response.write(piece), self.stalled_s)
            self.sent += len(piece)
        await asyncio.wait_for(response.write_eof(), self.stalled_s)
        return response


def _number(request: web.Request, name: str, end: int) -> int:
    text = request.match_info[name]
    if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) >= end:
        raise BadRequest(404, f"no such {name}")
    return int(text)


def _first_byte(request: web.Request, size: int) -> int:
    """The first byte that is asked for."""
    text = request.headers.get("Range")
    if text is None:
        return 0
    match = re.fullmatch(r"bytes=([0-9]{1,15})-", text)
    if not match or int(match[1]) >= size:
        raise BadRequest(416, f"of {size} bytes, ask for the last ones: bytes=N-")
    return int(match[1])


def _read(data: LocalData, number: int, begin: int, rows: int) -> np.ndarray:
    """A block's bytes, checked."""
    raw = np.empty(rows * data.manifest.row_bytes, np.uint8)
    data.read(number, begin, split(raw, data.manifest, rows))
    return raw


def split(raw: np.ndarray, manifest: Manifest, rows: int) -> list[np.ndarray]:
    """A block's bytes as the arrays that are stored; no copies."""
    arrays, offset = [], 0
    for dtype, shape in manifest.row_shapes:
        count = rows * int(np.prod(shape)) * dtype.itemsize
        arrays.append(raw[offset : offset + count].view(dtype).reshape(rows, *shape))
        offset += count
    return arrays

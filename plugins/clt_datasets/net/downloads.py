"""What `serve` sends: lists, manifests, statistics, summaries and blocks. Memory is bounded for any number of clients.

File work is done in threads.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from clt_datasets.format.manifest import DATASET_NAME, MANIFEST, Manifest
from clt_datasets.net.answers import BadRequest
from clt_datasets.net.bodies import Bodies
from clt_datasets.net.limits import LARGEST_BLOCK, Limits
from clt_datasets.net.served import NotServed, ServedData, regular
from clt_plugins import DamagedError

BINARY = "application/octet-stream"
REMEMBERED = 2**26
"""Bytes of manifests of which the content is kept in memory."""


class Downloads:
    """Reads data sets below a folder.

    Args:
        root: the folder.
        work: runs a function in a thread.
        page_cache: whether blocks are read through the page cache.
        limits: see there.
    """

    def __init__(self, root: Path, work: Callable[..., Awaitable[Any]], page_cache: bool, limits: Limits):
        self.root, self.work, self.page_cache = root, work, page_cache
        self.bodies = Bodies(limits)
        self._opened: dict[str, tuple[tuple[int, ...], ServedData]] = {}
        """Name -> the state of its manifest's file, and the data set; those used last at the end."""
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

    async def _data(self, request: web.Request) -> ServedData:
        return await self.work(self._open, self.folder(request))

    def _open(self, path: Path) -> ServedData:
        """A data set, kept from an earlier request if its manifest is still the same."""
        try:
            found = regular(path / MANIFEST)
            state = found.st_mtime_ns, found.st_size, found.st_ino
            with self._lock:
                opened = self._opened.pop(path.name, None)
                if opened is not None and opened[0] == state:
                    self._opened[path.name] = opened
                    return opened[1]
            data = ServedData(path, page_cache=self.page_cache)
        except (FileNotFoundError, NotADirectoryError):
            raise BadRequest(404, "no such data set") from None
        except ValueError as error:
            raise DamagedError(str(error)) from error
        with self._lock:
            self._opened[path.name] = state, data
            while len(self._opened) > 1 and sum(each[1].bytes for each in self._opened.values()) > REMEMBERED:
                self._opened.pop(next(iter(self._opened)))
        return data

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response(await self.work(self._names))

    def _names(self) -> list[dict[str, Any]]:
        names = []
        for path in sorted(self.root.iterdir()):
            if DATASET_NAME.fullmatch(path.name) and not path.is_symlink() and (path / MANIFEST).exists():
                try:
                    manifest = self._open(path).manifest
                    names.append({"name": path.name, "tokens": manifest.tokens, "dtype": manifest.dtype})
                except NotServed:
                    continue
                except DamagedError as error:
                    names.append({"name": path.name, "damaged": self.without_root(error)})
        return names

    def without_root(self, error: DamagedError) -> str:
        """What clients are told: not where the root is."""
        return str(error).replace(f"{self.root}/", "")

    async def _manifest(self, request: web.Request) -> web.StreamResponse:
        async with self.bodies.one(request) as body:
            data = await self._data(request)
            raw = await self.work(data.manifest.to_json)
            return await self.bodies.send(body, raw, content_type="application/json")

    async def _statistics(self, request: web.Request) -> web.StreamResponse:
        async with self.bodies.one(request) as body:
            data = await self._data(request)
            return await self.bodies.send(body, await self.work(data.statistics), content_type=BINARY)

    async def _summary(self, request: web.Request) -> web.StreamResponse:
        async with self.bodies.one(request) as body:
            data = await self._data(request)
            number = _number(request, "number", len(data.manifest.chunks))
            summary = (await self.work(data.chunk, number)).summary
            parts = [summary.checksums, summary.scales, summary.moments, summary.errors]
            raw = b"".join(part.tobytes() for part in parts)
            return await self.bodies.send(body, raw, content_type=BINARY)

    async def _block(self, request: web.Request) -> web.StreamResponse:
        async with self.bodies.one(request) as body:
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
            raw = await self.work(_read, data, number, begin, rows)
            return await self.bodies.send(body, raw.data, first=first, content_type=BINARY)


def _number(request: web.Request, name: str, end: int) -> int:
    text = request.match_info[name]
    if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) >= end:
        raise BadRequest(404, f"no such {name}")
    return int(text)


def _first_byte(request: web.Request, size: int) -> int | None:
    """The first byte that is asked for; None for an answer with all of them."""
    text = request.headers.get("Range")
    # Answers have no validators, so that none can match If-Range.
    if text is None or "If-Range" in request.headers or request.method != "GET":
        return None
    match = re.fullmatch(r"bytes=([0-9]{1,15})-", text)
    if not match or int(match[1]) >= size:
        raise BadRequest(416, f"of {size} bytes, ask for the last ones: bytes=N-")
    return int(match[1])


def _read(data: ServedData, number: int, begin: int, rows: int) -> np.ndarray:
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

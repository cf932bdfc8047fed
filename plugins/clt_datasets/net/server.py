"""`serve`: the data sets below a folder, over HTTP.

| method, path (below /v1/datasets) | |
| --- | --- |
| GET `` | names and sizes; of damaged ones, what is wrong |
| GET `/{name}/manifest`, `/{name}/statistics` | the files |
| GET `/{name}/chunks/{number}/summary` | checksums, scales, moments, errors: raw, one after the other |
| GET `/{name}/chunks/{number}/blocks/{row}` | the block that begins at a row, raw; `Range: bytes=N-` for its rest |
| GET `/{name}/files/{file}` | how much of an upload is there (`?checksum=`) |
| PUT `/{name}/files/{file}` | upload a file, or with `Upload-Offset` the rest of it; the manifest comes last |

and GET `/healthz`, `/metrics`. Errors are JSON, `{"error": "..."}`.

A name is letters, digits, `.`, `-` and `_`, so no path leaves the root; links are not followed. File work is done in
threads; what is in memory at a time is bounded, whatever the number of clients.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from clt_datasets.dataset import Folder
from clt_datasets.format.manifest import DATASET_NAME, MANIFEST, Manifest
from clt_datasets.net.uploads import Receiver, Refused
from clt_plugins import DamagedError

log = logging.getLogger(__name__)

SLICE = 2**22
"""Bytes that are handed to a connection at a time; what the system does not take at once, the event loop may copy."""
STALLED_S = 60.0
"""A client that takes no slice, or gives nothing, for so long is dropped; it may ask for the rest."""
BLOCKS = 16
"""Blocks in memory at a time; other requests wait."""
LARGEST_BLOCK = 2**26
"""Bytes of a block; larger ones are not served."""
DATASETS = 256
"""Data sets whose manifests are kept in memory."""


class Server:
    """The application.

    Args:
        root: the folder with the data sets.
        token: demanded from everybody if not empty; nobody writes without one.
        max_upload: bytes of a file.
        page_cache: whether blocks are read through it.
    """

    def __init__(self, root: Path, token: str = "", max_upload: int = 2**33, *, page_cache: bool = False):
        self.page_cache = page_cache
        self.root, self.token = root.resolve(), token.encode()
        self.threads = ThreadPoolExecutor(8, "clt-serve")
        self.blocks = asyncio.Semaphore(BLOCKS)
        self.receiver = Receiver(self.work, max_upload, STALLED_S)
        self.folders: dict[str, tuple[int, Folder]] = {}
        self.counts: dict[tuple[str, int], int] = {}
        self.sent = self.in_flight = 0

    def app(self) -> web.Application:
        """With its routes."""
        app = web.Application(middlewares=[self._around], client_max_size=2**20)
        app.add_routes(
            [
                web.get("/healthz", self._health),
                web.get("/metrics", self._metrics),
                web.get("/v1/datasets", self._list),
                web.get("/v1/datasets/{name}/manifest", self._manifest),
                web.get("/v1/datasets/{name}/statistics", self._statistics),
                web.get("/v1/datasets/{name}/chunks/{number}/summary", self._summary),
                web.get("/v1/datasets/{name}/chunks/{number}/blocks/{row}", self._block),
                web.get("/v1/datasets/{name}/files/{file}", self._offset),
                web.put("/v1/datasets/{name}/files/{file}", self._put),
            ]
        )
        app.on_cleanup.append(self._close)
        return app

    async def work(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run file work in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, partial(function, *args))

    async def _close(self, _: web.Application) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)

    # -- around every request -----------------------------------------------------------------------------------

    @web.middleware
    async def _around(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Tokens, counters, and exceptions as answers."""
        self.in_flight += 1
        status = 499
        try:
            self._authorise(request)
            response = await handler(request)
            status = response.status
            return response
        except web.HTTPException as error:
            status = error.status
            return _answer(status, error.reason)
        except Refused as error:
            status = error.status
            return _answer(status, str(error), **error.more)
        except DamagedError as error:
            log.error("%s", error)
            status = 422
            return _answer(status, self._text(error))
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            log.exception("%s %s", request.method, request.path)
            status = 500
            return _answer(status, type(error).__name__)
        finally:
            self.in_flight -= 1
            key = request.method if request.method in ("GET", "PUT", "HEAD") else "other", status
            self.counts[key] = self.counts.get(key, 0) + 1

    def _text(self, error: DamagedError) -> str:
        """What clients are told: nothing of where the root is."""
        return str(error).replace(f"{self.root}/", "")

    def _authorise(self, request: web.Request) -> None:
        if request.path == "/healthz":
            return
        writing = request.method not in ("GET", "HEAD")
        if writing and not self.token:
            raise Refused(403, "this server was started without a token: nothing can be written")
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self.token and not hmac.compare_digest(given, b"Bearer " + self.token):
            raise Refused(401, "a bearer token is wanted")

    def _place(self, request: web.Request) -> Path:
        """The folder that a request names; it may not exist."""
        name = request.match_info["name"]
        if not DATASET_NAME.fullmatch(name):
            raise Refused(400, "no name of a data set")
        path = self.root / name
        if path.is_symlink():
            raise Refused(404, "no such data set")
        return path

    async def _folder(self, request: web.Request) -> Folder:
        path = self._place(request)
        return await self.work(self._open, path)

    def _open(self, path: Path) -> Folder:
        try:
            changed = (path / MANIFEST).stat().st_mtime_ns
        except OSError:
            raise Refused(404, "no such data set") from None
        known = self.folders.get(path.name)
        if known is None or known[0] != changed:
            try:
                known = changed, Folder(path, page_cache=self.page_cache)
            except ValueError as error:
                raise DamagedError(str(error)) from error
            if len(self.folders) >= DATASETS:
                self.folders.pop(next(iter(self.folders)))
            self.folders[path.name] = known
        return known[1]

    # -- what is asked for --------------------------------------------------------------------------------------

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _metrics(self, _: web.Request) -> web.Response:
        lines = ["# TYPE clt_requests_total counter"]
        for (method, status), count in sorted(self.counts.items()):
            lines.append(f'clt_requests_total{{method="{method}",status="{status}"}} {count}')
        values = {
            "clt_sent_bytes_total counter": self.sent,
            "clt_received_bytes_total counter": self.receiver.received,
            "clt_requests_in_flight gauge": self.in_flight,
            "process_resident_memory_bytes gauge": await self.work(_resident),
        }
        for name, value in values.items():
            lines += [f"# TYPE {name}", f"{name.split()[0]} {value}"]
        return web.Response(text="\n".join(lines) + "\n", headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response(await self.work(self._names))

    def _names(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.root.iterdir()):
            if DATASET_NAME.fullmatch(path.name) and not path.is_symlink() and (path / MANIFEST).is_file():
                try:
                    manifest = self._open(path).manifest
                    found.append({"name": path.name, "tokens": manifest.tokens, "dtype": manifest.dtype})
                except DamagedError as error:
                    found.append({"name": path.name, "damaged": self._text(error)})
        return found

    async def _manifest(self, request: web.Request) -> web.Response:
        folder = await self._folder(request)
        return web.Response(body=await self.work(folder.manifest.to_json), content_type="application/json")

    async def _statistics(self, request: web.Request) -> web.Response:
        folder = await self._folder(request)
        return web.Response(body=await self.work(folder.statistics))

    async def _summary(self, request: web.Request) -> web.Response:
        folder = await self._folder(request)
        summary = (await self.work(folder.chunk, _number(request, "number", len(folder.manifest.chunks)))).summary
        parts = [summary.checksums, summary.scales, summary.moments, summary.errors]
        return web.Response(body=b"".join(part.tobytes() for part in parts))

    async def _block(self, request: web.Request) -> web.StreamResponse:
        folder = await self._folder(request)
        manifest = folder.manifest
        number = _number(request, "number", len(manifest.chunks))
        chunk = manifest.chunks[number]
        begin = _number(request, "row", chunk.rows)
        try:
            rows = manifest.block(chunk, begin)
        except ValueError as error:
            raise Refused(404, str(error)) from error
        size = rows * manifest.row_bytes
        if size > LARGEST_BLOCK:
            raise Refused(422, f"blocks of {size} bytes are not served")
        first = _range(request, size)
        async with self.blocks:
            raw = await self.work(_read, folder, number, begin, rows)
            response = web.StreamResponse(status=206 if first else 200)
            response.content_type = "application/octet-stream"
            response.content_length = size - first
            if first:
                response.headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
            await response.prepare(request)
            view = memoryview(raw)
            for at in range(first, size, SLICE):
                piece = view[at : at + SLICE]
                await asyncio.wait_for(response.write(piece), STALLED_S)
                self.sent += len(piece)
            await asyncio.wait_for(response.write_eof(), STALLED_S)
        return response

    # -- what is sent -------------------------------------------------------------------------------------------

    async def _offset(self, request: web.Request) -> web.Response:
        return web.json_response(await self.receiver.offset(self._place(request), request))

    async def _put(self, request: web.Request) -> web.Response:
        return web.json_response(await self.receiver.put(self._place(request), request), status=201)


def _answer(status: int, error: str, **more: Any) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return web.json_response({"error": error, **more}, status=status, headers=headers)


def _number(request: web.Request, name: str, end: int) -> int:
    text = request.match_info[name]
    if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) >= end:
        raise Refused(404, f"no such {name}")
    return int(text)


def _range(request: web.Request, size: int) -> int:
    """The first byte that is asked for."""
    text = request.headers.get("Range")
    if text is None:
        return 0
    match = re.fullmatch(r"bytes=([0-9]{1,15})-", text)
    if not match or int(match[1]) >= size:
        raise Refused(416, f"of {size} bytes, ask for the last ones: bytes=N-")
    return int(match[1])


def _read(folder: Folder, number: int, begin: int, rows: int) -> np.ndarray:
    """A block's bytes, checked."""
    manifest: Manifest = folder.manifest
    raw = np.empty(rows * manifest.row_bytes, np.uint8)
    folder.read(number, begin, split(raw, manifest, rows))
    return raw


def split(raw: np.ndarray, manifest: Manifest, rows: int) -> list[np.ndarray]:
    """A block's bytes as the arrays that are stored; copies where they do not lie as their type wants."""
    arrays, at = [], 0
    for dtype, shape in manifest.row_shapes:
        count = rows * int(np.prod(shape)) * dtype.itemsize
        arrays.append(raw[at : at + count].view(dtype).reshape(rows, *shape))
        at += count
    return arrays


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0

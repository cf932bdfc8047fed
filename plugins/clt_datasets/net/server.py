"""`serve`: the data sets below a folder, over HTTP.

| method, path (below /v1/datasets) | |
| --- | --- |
| GET `` | names and sizes; of damaged ones, what is wrong |
| GET `/{name}/manifest`, `/{name}/statistics` | the files |
| GET `/{name}/chunks/{number}/summary` | checksums, scales, moments, errors: raw, one after the other |
| GET `/{name}/chunks/{number}/blocks/{row}` | the block that begins at a row, raw; `Range: bytes=N-` for its rest |
| GET `/{name}/files/{file}` | how much of an upload is there (`?checksum=`, `&size=`), or why it would be refused |
| PUT `/{name}/files/{file}` | upload a file, or with `Upload-Offset` the rest of it; the manifest comes last |

and GET `/healthz`, `/metrics`. Errors are JSON, `{"error": "..."}`, with `"again": true` where the same request may
succeed later.

A name is letters, digits, `.`, `-` and `_`, so no path leaves the root. Links below the root are not served.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from clt_datasets.net.answers import BadRequest, answer
from clt_datasets.net.connections import Connections
from clt_datasets.net.downloads import Downloads
from clt_datasets.net.limits import Limits
from clt_datasets.net.served import NotServed
from clt_datasets.net.storage import FULL, Storage
from clt_datasets.net.uploads import Uploads
from clt_plugins import DamagedError

log = logging.getLogger(__name__)

SWEEP_S = 0.5
"""How often limits of time are looked at."""
TIDY_S = 3600.0
"""How often old unfinished uploads are looked for."""


class Server:
    """The application: routes, tokens, metrics, and exceptions as answers.

    Args:
        root: the folder with the data sets.
        token: needed by everybody if not empty; without one nobody can write.
        max_upload: bytes of a file.
        quota: bytes of all files below the root; an upload that would exceed it is refused. By default a share of the
            disk is kept free.
        page_cache: whether blocks are read through the page cache.
        limits: what clients may take.
    """

    def __init__(
        self,
        root: Path,
        token: str = "",
        max_upload: int = 2**33,
        quota: int | None = None,
        *,
        page_cache: bool = False,
        limits: Limits | None = None,
    ):
        self.token, self.limits = token.encode(), limits or Limits()
        # Uploads have threads of their own: to check them takes long.
        self.threads = [ThreadPoolExecutor(8, "clt-serve"), ThreadPoolExecutor(4, "clt-receive")]
        self.jobs: set[Future[Any]] = set()
        """What runs in threads, or waits for one."""
        self.connections = Connections(self.limits)
        self.storage = Storage(root.resolve(), quota, self.limits.partial_s)
        self.downloads = Downloads(root.resolve(), partial(self.work, 0), page_cache, self.limits)
        self.uploads = Uploads(partial(self.work, 1), self.storage, max_upload, self.limits)
        self.counts: dict[tuple[str, int], int] = {}
        """Answers, by method and status."""
        self.in_flight = 0
        self.most = max(4, self.connections.most // 2)
        """Requests at a time. The other connections wait for one, and can be closed for new ones."""

    def app(self) -> web.Application:
        """The application with its routes."""
        app = web.Application(middlewares=[self._around], client_max_size=2**20)
        app.add_routes(
            [
                web.get("/healthz", self._health),
                web.get("/metrics", self._metrics),
                *self.downloads.routes(),
                web.get("/v1/datasets/{name}/files/{file}", self._stored),
                web.put("/v1/datasets/{name}/files/{file}", self._put),
            ]
        )
        app.cleanup_ctx.append(self._sweeping)
        return app

    async def work(self, pool: int, function: Callable[..., Any], *args: Any) -> Any:
        """Run file work in a thread."""

        job = self.threads[pool].submit(function, *args)
        self.jobs.add(job)
        job.add_done_callback(self.jobs.discard)
        return await asyncio.wrap_future(job)

    async def _sweeping(self, _: web.Application) -> AsyncIterator[None]:
        """Look at the limits, as long as the server runs."""

        async def sweep() -> None:
            tidied = -TIDY_S
            loop = asyncio.get_running_loop()
            while True:
                self.connections.sweep()
                self.downloads.bodies.sweep()
                if self.token and loop.time() - tidied > TIDY_S:
                    tidied = loop.time()
                    await self._tidy()
                await asyncio.sleep(SWEEP_S)

        task = asyncio.get_running_loop().create_task(sweep())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        for pool in self.threads:
            pool.shutdown(wait=False, cancel_futures=True)

    async def _tidy(self) -> None:
        try:
            await self.work(1, self.storage.tidy)
        except OSError as error:
            log.error("old uploads cannot be deleted: %s", error)

    @web.middleware
    async def _around(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Around every request: limits, counters, and exceptions as answers."""
        self.connections.begin(request)
        self.in_flight += 1
        status = 499
        try:
            response = await self._response(request, handler)
            status = response.status
            if not response.prepared:
                async with self.downloads.bodies.patience(request):
                    await response.prepare(request)
                    await response.write_eof()
            return response
        finally:
            self.in_flight -= 1
            key = request.method if request.method in ("GET", "PUT", "HEAD") else "other", status
            self.counts[key] = self.counts.get(key, 0) + 1
            self.connections.end(request)

    async def _response(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            self._authorise(request)
            if self.in_flight > self.most and request.path != "/healthz":
                raise BadRequest(503, "the server is busy", again=True)
            return await handler(request)
        except web.HTTPException as error:
            return answer(error.status, error.reason)
        except BadRequest as error:
            if error.status == 507:
                log.error("upload refused: %s", error)
            return answer(error.status, str(error), again=error.again)
        except NotServed as error:
            return answer(404, str(error))
        except DamagedError as error:
            log.error("%s", error)
            return answer(422, self.downloads.without_root(error))
        except (ConnectionError, TimeoutError):
            raise
        except OSError as error:
            # Not the request's fault, and not damage: a disk that is full or fails, no permission, no descriptors.
            log.error("%s %s: %s", request.method, request.path, error)
            if error.errno in FULL:
                return answer(507, "the server's disk is full")
            return answer(500, f"the server cannot read or write: {error.strerror or type(error).__name__}")
        except Exception as error:
            log.exception("%s %s", request.method, request.path)
            return answer(500, type(error).__name__)

    def _authorise(self, request: web.Request) -> None:
        if request.path == "/healthz":
            return
        # Asking how much of an upload is there is the first step of writing.
        writing = request.method not in ("GET", "HEAD") or "file" in request.match_info
        if writing and not self.token:
            raise BadRequest(403, "this server was started without a token: nothing can be written")
        sent = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self.token and not hmac.compare_digest(sent, b"Bearer " + self.token):
            raise BadRequest(401, "this server needs a bearer token")

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _metrics(self, _: web.Request) -> web.Response:
        lines = ["# TYPE clt_requests_total counter"]
        for (method, status), count in sorted(self.counts.items()):
            lines.append(f'clt_requests_total{{method="{method}",status="{status}"}} {count}')
        values = {
            "clt_sent_bytes_total counter": self.downloads.bodies.sent,
            "clt_received_bytes_total counter": self.uploads.received,
            "clt_requests_in_flight gauge": self.in_flight,
            "clt_connections gauge": self.connections.count,
            "clt_refused_connections_total counter": self.connections.refused,
            "process_resident_memory_bytes gauge": _resident(),
        }
        for name, value in values.items():
            lines += [f"# TYPE {name}", f"{name.split()[0]} {value}"]
        return web.Response(text="\n".join(lines) + "\n", headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _stored(self, request: web.Request) -> web.Response:
        return web.json_response(await self.uploads.stored(self.downloads.folder(request), request))

    async def _put(self, request: web.Request) -> web.Response:
        return web.json_response(await self.uploads.put(self.downloads.folder(request), request), status=201)


def _resident() -> int:
    """Bytes of memory that the process uses; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0

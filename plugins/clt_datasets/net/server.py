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

A name is letters, digits, `.`, `-` and `_`, so no path leaves the root. A data set's folder that is a link is not
served.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from clt_datasets.net.downloads import Downloads
from clt_datasets.net.uploads import BadRequest, Uploads
from clt_plugins import DamagedError

log = logging.getLogger(__name__)

STALLED_S = 60.0
"""A client that accepts nothing, or sends nothing, for so long is dropped; it may continue later."""


class Server:
    """The application: routes, tokens, metrics, and exceptions as answers.

    Args:
        root: the folder with the data sets.
        token: needed by everybody if not empty; without one nobody can write.
        max_upload: bytes of a file.
        page_cache: whether blocks are read through the page cache.
    """

    def __init__(self, root: Path, token: str = "", max_upload: int = 2**33, *, page_cache: bool = False):
        self.token = token.encode()
        self.threads = ThreadPoolExecutor(8, "clt-serve")
        self.downloads = Downloads(root.resolve(), self.work, page_cache, STALLED_S)
        self.uploads = Uploads(self.work, max_upload, STALLED_S)
        self.counts: dict[tuple[str, int], int] = {}
        """Answers, by method and status."""
        self.in_flight = 0

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
        app.on_cleanup.append(self._close)
        return app

    async def work(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run file work in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, partial(function, *args))

    async def _close(self, _: web.Application) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)

    @web.middleware
    async def _around(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Around every request: tokens, counters, and exceptions as answers."""
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
        except BadRequest as error:
            status = error.status
            return _answer(status, str(error), again=error.again)
        except DamagedError as error:
            log.error("%s", error)
            status = 422
            return _answer(status, self.downloads.without_root(error))
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
            "clt_sent_bytes_total counter": self.downloads.sent,
            "clt_received_bytes_total counter": self.uploads.received,
            "clt_requests_in_flight gauge": self.in_flight,
            "process_resident_memory_bytes gauge": await self.work(_resident),
        }
        for name, value in values.items():
            lines += [f"# TYPE {name}", f"{name.split()[0]} {value}"]
        return web.Response(text="\n".join(lines) + "\n", headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _stored(self, request: web.Request) -> web.Response:
        return web.json_response(await self.uploads.stored(self.downloads.folder(request), request))

    async def _put(self, request: web.Request) -> web.Response:
        return web.json_response(await self.uploads.put(self.downloads.folder(request), request), status=201)


def _answer(status: int, error: str, *, again: bool = False) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return web.json_response({"error": error} | ({"again": True} if again else {}), status=status, headers=headers)


def _resident() -> int:
    """Bytes of memory that the process uses; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0

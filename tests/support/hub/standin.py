"""The hub's HTTP interface, as far as `huggingface_hub` uses it to look up, download and upload model repositories.

The answers are those of `lookups` and `transfers`. Requests can be made to fail: see `Standin.fault`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from tests.support.hub.transfers import Transfers

HOSTS = ("127.0.0.1", "127.0.0.2")
"""Of the hub, and of the store that downloads of large files are redirected to: another machine, to a client."""

Fault = Callable[[web.Request, int], str | None]
"""(request, its number) -> "drop" (the connection breaks half-way), "503", or None."""


class Standin(Transfers):
    """A server of repositories; runs in a thread of its own."""

    def __init__(self, part_bytes: int = 200_000):
        super().__init__(part_bytes)
        self.fault: Fault = lambda request, number: None
        self.requests: list[str] = []
        """Method and path of each."""

    @contextmanager
    def running(self) -> Iterator[Standin]:
        loop, ready = asyncio.new_event_loop(), threading.Event()

        async def start() -> web.AppRunner:
            runner = web.AppRunner(self.application(), access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            for host in HOSTS:
                await web.TCPSite(runner, host, 0).start()
            self.url, self.cdn_url = (f"http://{host}:{port}" for host, port in runner.addresses)
            return runner

        def run() -> None:
            asyncio.set_event_loop(loop)
            runner = loop.run_until_complete(start())
            loop.call_soon(ready.set)  # once it runs: a stop before would be lost
            loop.run_forever()
            loop.run_until_complete(runner.cleanup())
            loop.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert ready.wait(30)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(30)
            assert not thread.is_alive()

    def application(self) -> web.Application:
        app = web.Application(client_max_size=2**31, middlewares=[self._around])
        model = "/api/models/{user}/{name}"
        app.add_routes(
            [
                web.get("/api/whoami-v2", self.whoami),
                web.post("/api/validate-yaml", self.validate_yaml),
                web.post("/api/repos/create", self.create),
                web.get(model, self.info),
                web.get(model + "/revision/{revision:.+}", self.info),
                web.post(model + "/branch/{branch:.+}", self.branch),
                web.get(model + "/tree/{rest:.+}", self.tree),
                web.post(model + "/preupload/{revision:.+}", self.preupload),
                web.post(model + "/commit/{revision:.+}", self.commit),
                web.post("/{user}/{name}.git/info/lfs/objects/batch", self.batch),
                web.put("/lfs/{oid}", self.put_object),
                web.put("/lfs/{oid}/{part}", self.put_part),
                web.post("/lfs/{oid}/complete", self.complete),
                web.post("/lfs/{oid}/verify", self.verify),
                web.get("/cdn/{oid}", self.cdn),
                web.get("/{user}/{name}/resolve/{revision}/{path:.+}", self.resolve),
            ]
        )
        return app

    @web.middleware
    async def _around(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        fault = self.fault(request, len(self.requests))
        if fault == "503":
            return web.Response(status=503, text="overloaded")
        if fault == "drop":
            if request.method in ("PUT", "POST"):
                await request.content.readany()  # something arrives
            elif request.path.startswith("/cdn/"):
                return await self.cdn(request, half=True)
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=500)
        return await handler(request)

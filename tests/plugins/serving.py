"""A server of data sets for tests."""

from __future__ import annotations

import asyncio
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from clt_datasets.server import Server, listen


class Serving:
    """A server in a thread of its own."""

    def __init__(self, root: Path, token: str = "", port: int = 0):
        self.root, self.token, self.port = root, token, port
        self.start()

    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

        async def begin() -> Any:
            self.server = Server(self.root, self.token, max_upload=10**7)
            return await listen(self.server, "127.0.0.1", self.port, grace_s=0.1)

        self.runner = asyncio.run_coroutine_threadsafe(begin(), self.loop).result()
        self.port = self.runner.addresses[0][1]

    def stop(self) -> None:
        """Without waiting for requests under way."""
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

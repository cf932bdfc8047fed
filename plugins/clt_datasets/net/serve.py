"""Running the server: its address, who can reach it, what it logs, and how it stops."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl
import sys
import time
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from clt_datasets.net.connections import Site
from clt_datasets.net.server import Server
from clt_plugins import Refused

log = logging.getLogger(__name__)
connections = logging.getLogger(f"{__name__}.connections")
"""For errors outside the handlers."""

GRACE_S = 10.0
"""Requests under way have so long when the server is told to stop."""
END_S = 25.0
"""After so long it ends, whatever still hangs."""
LINES, LINES_S = 30, 10.0
"""Lines of the log in so many seconds."""


class Few(logging.Filter):
    """Passes few enough messages that clients cannot fill the disk with them, and counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self._since, self._passed, self._left_out = 0.0, 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a message is logged."""
        if record.exc_info and isinstance(record.exc_info[1], (HttpProcessingError, ConnectionError)):
            return False  # a malformed request, which is answered, or a client that is gone
        now = time.monotonic()
        if now - self._since > LINES_S:
            self._since, self._passed = now, 0
        if self._passed >= LINES:
            self._left_out += 1
            return False
        self._passed += 1
        if self._left_out:
            record.msg, record.args = f"{record.getMessage()} ({self._left_out} messages before were left out)", None
            self._left_out = 0
        return True


_few = Few()
for _name in ("serve", "serve.connections", "server", "connections"):
    logging.getLogger(f"{__name__.rpartition('.')[0]}.{_name}").addFilter(_few)


async def listen(
    server: Server, host: str, port: int, tls: ssl.SSLContext | None = None, grace_s: float = GRACE_S
) -> web.AppRunner:
    """Begin to answer. The runner's `cleanup()` waits `grace_s` for requests under way, then stops."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_one_line)
    server.connections.tls = tls
    runner = web.AppRunner(
        server.app(),
        access_log=None,
        logger=connections,
        shutdown_timeout=grace_s,
        keepalive_timeout=server.limits.idle_s,
    )
    await runner.setup()
    await Site(runner, server.connections, host, port).start()
    return runner


def _one_line(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report what went wrong in the event loop, without a stack trace for each client that causes it."""
    error = context.get("exception")
    if not isinstance(error, ConnectionError):
        log.error("%s%s", context["message"], f": {type(error).__name__}: {error}" if error else "")


def serve(
    root: Path,
    host: str,
    port: int,
    token: str = "",
    tls: ssl.SSLContext | None = None,
    **settings: Any,
) -> None:
    """Serve until SIGINT or SIGTERM; 25 seconds later at the latest the process has ended.

    Args:
        token: see `Server`.
        settings: other arguments of `Server`.

    Raises:
        Refused: the root is no folder; or others can reach the address, and there is no token.
        OSError: the port is taken.
    """
    if not root.is_dir():
        raise Refused(root, "no such folder")
    if host not in ("127.0.0.1", "::1", "localhost") and not token:
        raise Refused("--host", f"others can reach {host}: set a token in CLT_TOKEN, or with --token-file")

    async def run() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        server = Server(root, token, **settings)
        runner = await listen(server, host, port, tls)

        def told() -> None:
            if stop.is_set():
                _end("stopped at once: requests under way are cut off")
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, told)
        address = runner.addresses[0]
        scheme = "https" if tls else "http"
        print(f"serving {root} at {scheme}://{address[0]}:{address[1]}", file=sys.stderr, flush=True)
        await stop.wait()
        print("stopping: requests under way are finished", file=sys.stderr, flush=True)
        try:
            async with asyncio.timeout(END_S):
                await runner.cleanup()
                while server.jobs:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            # Threads cannot be stopped, and the interpreter would wait for them.
            _end(f"stopped after {END_S:g} s: {len(server.jobs)} reads or writes of files hang")

    asyncio.run(run())


def _end(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
    os._exit(1)

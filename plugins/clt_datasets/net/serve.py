"""Running the server: its address, who can reach it, and how it stops."""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
import sys
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from clt_datasets.net.server import Server
from clt_plugins import Refused

connections = logging.getLogger(f"{__name__}.connections")
"""For errors outside the handlers."""


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether an error is more than a malformed request. Those are answered; anybody could fill the log with them."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


connections.addFilter(_is_ours)


async def listen(
    server: Server, host: str, port: int, tls: ssl.SSLContext | None = None, grace_s: float = 30
) -> web.AppRunner:
    """Begin to answer. The runner's `cleanup()` waits `grace_s` for requests under way, then stops."""
    runner = web.AppRunner(
        server.app(), access_log=None, logger=connections, shutdown_timeout=grace_s, keepalive_timeout=120
    )
    await runner.setup()
    await web.TCPSite(runner, host, port, ssl_context=tls, backlog=1024).start()
    return runner


def serve(
    root: Path,
    host: str,
    port: int,
    token: str = "",
    tls: ssl.SSLContext | None = None,
    **settings: Any,
) -> None:
    """Serve until SIGINT or SIGTERM.

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
        runner = await listen(Server(root, token, **settings), host, port, tls)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        address = runner.addresses[0]
        scheme = "https" if tls else "http"
        print(f"serving {root} at {scheme}://{address[0]}:{address[1]}", file=sys.stderr, flush=True)
        await stop.wait()
        print("stopping: requests under way are finished", file=sys.stderr, flush=True)
        await runner.cleanup()

    asyncio.run(run())

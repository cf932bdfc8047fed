"""Ctrl-C and SIGTERM while a thread uploads."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clt_datasets.net.client import Client


@contextmanager
def closes(client: Client | None) -> Iterator[None]:
    """Close a client at the end, and as soon as SIGINT or SIGTERM comes; then KeyboardInterrupt is raised.

    Args:
        client: None changes nothing.
    """
    if client is None:
        yield
        return

    def stop(*_: Any) -> None:
        # In another thread: this one may hold the locks that closing needs.
        threading.Thread(target=client.close, daemon=True).start()
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        client.close()

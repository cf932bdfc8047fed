"""Lets no connection leave this machine: what a test opens to another address is an error of the test."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

refused: list[str] = []
"""Addresses that something tried to reach."""
_on = False


class LeftTheMachine(AssertionError):
    """A connection to another machine, or the question for its address."""


def _is_here(host: Any) -> bool:
    text = host.decode() if isinstance(host, bytes) else host
    return text in (None, "", "::1", "localhost", socket.gethostname()) or text.startswith("127.")


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _on:
        return
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        if not isinstance(address, tuple) or _is_here(address[0]):
            return
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[0]
        if _is_here(address):
            return
    else:
        return
    refused.append(f"{event} {address}")
    raise LeftTheMachine(f"{event} {address}")


sys.addaudithook(_watch)


@contextmanager
def guarded() -> Iterator[None]:
    """In the block, connections to other machines raise, and at its end it fails where one was tried and swallowed."""
    global _on
    refused.clear()
    _on = True
    try:
        yield
    finally:
        _on = False
    assert not refused, f"left the machine: {refused}"

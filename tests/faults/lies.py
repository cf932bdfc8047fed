"""A proxy between client and server that changes what the server says: bits, lengths, times, everything."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

Lie = Callable[[Iterator[bytes], random.Random], Iterator[bytes]]
"""From the pieces of an answer (of all answers on one connection) to what the client gets."""


def _flipped(pieces: Iterator[bytes], draw: random.Random) -> Iterator[bytes]:
    """One bit of some pieces."""
    for piece in pieces:
        data = bytearray(piece)
        if draw.random() < 0.3:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        yield bytes(data)


def _cut(pieces: Iterator[bytes], draw: random.Random) -> Iterator[bytes]:
    """The connection ends in the middle of an answer."""
    for piece in pieces:
        if draw.random() < 0.2:
            yield piece[: draw.randrange(len(piece))]
            return
        yield piece


def _stalled(pieces: Iterator[bytes], draw: random.Random) -> Iterator[bytes]:
    """Nothing more comes, and the connection stays."""
    for piece in pieces:
        if draw.random() < 0.1:
            yield piece[: draw.randrange(len(piece))]
            time.sleep(60)
            return
        yield piece


def _repeated(pieces: Iterator[bytes], draw: random.Random) -> Iterator[bytes]:
    """Pieces come twice."""
    for piece in pieces:
        yield piece
        if draw.random() < 0.2:
            yield piece


def _dripping(pieces: Iterator[bytes], draw: random.Random) -> Iterator[bytes]:
    """A byte at a time."""
    for piece in pieces:
        for byte in piece:
            yield bytes([byte])
            time.sleep(0.5)


def _instead(answer: bytes) -> Lie:
    def lie(pieces: Iterator[bytes], draw: random.Random) -> Iterator[bytes]:
        next(pieces, None)
        yield answer

    return lie


def _endless(pieces: Iterator[bytes], draw: random.Random) -> Iterator[bytes]:
    next(pieces, None)
    yield b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    for _ in range(6000):
        yield b"100000\r\n" + b"1" * 2**20 + b"\r\n"


def _answer(status: str, body: bytes = b"", *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


LIES: dict[str, Lie] = {
    "flipped bits": _flipped,
    "cut answers": _cut,
    "stalled answers": _stalled,
    "pieces twice": _repeated,
    "a byte at a time": _dripping,
    "an endless answer": _endless,
    "not HTTP": _instead(b"SSH-2.0-x\r\n"),
    "nothing": _instead(b""),
    "nested JSON": _instead(_answer("200 OK", b"[" * 100_000)),
    "a false length": _instead(_answer("200 OK", b"{}", length=10**15)),
    "an endless head": _instead(b"HTTP/1.1 200 OK\r\n" + b"X-Header: 1\r\n" * 100_000),
    "a redirect to itself": _instead(_answer("302 Found", b"", "Location: /v1/datasets/d/manifest")),
    "an error with control characters": _instead(_answer("404 \x1b[31mX", b'{"error": "\x1b[2J gone"}')),
    "always busy": _instead(_answer("503 Service Unavailable")),
    "a bomb": _instead(_answer("200 OK", b"x" * 100, "Content-Encoding: gzip")),
}


class Liar:
    """A proxy: what clients say goes to the server unchanged.

    Args:
        port: the server's.
        lie: what is done to each connection's answers.
    """

    def __init__(self, port: int, lie: Lie, draw: random.Random):
        self.server, self.lie, self.seed = port, lie, draw.random()
        self.connections = 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.socket.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client, self.connections), daemon=True).start()

    def _serve(self, client: socket.socket, number: int) -> None:
        draw = random.Random(f"{self.seed} {number}")
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self.server)) as server:
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
            for piece in self.lie(iter(lambda: server.recv(4096), b""), draw):
                client.sendall(piece)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

"""Requests to the server of data sets as bytes over a socket: what no client sends can be sent too."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import xxhash

FILES = "/v1/datasets/data/files/"


def connect(port: int, sent: bytes = b"", buffer: int = 0) -> socket.socket:
    """A connection over which something was sent."""
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", port))
    connection.sendall(sent)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed a connection, or closes it within 20 s; reads what still comes."""
    try:
        while connection.recv(2**20):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def exchange(port: int, request: bytes) -> tuple[int, bytes]:
    """The status and body of the answer to a raw request."""
    with connect(port, request) as connection:
        raw = b""
        while b"\r\n\r\n" not in raw:
            raw += (piece := connection.recv(2**16))
            assert piece
        head, _, body = raw.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        size = int(length[1]) if length and not request.startswith(b"HEAD") else 0
        while len(body) < size:
            body += (piece := connection.recv(2**16))
            assert piece
    return int(head.split()[1]), body


def put(server: Any, name: str, data: bytes, **headers: object) -> tuple[int, Any]:
    """Upload by a raw request: the status, and the answer."""
    all_headers = {
        "Host": "x",
        "Authorization": "Bearer secret",
        "Connection": "close",
        "X-Checksum": xxhash.xxh3_128_hexdigest(data),
        "Content-Length": len(data),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = "".join(f"{key}: {value}\r\n" for key, value in all_headers.items() if value is not None)
    status, body = exchange(server.port, f"PUT {FILES}{name} HTTP/1.1\r\n{lines}\r\n".encode() + data)
    return status, json.loads(body) if body.startswith(b"{") else body

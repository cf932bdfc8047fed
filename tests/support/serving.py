"""A server of data sets for tests."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from clt_datasets.net.serve import listen
from clt_datasets.net.server import Server
from tests.support.commands import start


class Serving:
    """A server in a thread of its own."""

    def __init__(self, root: Path, token: str = "", port: int = 0, **settings: Any):
        self.root, self.token, self.port = root, token, port
        self.settings = {"max_upload": 10**7, **settings}
        self.start()

    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

        async def begin() -> Any:
            self.server = Server(self.root, self.token, **self.settings)
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


@contextmanager
def serving_process(*arguments: object, descriptors: int | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`serve` in a process of its own: its address, and the process; told to stop, it must end well.

    Args:
        descriptors: how many the process may open.
    """
    limits = {} if descriptors is None else {"NOFILE": descriptors}
    process = start("-m", "clt_plugins", "serve", *arguments, "--port", "0", stdout=subprocess.DEVNULL, limits=limits)
    assert process.stderr is not None
    try:
        yield process.stderr.readline().split(" at ")[-1].strip(), process
    finally:
        process.terminate()
        said = process.stderr.read()
        assert process.wait(timeout=60) == 0, said


class Fake:
    """A server that answers each connection as a function says, in a thread for each."""

    def __init__(self, answer: Callable[[socket.socket], None]):
        self.answer, self.connections = answer, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            connection, _ = self.socket.accept()
            self.connections += 1
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with suppress(OSError):  # the client is gone
            self.answer(connection)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody else trusts, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with openssl")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    return certificate, key

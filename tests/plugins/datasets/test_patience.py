"""The client waits no longer than its patience says, whatever the server does, and can be closed at any time."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clt_datasets.net.client import Client
from tests.support.serving import Fake, serving_process
from tests.support.stored_data import join, remote, write_numbered


class TestPatience:
    """Nothing is waited for longer than patience says; closing waits for nothing."""

    def test_a_server_that_stands_still(self, tmp_path: Path, monkeypatch: Any) -> None:
        """Its system still takes connections, and what is sent, until its buffers are full."""
        monkeypatch.setenv("CLT_TOKEN", "secret")
        (tmp_path / "root").mkdir()
        write_numbered(tmp_path / "root" / "data", [3000], d_model=64)
        (tmp_path / "train_00000.h5").write_bytes(b"0" * 3_000_000)
        with serving_process(tmp_path / "root") as (url, process):
            there = remote(url, patience_s=1.0)
            client = Client(url, "new", patience_s=1.0)
            there.next()
            process.send_signal(signal.SIGSTOP)
            try:
                begun = time.monotonic()
                with pytest.raises(OSError, match=r"data: no success in 1 s: "):
                    join([there.next() for _ in range(100)])
                with pytest.raises(OSError, match=r"new: no success in 1 s: "):
                    client.put(tmp_path / "train_00000.h5")
                there.close()
                client.close()
                assert time.monotonic() - begun < 20
            finally:
                process.send_signal(signal.SIGCONT)

    def test_a_server_that_takes_no_more_of_an_upload(self, tmp_path: Path) -> None:
        def answer(connection: socket.socket) -> None:
            """Say that nothing is there yet; then read no more."""
            connection.recv(10_000)
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 31\r\n\r\n"
                b'{"complete": false, "offset":0}'
            )
            time.sleep(60)

        # More than the system takes in buffers.
        (tmp_path / "train_00000.h5").touch()
        os.truncate(tmp_path / "train_00000.h5", 2**26)
        client = Client(Fake(answer).url, "new", patience_s=1.0)
        begun = time.monotonic()
        with pytest.raises(OSError, match=r"new: no success in 1 s: "):
            client.put(tmp_path / "train_00000.h5")
        client.close()
        assert time.monotonic() - begun < 20

    @pytest.mark.parametrize("what", ["file", "block", "pause"])
    def test_closing_ends_a_request_under_way(self, what: str) -> None:
        def answer(connection: socket.socket) -> None:
            """Nothing at all, or not even that."""
            if what == "pause":
                connection.close()
            else:
                time.sleep(60)

        server = Fake(answer)
        client = Client(server.url, "data", patience_s=600)
        found: list[BaseException] = []

        def work() -> None:
            try:
                if what == "file":
                    client.get("manifest")
                else:
                    client.fill("chunks/0/blocks/0", [np.empty(10, np.uint8)])
            except OSError as error:
                found.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        while server.connections < (5 if what == "pause" else 1):
            time.sleep(0.01)
        begun = time.monotonic()
        client.close()
        thread.join(10)
        assert time.monotonic() - begun < 0.5
        assert [str(error) for error in found] == [f"{server.url}/v1/datasets/data: closed"]
        with pytest.raises(OSError, match=r"closed$"):
            client.get("manifest")

    def test_bytes_that_came_before_are_no_progress(self) -> None:
        """A server that begins each answer and never ends one is not asked for ever."""

        def answer(connection: socket.socket) -> None:
            connection.recv(10_000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 100)
            connection.close()

        server = Fake(answer)
        client = Client(server.url, "data", patience_s=1.0)
        with pytest.raises(OSError, match=r"data: no success in 1 s: the connection broke off$"):
            client.fill("chunks/0/blocks/0", [np.empty(1000, np.uint8)])
        assert server.connections > 2
        client.close()

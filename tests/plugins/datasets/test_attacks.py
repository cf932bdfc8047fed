"""The server under attack, over loopback: clients that hold what it has, and requests without end."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from clt_datasets.net.limits import Limits
from clt_datasets.net.serve import LINES, Few
from tests.support.commands import start
from tests.support.raw_requests import connect, exchange, is_closed
from tests.support.serving import serving_process
from tests.support.stored_data import write_numbered

HALF = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Half: "
BLOCK = b"GET /v1/datasets/data/chunks/0/blocks/0 HTTP/1.1\r\nHost: x\r\n\r\n"


class TestConnections:
    def test_half_requests_keep_nobody_out(self, serving: Any, caplog: Any) -> None:
        server = serving(limits=Limits(connections=40, head_s=0.6))
        halves = [connect(server.port, HALF) for _ in range(300)]
        begun = time.monotonic()
        for _ in range(5):
            assert server.get("/healthz")[0] == 200
        assert time.monotonic() - begun < 5
        lines = dict(line.split() for line in server.get("/metrics")[1].decode().splitlines() if line[0] != "#")
        assert int(lines["clt_connections"]) <= 40
        assert int(lines["clt_refused_connections_total"]) > 40
        # Those that were not closed for others are closed when their time is over.
        for each in halves:
            assert is_closed(each)
            each.close()
        assert caplog.text == ""

    def test_a_process_with_few_descriptors_answers_and_logs_little(self, tmp_path: Path) -> None:
        with serving_process(tmp_path, descriptors=128) as (url, process):
            port = int(url.rsplit(":", 1)[1])
            halves = [connect(port, HALF) for _ in range(300)]
            begun = time.monotonic()
            assert exchange(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")[0] == 200
            assert time.monotonic() - begun < 3
            process.terminate()
            assert process.stderr is not None
            assert len(process.stderr.read()) < 1000
            assert process.wait(30) == 0
            for each in halves:
                each.close()

    def test_a_head_that_drips_and_a_connection_without_a_request_end(self, serving: Any) -> None:
        server = serving(limits=Limits(head_s=0.5, idle_s=0.5))
        silent, dripping = connect(server.port), connect(server.port, HALF)
        kept = connect(server.port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert kept.recv(1000).startswith(b"HTTP/1.1 200")
        begun = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - begun < 10:
                dripping.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - begun < 3
        assert is_closed(silent)
        assert is_closed(kept)
        for each in (silent, dripping, kept):
            each.close()

    def test_more_connections_than_allowed_get_a_503_if_none_can_be_closed(self, serving: Any, tmp_path: Path) -> None:
        """All connections have a request that is being answered."""
        write_numbered(tmp_path / "root" / "data", [64], block_rows=64, d_model=32_000)
        server = serving(limits=Limits(connections=8, bodies=1, body_stalled_s=60))
        # One of them is sent its block, three wait for it to end; others are refused, and wait for their next request.
        readers = [connect(server.port, BLOCK, buffer=4096) for _ in range(4)]
        time.sleep(0.3)
        status, body = exchange(server.port, BLOCK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert (status, json.loads(body)) == (503, {"error": "the server is busy", "again": True})
        assert server.get("/healthz")[0] == 200
        for each in readers:
            each.close()


class TestReaders:
    @pytest.fixture
    def served(self, serving: Any, tmp_path: Path) -> Any:
        """Starts servers of one block of 33 MB: more than the system takes in buffers."""
        write_numbered(tmp_path / "root" / "data", [64], block_rows=64, d_model=32_000)
        return serving

    def test_stalled_readers_do_not_block_the_next(self, served: Any) -> None:
        server = served(limits=Limits(bodies=2, body_stalled_s=0.4))
        stalled = [connect(server.port, BLOCK, buffer=4096) for _ in range(4)]
        time.sleep(0.2)
        begun = time.monotonic()
        status, body = server.get("/v1/datasets/data/chunks/0/blocks/0")
        assert (status, len(body)) == (200, 64 * (2 * 2 * 32_000 * 4 + 20))
        assert time.monotonic() - begun < 5
        for each in stalled:
            each.close()

    def test_a_reader_that_drips_does_not_block_the_next(self, served: Any) -> None:
        server = served(limits=Limits(bodies=1, body_s=0.5))
        ended = threading.Event()

        def drip() -> None:
            with connect(server.port, BLOCK, buffer=2**16) as connection:
                while connection.recv(2**15):
                    time.sleep(0.005)
                ended.set()

        thread = threading.Thread(target=drip)
        thread.start()
        time.sleep(0.2)
        begun = time.monotonic()
        assert server.get("/v1/datasets/data/chunks/0/blocks/0")[0] == 200
        assert time.monotonic() - begun < 4
        thread.join(20)
        # It got its part, so that it can ask for the rest.
        assert ended.is_set()

    def test_a_reader_that_accepts_nothing_is_dropped(self, served: Any) -> None:
        server = served(limits=Limits(stalled_s=0.5))
        with connect(server.port, BLOCK, buffer=4096) as connection:
            time.sleep(1.2)
            assert is_closed(connection)


class TestRequests:
    def test_ranges_conditions_and_heads(self, serving: Any, tmp_path: Path) -> None:
        write_numbered(tmp_path / "root" / "data", [30])
        server = serving()
        path = "/v1/datasets/data/chunks/0/blocks/8"
        whole = server.get(path)[1]
        assert server.get(path, Range="bytes=5-") == (206, whole[5:])
        assert server.get(path, Range="bytes=0-") == (206, whole)
        for other in ("bytes=5-9", "bytes=-5", f"bytes={len(whole)}-", "bytes=" + "0-1," * 1000, "rows=1-", "bytes=a-"):
            assert server.get(path, Range=other)[0] == 416
        # Nothing is known of what the client has.
        raw = f'GET {path} HTTP/1.1\r\nHost: x\r\nRange: bytes=5-\r\nIf-Range: "x"\r\nConnection: close\r\n\r\n'
        assert exchange(server.port, raw.encode()) == (200, whole)
        raw = f"GET {path} HTTP/1.1\r\nHost: x\r\nIf-None-Match: *\r\nConnection: close\r\n\r\n"
        assert exchange(server.port, raw.encode()) == (200, whole)
        for each in (path, "/v1/datasets", "/v1/datasets/data/manifest", "/healthz"):
            head = f"HEAD {each} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            assert exchange(server.port, head.encode()) == (200, b"")

    def test_headers_without_end_are_refused(self, serving: Any) -> None:
        server = serving()
        for lines in (b"X: " + b"x" * 10**5, b"X: x\r\n" * 1000):
            head = b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n\r\n"
            with connect(server.port) as connection:
                try:
                    connection.sendall(head)
                    answer = connection.recv(1000)
                except OSError:
                    answer = b""
            assert not answer or answer.split()[1] == b"400"
        assert server.get("/healthz")[0] == 200

    def test_the_log_is_bounded(self) -> None:
        few = Few()
        records = [logging.LogRecord("x", logging.ERROR, "", 0, "broken", None, None) for _ in range(10_000)]
        assert sum(map(few.filter, records)) == LINES


HANGS = """
import pathlib, sys, time
from clt_datasets.net import serve
from clt_datasets.net.downloads import Downloads
serve.GRACE_S, serve.END_S = 0.3, 1.0
listen = serve.listen
serve.listen = lambda *arguments: listen(*arguments, grace_s=0.3)
Downloads._names = lambda self: time.sleep(1000)
serve.serve(pathlib.Path(sys.argv[1]), "127.0.0.1", 0)
"""


@pytest.mark.parametrize("again", [False, True])
def test_a_read_that_hangs_does_not_keep_the_server_from_ending(tmp_path: Path, again: bool) -> None:
    """After its time, or at once when it is told again."""
    process = start("-c", HANGS, tmp_path)
    assert process.stderr is not None
    port = int(process.stderr.readline().rsplit(":", 1)[1])
    with connect(port, b"GET /v1/datasets HTTP/1.1\r\nHost: x\r\n\r\n"):
        assert exchange(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")[0] == 200
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        if again:
            assert process.stderr.readline() == "stopping: requests under way are finished\n"
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1
    assert time.monotonic() - begun < (1 if again else 4)
    assert process.stderr.readlines()[-1].startswith("stopped ")

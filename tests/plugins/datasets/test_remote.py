"""Server and client: the rows are those of `local`, whatever breaks."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from clt_datasets import RemoteConfig, clt_sources
from clt_datasets.format.files import file_digest
from clt_datasets.net.client import Client
from clt_datasets.net.serve import serve
from clt_plugins import DamagedError
from tests.support.serving import Fake, make_certificate, serving_process
from tests.support.stored_data import equal, generated, join, local, make_context, write_numbered


def remote(server: Any, dataset: str = "data", context: Any = None, **config: Any) -> Any:
    """The source, built as for a recipe; from a server or its address."""
    spec = next(spec for spec in clt_sources() if spec.name == "remote")
    settings = {"buffer_tokens": 64, "patience_s": 60.0} | config
    return spec.build(
        RemoteConfig(url=getattr(server, "url", server), dataset=dataset, **settings), context or make_context()
    )


@pytest.mark.parametrize("dtype", ["source", "bfloat16", "int8"])
def test_remote_is_local(serving: Any, tmp_path: Path, dtype: str) -> None:
    generated(tmp_path / "root" / "data", dtype=dtype, block_rows=8, chunk_bytes=8_000)
    server = serving()
    here, there = local(tmp_path / "root" / "data"), remote(server)
    for _ in range(30):
        assert equal(here.next(), there.next())
    assert equal(join(list(here.held_out(64))), join(list(there.held_out(64))))
    for name, value in here.statistics().items():
        assert torch.equal(value, there.statistics()[name])
    there.close()


def test_training_survives_restarts_without_losing_or_repeating_a_row(serving: Any, tmp_path: Path) -> None:
    write_numbered(tmp_path / "root" / "data", [37, 8, 64, 1, 19, 5, 16])
    server = serving()
    here, there = local(tmp_path / "root" / "data"), remote(server)
    restart = threading.Timer(0, int)
    restart.start()
    for number in range(60):
        if number % 15 == 5:
            restart.join()
            server.stop()
            restart = threading.Timer(0.3, server.start)
            restart.start()
        assert equal(here.next(), there.next())
    restart.join()
    there.close()


class Flaky:
    """A proxy that lets through so many bytes of each connection, and then cuts it."""

    def __init__(self, port: int, lets_through: int):
        self.target, self.lets_through, self.cuts = port, lets_through, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            client, _ = self.socket.accept()
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        upstream = socket.create_connection(("127.0.0.1", self.target))
        threading.Thread(target=self.pump, args=(client, upstream, 10**9), daemon=True).start()
        self.pump(upstream, client, self.lets_through)
        self.cuts += 1
        for each in (client, upstream):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def pump(self, source: socket.socket, target: socket.socket, left: int) -> None:
        try:
            while left > 0 and (data := source.recv(min(1000, left))):
                target.sendall(data)
                left -= len(data)
        except OSError:
            return


def test_broken_transfers_go_on_where_they_broke_off(serving: Any, tmp_path: Path) -> None:
    """Every connection is cut after 4,000 bytes; a block has 12,000."""
    write_numbered(tmp_path / "root" / "data", [500, 30], block_rows=200)
    server = serving()
    proxy = Flaky(server.port, 4000)
    here = local(tmp_path / "root" / "data", buffer_tokens=128)
    there = remote(proxy, buffer_tokens=128)
    for _ in range(40):  # 640 rows: more than an epoch
        assert equal(here.next(), there.next())
    assert proxy.cuts > 10
    there.close()


def test_damage_on_the_server_is_named(serving: Any, tmp_path: Path) -> None:
    write_numbered(tmp_path / "root" / "data", [64, 64], d_model=64)
    server = serving()
    path = tmp_path / "root" / "data" / "train_00001.h5"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 4] ^= 1
    path.write_bytes(raw)
    there = remote(server)
    with pytest.raises(DamagedError, match=r"train_00001\.h5: chunk 1, rows \d+ to \d+: damaged"):
        join([there.next() for _ in range(8)])
    there.close()


def test_two_hundred_clients_at_a_time(serving: Any, tmp_path: Path) -> None:
    """Every one gets every byte; and there are never more blocks in memory than allowed."""
    write_numbered(tmp_path / "root" / "data", [400], block_rows=100, d_model=400)
    server = serving()
    wanted = xxhash.xxh3_64_intdigest(server.get("/v1/datasets/data/chunks/0/blocks/100")[1])

    async def clients() -> list[int]:
        import aiohttp

        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def one() -> int:
                errors = 0
                for _ in range(2):
                    async with session.get(f"{server.url}/v1/datasets/data/chunks/0/blocks/100") as answer:
                        errors += answer.status != 200 or xxhash.xxh3_64_intdigest(await answer.read()) != wanted
                return errors

            return await asyncio.gather(*[one() for _ in range(200)])

    before = _resident()
    assert asyncio.run(clients()) == [0] * 200
    # 16 blocks of 0.64 MB, and what 400 connections of each side take; both sides are this process.
    assert _resident() - before < 300e6


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def metric(server: Any, name: str) -> int:
    lines = server.get("/metrics", Authorization=f"Bearer {server.token}")[1].decode().splitlines()
    return sum(int(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def received(server: Any) -> int:
    return metric(server, "clt_received_bytes_total")


class TestUpload:
    def test_a_data_set_generated_there_is_the_same(self, serving: Any, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv("CLT_TOKEN", "secret")
        server = serving(token="secret")
        client = Client(server.url, "data", patience_s=20)
        generated(tmp_path / "data", chunk_bytes=8_000, written=client.put)
        client.close()
        names = sorted(p.name for p in (tmp_path / "data").iterdir() if not p.name.startswith("."))
        assert len(names) > 4
        assert sorted(p.name for p in (tmp_path / "root" / "data").iterdir()) == names
        for name in names:
            assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "root" / "data" / name).read_bytes()
        there = remote(server)
        assert equal(local(tmp_path / "data").next(), there.next())
        there.close()

    def test_an_upload_goes_on_where_it_broke_off(self, serving: Any, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv("CLT_TOKEN", "secret")
        server = serving(token="secret")
        write_numbered(tmp_path / "data", [300], d_model=64)
        path = tmp_path / "data" / "train_00000.h5"
        whole = path.read_bytes()
        checksum = xxhash.xxh3_128_hexdigest(whole)
        head = (
            f"PUT /v1/datasets/data/files/{path.name} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
            f"X-Checksum: {checksum}\r\nContent-Length: {len(whole)}\r\n\r\n"
        )
        client = Client(server.url, "data", patience_s=20)
        upload = threading.Thread(target=client.put, args=(path,))
        with socket.create_connection(("127.0.0.1", server.port)) as half:
            half.sendall(head.encode() + whole[:50_000])
            while received(server) == 0:
                time.sleep(0.01)
            # The server still waits for the rest from here, and answers 409 to the client.
            upload.start()
            while not metric(server, 'clt_requests_total{method="GET",status="409"}'):
                time.sleep(0.01)
        upload.join(30)
        client.close()
        assert received(server) == len(whole)
        assert (tmp_path / "root" / "data" / path.name).read_bytes() == whole

    def test_a_conflict_that_will_pass_is_tried_again_and_another_is_final(self, tmp_path: Path) -> None:
        """Another upload may begin between the client's question and its upload."""
        (tmp_path / "train_00000.h5").write_bytes(b"rows")
        questions: list[int] = []

        def answer(connection: socket.socket) -> None:
            while request := connection.recv(10_000):
                if request.startswith(b"GET"):
                    questions.append(1)
                    complete = b"true" if len(questions) > 2 else b"false"
                    status, body = b"200 OK", b'{"complete": ' + complete + b', "offset": 0}'
                elif request.startswith(b"PUT"):
                    while not request.endswith(b"rows"):
                        request += connection.recv(10_000)
                    status, body = b"409 Conflict", conflict
                connection.sendall(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

        conflict = b'{"error": "another upload of this file is under way", "again": true}'
        client = Client(Fake(answer).url, "new", patience_s=20)
        client.put(tmp_path / "train_00000.h5")
        assert len(questions) == 3
        questions.clear()
        conflict = b'{"error": "the data set is complete"}'
        with pytest.raises(ValueError, match=r"new: 409 the data set is complete$"):
            client.put(tmp_path / "train_00000.h5")
        assert len(questions) == 1
        client.close()

    def test_a_manifest_waits_for_its_chunks_and_nothing_is_changed_after_it(
        self, serving: Any, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.setenv("CLT_TOKEN", "secret")
        server = serving(token="secret")
        write_numbered(tmp_path / "data", [30])
        write_numbered(tmp_path / "other", [31])
        client = Client(server.url, "data", patience_s=0.3)
        with pytest.raises(OSError, match="another process still uploads it"):
            client.put(tmp_path / "data" / "manifest.json")
        for name in ("train_00000.h5", "held_out_00000.h5", "statistics.safetensors", "manifest.json"):
            client.put(tmp_path / "data" / name)
            client.put(tmp_path / "data" / name)
        with pytest.raises(ValueError, match="409 the data set is complete"):
            client.put(tmp_path / "other" / "train_00000.h5")
        client.close()

    def test_what_is_no_chunk_is_refused(self, serving: Any, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv("CLT_TOKEN", "secret")
        server = serving(token="secret")
        (tmp_path / "train_00000.h5").write_bytes(os.urandom(5000))
        client = Client(server.url, "data", patience_s=5)
        with pytest.raises(DamagedError, match="truncated or damaged, or not HDF5"):
            client.put(tmp_path / "train_00000.h5")
        client.close()
        assert not any((tmp_path / "root").iterdir())

    def test_a_file_that_cannot_be_read_here_is_no_fault_of_the_server(
        self, serving: Any, tmp_path: Path, monkeypatch: Any
    ) -> None:
        """It is told by its name, and at once: not after the ten minutes for which a server is waited for."""
        monkeypatch.setenv("CLT_TOKEN", "secret")
        server = serving(token="secret")
        write_numbered(tmp_path / "data", [30])
        file = tmp_path / "data" / "train_00000.h5"
        checksum, opened = file_digest(file), Path.open

        class Failing(io.BytesIO):
            def read(self, *_: Any) -> bytes:
                raise OSError(5, "Input/output error")

        def open_(path: Path, *arguments: Any) -> Any:
            return Failing() if path == file else opened(path, *arguments)

        monkeypatch.setattr(Path, "open", open_)
        client = Client(server.url, "data", patience_s=600)
        with pytest.raises(OSError, match=r"train_00000\.h5: could not be read: Input/output error"):
            client.put(file, checksum)
        client.close()


class TestTokens:
    def test_reading_is_free_without_one_and_writing_is_not(self, serving: Any, tmp_path: Path) -> None:
        write_numbered(tmp_path / "root" / "data", [30])
        server = serving()
        assert server.get("/v1/datasets/data/manifest")[0] == 200
        client = Client(server.url, "new", patience_s=5)
        with pytest.raises(ValueError, match="started without a token"):
            client.put(tmp_path / "root" / "data" / "train_00000.h5")
        client.close()

    def test_with_one_everything_but_health_wants_it(self, serving: Any, tmp_path: Path, monkeypatch: Any) -> None:
        write_numbered(tmp_path / "root" / "data", [30])
        server = serving(token="secret")
        assert server.get("/healthz") == (200, b'{"status": "ok"}')
        for path in ("/metrics", "/v1/datasets", "/v1/datasets/data/manifest", "/v1/datasets/data/chunks/0/blocks/0"):
            assert server.get(path)[0] == 401
            assert server.get(path, Authorization="Bearer wrong")[0] == 401
            assert server.get(path, Authorization="Bearer secret")[0] == 200
        with pytest.raises(ValueError, match="give the server's token in CLT_TOKEN"):
            remote(server)
        monkeypatch.setenv("CLT_TOKEN", "secret")
        there = remote(server)
        assert there.next().tokens == 16
        there.close()

    def test_nobody_listens_to_others_without_one(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^--host: others can reach 0\.0\.0\.0: set a token in CLT_TOKEN"):
            serve(tmp_path, "0.0.0.0", 0)


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


def test_blocks_come_over_tls(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    (tmp_path / "root").mkdir()
    write_numbered(tmp_path / "root" / "data", [500], d_model=64)
    with serving_process(tmp_path / "root", "--certificate", certificate, "--key", key) as (url, _):
        here, there = local(tmp_path / "root" / "data"), remote(url, ca_file=certificate)
        assert url.startswith("https://")
        for _ in range(20):
            assert equal(here.next(), there.next())
        there.close()
        with pytest.raises(
            ValueError, match="the server's certificate is not trusted: self-signed certificate: if you"
        ):
            remote(url)


def test_one_damaged_data_set_leaves_the_others(serving: Any, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_numbered(tmp_path / "root" / name, [30])
    (tmp_path / "root" / "b" / "manifest.json").write_text("{")
    server = serving()
    status, body = server.get("/v1/datasets")
    found = json.loads(body)
    assert status == 200
    assert [each["name"] for each in found] == ["a", "b", "c"]
    assert found[1]["damaged"].startswith("b/manifest.json: not the manifest of a data set: ")
    assert found[0]["tokens"] == found[2]["tokens"] == {"train": 30, "held_out": 10}
    assert server.get("/v1/datasets/b/manifest")[0] == 422
    with pytest.raises(DamagedError, match=r"b/manifest\.json"):
        remote(server, "b")


def test_metrics_count_what_happened(serving: Any, tmp_path: Path) -> None:
    write_numbered(tmp_path / "root" / "data", [30])
    server = serving()
    size = len(server.get("/v1/datasets/data/chunks/0/blocks/8")[1])
    server.get("/nothing")
    lines = server.get("/metrics")[1].decode().splitlines()
    assert 'clt_requests_total{method="GET",status="200"} 1' in lines
    assert 'clt_requests_total{method="GET",status="404"} 1' in lines
    assert f"clt_sent_bytes_total {size}" in lines
    assert json.loads(server.get("/v1/datasets")[1]) == [
        {"name": "data", "tokens": {"train": 30, "held_out": 10}, "dtype": "float32"}
    ]


class TestBadInput:
    def test_no_address(self) -> None:
        spec = next(spec for spec in clt_sources() if spec.name == "remote")
        with pytest.raises(
            ValueError, match=r"^source\.url: expected http://HOST:PORT or https://\.\.\., got 'lab:80'$"
        ):
            spec.build(RemoteConfig(url="lab:80", dataset="data"), make_context())
        with pytest.raises(ValueError, match=r"^source\.dataset: not the name of a data set: '\.\./x'; use"):
            spec.build(RemoteConfig(url="http://lab:80", dataset="../x"), make_context())

    def test_no_data_set_and_no_server(self, serving: Any) -> None:
        server = serving()
        with pytest.raises(ValueError, match=r"/v1/datasets/nothing: 404 no such data set$"):
            remote(server, "nothing")
        server.stop()
        with pytest.raises(OSError, match=r"no success in 0\.2 s: "):
            remote(server, patience_s=0.2)

"""Server and client: the rows are those of `local`, whatever breaks."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from clt_datasets import RemoteConfig, clt_sources
from clt_datasets.net.bodies import Bodies
from clt_datasets.net.client import Client
from clt_datasets.net.serve import serve
from clt_plugins import DamagedError
from tests.support.serving import make_certificate, serving_process
from tests.support.stored_data import equal, generated, join, local, make_context, remote, write_numbered


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


def test_two_hundred_clients_at_a_time(serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    held: list[int] = []
    real = Bodies.send
    monkeypatch.setattr(
        Bodies, "send", lambda self, *args, **named: held.append(len(self._held)) or real(self, *args, **named)
    )
    assert asyncio.run(clients()) == [0] * 200
    assert len(held) >= 400 and 1 < max(held) <= 16, "of 0.64 MB each; the server is a thread of this process"


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

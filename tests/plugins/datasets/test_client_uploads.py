"""Uploads as the client sends them: they arrive byte for byte, go on where they broke off, and are refused by name."""

from __future__ import annotations

import io
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import xxhash
from click.testing import CliRunner

from clt_datasets.format.files import file_digest
from clt_datasets.net.client import Client
from clt_plugins import DamagedError
from clt_plugins.cli.main import main_group
from clt_plugins.recipe.read import as_toml
from tests.support.helpers import recipe
from tests.support.serving import Fake
from tests.support.stored_data import equal, generated, local, remote, write_numbered


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

    def test_blocks_that_no_server_sends_are_refused_before_the_first_chunk_and_by_the_server(
        self, serving: Any, tmp_path: Path, monkeypatch: Any
    ) -> None:
        """The whole data set was uploaded and accepted, and then no client could read it."""
        monkeypatch.setenv("CLT_TOKEN", "secret")
        monkeypatch.setattr("clt_datasets.net.limits.LARGEST_BLOCK", 1000)
        monkeypatch.setattr("clt_datasets.net.uploads.LARGEST_BLOCK", 1000)
        server = serving(token="secret")
        file = tmp_path / "recipe.toml"
        file.write_text(as_toml(recipe()))
        arguments = ["generate", str(file), "--out", str(tmp_path / "data"), "--block-rows", "16"]
        done = CliRunner().invoke(main_group, [*arguments, "--to", server.url])
        assert done.exit_code == 2 and "--block-rows: a block may have 1,000 bytes, which are " in done.stderr
        assert not list((tmp_path / "root").rglob("*.h5"))
        generated(tmp_path / "made", block_rows=16)  # elsewhere it may be larger
        for unfinished in (False, True):
            if unfinished:
                (tmp_path / "made/manifest.json").rename(tmp_path / "manifest.json")
            made = ["--out", str(tmp_path / "made"), "--block-rows", "16"]
            done = CliRunner().invoke(main_group, [*arguments[:2], *made, "--to", server.url])
            assert done.exit_code == 2 and "into another folder" in done.stderr, done.stderr
            assert not list((tmp_path / "root").rglob("*.h5"))
        (tmp_path / "manifest.json").rename(tmp_path / "made/manifest.json")
        client = Client(server.url, "made", patience_s=20)
        for path in sorted((tmp_path / "made").glob("[!.]*")):
            if path.name != "manifest.json":
                client.put(path)
        with pytest.raises(DamagedError, match=r"more than the 1,000 that are served: .* --block-rows \d+ or fewer"):
            client.put(tmp_path / "made/manifest.json")
        client.close()

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

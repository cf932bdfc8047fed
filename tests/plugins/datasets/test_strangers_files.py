"""Files and paths of strangers: none makes the server read, write or wait for what is outside its root."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import h5py
import pytest
import xxhash

from tests.support.peak import peak
from tests.support.raw_requests import exchange, put
from tests.support.stored_data import write_numbered


@pytest.mark.usefixtures("token")
class TestStrangersFiles:
    def test_a_chunk_that_leads_out_of_itself_is_refused_and_blocks_nobody(
        self, serving: Any, tmp_path: Path, chunk: bytes
    ) -> None:
        server = serving(token="secret")
        (tmp_path / "secret.txt").write_bytes(b"\0" * 16)
        os.mkfifo(tmp_path / "fifo")

        def edited(kind: str) -> bytes:
            path = tmp_path / "edited.h5"
            path.write_bytes(chunk)
            with h5py.File(path, "r+") as file:
                scales = file["scales"][()]
                del file["scales"]
                if kind == "link":
                    file["scales"] = h5py.ExternalLink(str(tmp_path / "small" / "train_00000.h5"), "scales")
                elif kind == "virtual":
                    layout = h5py.VirtualLayout(scales.shape, scales.dtype)
                    layout[:] = h5py.VirtualSource(str(tmp_path / "small" / "train_00000.h5"), "scales", scales.shape)
                    file.create_virtual_dataset("scales", layout)
                else:
                    outside = [(str(tmp_path / kind), 0, scales.nbytes)]
                    file.create_dataset("scales", scales.shape, scales.dtype, external=outside)
            return path.read_bytes()

        begun = time.monotonic()
        for kind in ("link", "virtual", "secret.txt", *["fifo"] * 9):
            status, answer = put(server, "train_00000.h5", edited(kind))
            assert (status, "other files" in answer["error"] or "out of the file" in answer["error"]) == (422, True)
        assert server.get("/v1/datasets", Authorization="Bearer secret") == (200, b"[]")
        assert time.monotonic() - begun < 3
        assert list((tmp_path / "root").iterdir()) == []

    def test_a_chunk_that_claims_gigabytes_is_refused_and_takes_no_memory(
        self, serving: Any, tmp_path: Path, chunk: bytes
    ) -> None:
        server = serving(token="secret")
        path = tmp_path / "edited.h5"
        path.write_bytes(chunk)
        with h5py.File(path, "r+") as file:
            del file["checksums"]
            file.create_dataset("checksums", shape=(2**28,), dtype="u8", chunks=(2**20,), compression="gzip")
        with peak() as grown:
            status, answer = put(server, "train_00000.h5", path.read_bytes())
            # It claims 2 GiB; the server is this process.
            assert grown() < 200e6
        assert (status, "checksums" in answer["error"]) == (422, True), answer
        assert list((tmp_path / "root").iterdir()) == []

    def test_links_and_fifos_below_the_root_are_not_served(self, serving: Any, tmp_path: Path) -> None:
        root = tmp_path / "root"
        write_numbered(tmp_path / "outside", [30])
        server = serving()
        (root / "linked").symlink_to(tmp_path / "outside")
        for name in ("manifest", "statistics", "chunk", "fifo", "device"):
            write_numbered(root / name, [30])
        replaced = {
            "manifest": "manifest.json",
            "statistics": "statistics.safetensors",
            "chunk": "train_00000.h5",
            "fifo": "manifest.json",
            "device": "manifest.json",
        }
        for name, file in replaced.items():
            (root / name / file).unlink()
            (root / name / file).symlink_to("/dev/zero" if name == "device" else tmp_path / "outside" / file)
        (root / "fifo" / "manifest.json").unlink()
        os.mkfifo(root / "fifo" / "manifest.json")
        begun = time.monotonic()
        for path in (
            "linked/manifest",
            "linked/chunks/0/blocks/0",
            "manifest/manifest",
            "statistics/statistics",
            "chunk/chunks/0/summary",
            "chunk/chunks/0/blocks/0",
            "fifo/manifest",
            "device/manifest",
        ):
            assert server.get(f"/v1/datasets/{path}")[0] == 404
        names = [each["name"] for each in json.loads(server.get("/v1/datasets")[1])]
        assert names == ["chunk", "statistics"]
        assert time.monotonic() - begun < 3

    def test_uploads_do_not_write_through_links(self, serving: Any, tmp_path: Path, chunk: bytes) -> None:
        server = serving(token="secret")
        outside = tmp_path / "outside"
        outside.mkdir()
        (tmp_path / "root" / "data").mkdir()
        checksum = xxhash.xxh3_128_hexdigest(chunk)
        (tmp_path / "root" / "data" / f".train_00000.h5.{checksum}.upload").symlink_to(outside / "file")
        assert put(server, "train_00000.h5", chunk)[0] == 409
        (tmp_path / "root" / "data" / f".train_00000.h5.{checksum}.upload").unlink()
        (tmp_path / "root" / "data").rmdir()
        (tmp_path / "root" / "data").symlink_to(outside)
        assert put(server, "train_00000.h5", chunk)[0] == 404
        assert list(outside.iterdir()) == []

    def test_no_spelling_of_a_path_leaves_the_root(self, serving: Any, tmp_path: Path) -> None:
        write_numbered(tmp_path / "outside", [30])
        server = serving(token="secret")
        ups = ["..", "%2e%2e", "%2e.", ".%2E", "%252e%252e", "..%2f..", "..%5c", "%c0%ae%c0%ae", "data%00", "", "."]
        for up in ups:
            for path in (f"{up}/outside", f"{up}%2foutside", f"data/{up}/outside", f"{up}/{up}/outside"):
                for rest in ("manifest", "files/manifest.json?checksum=" + "0" * 32, "chunks/0/summary"):
                    head = f"GET /v1/datasets/{path}/{rest} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
                    status, body = exchange(server.port, f"{head}Connection: close\r\n\r\n".encode())
                    assert 400 <= status < 500, path
                    assert b"checksum" not in body.replace(b"checksum: needs", b"")
        assert list((tmp_path / "root").iterdir()) == []

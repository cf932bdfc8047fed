"""Uploads as the server takes them: on the disk before they are acknowledged, limited, and deleted if unfinished."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import xxhash

from clt_datasets.net import storage
from clt_datasets.net.client import Client
from clt_datasets.net.limits import Limits
from clt_datasets.net.retry import Full
from tests.support.raw_requests import FILES, connect, put
from tests.support.stored_data import write_numbered


def abandon(server: Any, name: str, data: bytes, checksum: str) -> None:
    """Begin an upload, and leave after its first bytes; if it was accepted, wait until the server has noticed."""
    uploads = server.server.uploads
    before = uploads.received
    head = (
        f"PUT {FILES}{name} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
        f"X-Checksum: {checksum}\r\nContent-Length: {len(data) + 10}\r\n\r\n"
    )
    connection = connect(server.port, head.encode() + data)
    while uploads.received == before:
        time.sleep(0.005)
    connection.close()
    while uploads.busy:
        time.sleep(0.005)


@pytest.mark.usefixtures("token")
class TestUploads:
    def test_an_upload_is_on_the_disk_before_it_is_acknowledged(
        self, serving: Any, tmp_path: Path, monkeypatch: Any
    ) -> None:
        write_numbered(tmp_path / "data", [30])
        server = serving(token="secret")
        events: list[tuple[str, str]] = []
        fsync, rename = os.fsync, Path.replace

        def name(path: object) -> str:
            return str(Path(str(path)).relative_to(tmp_path / "root")).partition(".upload")[0]

        def record_fsync(handle: int) -> None:
            events.append(("sync", name(Path(f"/proc/self/fd/{handle}").readlink())))
            fsync(handle)

        def record_rename(path: Path, target: Path) -> Path:
            events.append(("rename", name(target)))
            return rename(path, target)

        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(Path, "replace", record_rename)
        client = Client(server.url, "data", patience_s=10)
        client.put(tmp_path / "data" / "train_00000.h5")
        acknowledged = list(events)
        client.close()
        partial = f"data/.train_00000.h5.{xxhash.xxh3_128_hexdigest((tmp_path / 'data/train_00000.h5').read_bytes())}"
        assert acknowledged == [
            ("sync", "."),  # the data set's new folder
            ("sync", partial),
            ("rename", "data/train_00000.h5"),
            ("sync", "data"),
        ]

    def test_an_upload_that_cannot_be_synced_is_not_acknowledged(
        self, serving: Any, tmp_path: Path, monkeypatch: Any, chunk: bytes, caplog: Any
    ) -> None:
        server = serving(token="secret")
        sync = storage.sync

        def broken(path: Path) -> None:
            if path.name.endswith(".upload"):
                raise OSError(5, "Input/output error")
            sync(path)

        monkeypatch.setattr(storage, "sync", broken)
        status, answer = put(server, "train_00000.h5", chunk)
        assert (status, answer) == (500, {"error": "the server cannot read or write: Input/output error"})
        # What the system could not write may be gone from its memory: it has to come again.
        assert list((tmp_path / "root").iterdir()) == []
        monkeypatch.undo()
        assert put(server, "train_00000.h5", chunk)[0] == 201
        assert "Traceback" not in caplog.text

    def test_an_upload_is_not_thrown_away_for_want_of_descriptors(
        self, serving: Any, monkeypatch: Any, chunk: bytes
    ) -> None:
        """Nor the rows of a chunk called damaged: the same request succeeds later."""
        server = serving(token="secret")
        opened = os.open

        def none_left(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if str(path).endswith((".upload", ".h5")) and not flags & os.O_WRONLY:
                raise OSError(24, "Too many open files", str(path))
            return opened(path, flags, *arguments, **options)

        monkeypatch.setattr(os, "open", none_left)
        status, answer = put(server, "train_00000.h5", chunk)
        assert (status, answer) == (500, {"error": "the server cannot read or write: Too many open files"})
        monkeypatch.setattr(os, "open", opened)
        checksum = xxhash.xxh3_128_hexdigest(chunk)
        assert put(server, "train_00000.h5", b"", X_Checksum=checksum, Upload_Offset=len(chunk))[0] == 201

    def test_a_quota_refuses_what_exceeds_it_and_says_so_at_once(self, serving: Any, tmp_path: Path) -> None:
        write_numbered(tmp_path / "data", [300, 300])
        size = (tmp_path / "data" / "train_00000.h5").stat().st_size
        server = serving(token="secret", quota=int(size * 1.5))
        client = Client(server.url, "data", patience_s=600)
        client.put(tmp_path / "data" / "train_00000.h5")
        begun = time.monotonic()
        with pytest.raises(Full, match=r"data: 507 the server's quota of 0 MB is used up: make room on the server"):
            client.put(tmp_path / "data" / "train_00001.h5")
        assert time.monotonic() - begun < 2
        client.close()
        assert put(server, "train_00001.h5", (tmp_path / "data" / "train_00001.h5").read_bytes())[0] == 507
        assert [path.name for path in (tmp_path / "root" / "data").iterdir()] == ["train_00000.h5"]

    def test_many_small_files_use_up_a_quota_too(self, serving: Any) -> None:
        server = serving(token="secret", quota=10 * 4096)
        for number in range(10):
            abandon(server, f"train_{number:05}.h5", b"x", "0" * 32)
        assert put(server, "train_00010.h5", b"x")[0] == 507

    def test_a_full_disk_is_told_without_a_trace(
        self, serving: Any, tmp_path: Path, monkeypatch: Any, chunk: bytes, caplog: Any
    ) -> None:
        server = serving(token="secret")

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(storage.os, "write", full)
        assert put(server, "train_00000.h5", chunk) == (507, {"error": "the server's disk is full"})
        assert list((tmp_path / "root").iterdir()) == []
        assert caplog.messages == ["upload refused: the server's disk is full"]

    def test_the_end_of_the_disk_is_kept_free(self, serving: Any, monkeypatch: Any, chunk: bytes) -> None:
        server = serving(token="secret")
        monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: storage.shutil._ntuple_diskusage(10**6, 0, 50_100))
        assert put(server, "train_00000.h5", chunk)[0] == 507

    def test_a_body_that_drips_ends_and_continues_later(self, serving: Any, chunk: bytes) -> None:
        server = serving(token="secret", limits=Limits(stalled_s=0.5, uploads=1))
        checksum = xxhash.xxh3_128_hexdigest(chunk)
        head = (
            f"PUT {FILES}train_00000.h5 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
            f"X-Checksum: {checksum}\r\nContent-Length: {len(chunk)}\r\n\r\n"
        )
        with connect(server.port, head.encode()) as dripping:
            begun, answer = time.monotonic(), b""
            dripping.settimeout(0.05)
            for number in range(len(chunk)):
                dripping.sendall(chunk[number : number + 1])
                if number == 1:
                    other = put(server, "train_00001.h5", chunk)
                    assert other == (503, {"error": "1 uploads are under way", "again": True})
                try:
                    answer = dripping.recv(1000)
                    break
                except TimeoutError:
                    continue
            assert time.monotonic() - begun < 3
            assert answer.startswith(b"HTTP/1.1 408")
        query = f"{FILES}train_00000.h5?checksum={checksum}&size={len(chunk)}"
        offset = json.loads(server.get(query, Authorization="Bearer secret")[1])["offset"]
        assert 0 < offset < len(chunk)
        rest = chunk[offset:]
        assert put(server, "train_00000.h5", rest, X_Checksum=checksum, Upload_Offset=offset)[0] == 201

    def test_old_unfinished_uploads_are_deleted_at_the_start_and_nothing_else(
        self, serving: Any, tmp_path: Path
    ) -> None:
        folder = tmp_path / "root" / "data"
        folder.mkdir()
        old = [f".train_00000.h5.{'0' * 32}.upload", ".thesis.upload", "train_00001.h5", ".train_00000.h5.1.partial"]
        new = [f".train_00002.h5.{'1' * 32}.upload"]
        for name in [*old, *new]:
            (folder / name).write_bytes(b"x")
        for name in old:
            os.utime(folder / name, (0, 0))
        serving(token="secret")
        deadline = time.monotonic() + 5
        while (folder / old[0]).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(path.name for path in folder.iterdir()) == sorted([*old[1:], *new])

    def test_one_unfinished_upload_is_kept_of_each_file(self, serving: Any, tmp_path: Path) -> None:
        server = serving(token="secret")
        for number in range(5):
            abandon(server, "train_00000.h5", b"xyz", f"{number:032}")
        assert [path.name for path in (tmp_path / "root" / "data").iterdir()] == [f".train_00000.h5.{4:032}.upload"]

    def test_what_is_not_an_upload_is_refused(self, serving: Any, tmp_path: Path, chunk: bytes) -> None:
        server = serving(token="secret")
        packed = gzip.compress(chunk)
        assert put(server, "train_00000.h5", packed, Content_Encoding="gzip")[0] == 415
        assert put(server, "train_00000.h5", b"", Content_Length=10**18)[0] == 413
        assert put(server, "train_00000.h5", b"", Content_Length=-1)[0] == 400
        chunked = {"Content_Length": None, "Transfer_Encoding": "chunked"}
        assert put(server, "train_00000.h5", b"1\r\nx\r\n0\r\n\r\n", **chunked)[0] == 411
        assert put(server, "train_00000.h5", chunk, Upload_Offset="-1")[0] == 400
        assert put(server, "manifest.json", b"x" * 10, Upload_Offset=2**25)[0] == 413
        assert put(server, "manifest.json", b"[" * 200_000)[0] == 422
        assert list((tmp_path / "root").iterdir()) == []

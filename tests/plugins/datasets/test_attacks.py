"""The server under attack, over loopback: clients that hold what it has, and files that are not data."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import resource
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import pytest
import xxhash

from clt_datasets.net import storage
from clt_datasets.net.client import Client
from clt_datasets.net.limits import Limits
from clt_datasets.net.retry import Full
from clt_datasets.net.serve import LINES, Few
from tests.support.commands import start
from tests.support.serving import serving_process
from tests.support.stored_data import write_numbered

HALF = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Half: "
BLOCK = b"GET /v1/datasets/data/chunks/0/blocks/0 HTTP/1.1\r\nHost: x\r\n\r\n"
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


@pytest.fixture
def chunk(tmp_path: Path) -> bytes:
    """A chunk's file, small."""
    write_numbered(tmp_path / "small", [30])
    return (tmp_path / "small" / "train_00000.h5").read_bytes()


@pytest.fixture
def token(monkeypatch: Any) -> None:
    monkeypatch.setenv("CLT_TOKEN", "secret")


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
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status, answer = put(server, "train_00000.h5", path.read_bytes())
        assert (status, "checksums" in answer["error"]) == (422, True), answer
        # It claims 2 GiB; the server is this process.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"
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

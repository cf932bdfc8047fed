"""Requests that no client sends: each is refused, none stops the server or leaves its root."""

from __future__ import annotations

import random
import select
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.support.stored_data import write_numbered


def malformed(draw: random.Random) -> tuple[bytes, bool]:
    """A request that should be refused, and whether all of it is there: one that promises a longer body than it sends
    is hung up on, which need not be answered."""
    names = [
        "..",
        ".",
        "%2e%2e",
        "..%2f..%2fsecret",
        "%2e%2e%2fsecret",
        "data/../..",
        "data%00",
        "x" * 300,
        "da ta",
        "%ff",
    ]
    names += ["-", "data%2f..", "link", "\\..\\secret", ".data", "nothing"]
    numbers = ["-1", "99", "1e3", "0x0", "%30%2f", "9" * 40, "", "3", "nan", "7"]
    files = [
        "../manifest.json",
        "..%2fx.h5",
        "train_1.h5",
        "train_00000.h5/..",
        "x",
        "%2e%2e",
        "passwd",
        ".manifest.json",
    ]
    bad_name, bad_number, bad_file = draw.choice(names), draw.choice(numbers), draw.choice(files)
    paths = [
        f"/v1/datasets/{bad_name}/manifest",
        f"/v1/datasets/{bad_name}/chunks/0/blocks/0",
        f"/v1/datasets/data/chunks/{draw.choice(numbers[:7])}/blocks/0",
        f"/v1/datasets/data/chunks/0/blocks/{bad_number}",
        f"/v1/datasets/{draw.choice(['data', bad_name])}/files/{bad_file}",
        f"/../{draw.choice(['secret', 'root/data/manifest.json'])}",
        f"//{bad_name}",
        "/v1/" + "a/" * draw.randint(1, 200),
    ]
    method = draw.choice(["GET", "PUT", "POST", "DELETE", "HEAD", "GET"])
    token = draw.choice(
        ["Bearer secret", "Bearer secret", "Bearer wrong", "", "Basic c2VjcmV0", "Bearer \xff\xfe", "secret"]
    )
    headers = {"Host": "x", "Authorization": token, "Connection": "close"}
    path, body, whole = draw.choice(paths), b"", True
    kind = draw.randint(0, 7)
    if kind == 0:  # an upload with a wrong checksum, offset or length
        path, method = "/v1/datasets/new/files/train_00000.h5", "PUT"
        body = draw.randbytes(draw.randint(0, 500))
        headers["Authorization"] = draw.choice([token, "Bearer secret"])
        headers["X-Checksum"] = draw.choice(["", "zz", "../../x", "A" * 32, *["0" * 32] * 4])
        headers["Upload-Offset"] = draw.choice(["-1", "1", "x", "9" * 30, "0", "0"])
        length = draw.choice([len(body), 10**12, len(body) + 50, "-5", "abc"])
        headers["Content-Length"] = str(length)
        whole = not (isinstance(length, int) and length > len(body))
    elif kind == 1:  # a range there is not
        path, method = "/v1/datasets/data/chunks/0/blocks/0", "GET"
        headers["Range"] = draw.choice(
            ["bytes=-5", "bytes=99999999-", "bytes=5-1", "lines=1-", "bytes=a-", "bytes=0-1,3-4"]
        )
    elif kind == 2:  # headers without end or sense
        headers["X-" + "a" * draw.choice([1, 9000])] = "b" * draw.choice([20_000, 9000])
    elif kind == 3:
        headers["Transfer-Encoding"] = draw.choice(["chunked", "gzip", "chunked, chunked"])
        body, whole = draw.choice(
            [(b"zz\r\n", True), (b"5\r\nab", False), (b"-1\r\n\r\n", True), (b"ffffffffffffffff\r\n", False)]
        )
        path, method = "/v1/datasets/new/files/manifest.json", "PUT"
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    raw = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body
    if kind == 4:  # noise in the head
        at = draw.randrange(3)
        raw = raw[:at] + draw.randbytes(draw.randint(1, 8)).replace(b"\n", b"\0") + raw[at:]
    return raw, whole


def answer_to(port: int, raw: bytes) -> bytes:
    """What comes back until the server closes. We say no more once it answers, or if it waits for what never comes:
    to say so sooner would be to hang up, and the server then owes no answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        found = b""
        try:
            connection.sendall(raw)
            select.select([connection], [], [], 1.0)
            connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(65536):
                found += data
        except ConnectionError:  # it answered and closed before it had read everything
            pass
        return found


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}


def attack(serving: Any, tmp_path: Path, count: int) -> None:
    write_numbered(tmp_path / "root" / "data", [30])
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "manifest.json").write_text("TOP SECRET")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "secret")
    server = serving(token="secret")
    before = snapshot(tmp_path)
    draw = random.Random(5)
    statuses: dict[int, int] = {}
    broken_off = {"answered": 0, "not answered": 0}
    for number in range(count):
        raw, whole = malformed(draw)
        found = answer_to(server.port, raw)
        assert b"TOP SECRET" not in found, raw
        assert found or not whole, raw
        if found:
            status = int(found.split(b" ", 2)[1])
            assert 400 <= status < 500, (raw, found)
            statuses[status] = statuses.get(status, 0) + 1
        if not whole:
            broken_off["answered" if found else "not answered"] += 1
        if number % 200 == 0:
            assert server.get("/healthz")[0] == 200
    print(f"answers by status: {dict(sorted(statuses.items()))}; requests broken off: {broken_off}")
    assert server.get("/healthz")[0] == 200
    assert sum(statuses.values()) == count - broken_off["not answered"]
    assert 0.02 * count < sum(broken_off.values()) < 0.2 * count
    assert {400, 401, 404, 413, 416} <= statuses.keys(), statuses
    after = snapshot(tmp_path)
    # Unfinished uploads lie in their own folder below the root, hidden.
    new = after.keys() - before.keys()
    assert all(name.startswith("root/new/.") for name in new), new
    assert {name: after[name] for name in before} == before


def test_malformed_requests_are_refused_and_nothing_escapes(serving: Any, tmp_path: Path) -> None:
    attack(serving, tmp_path, 500)


@pytest.mark.slow
def test_ten_thousand_malformed_requests(serving: Any, tmp_path: Path) -> None:
    attack(serving, tmp_path, 10_000)

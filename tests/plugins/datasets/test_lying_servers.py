"""The client against servers that lie, stall, or never end, over loopback; and what it does with bad tokens."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from clt_datasets import RemoteConfig, clt_sources
from clt_datasets.commands import serve
from clt_datasets.net import retry
from clt_datasets.net.client import Client
from clt_datasets.net.limits import LARGEST_MANIFEST
from clt_datasets.net.retry import Full
from clt_plugins import Refused
from tests.support.commands import start
from tests.support.serving import Fake, Serving
from tests.support.stored_data import join, local, make_context, write_numbered

OK = b"HTTP/1.1 200 OK\r\n"


def remote(url: str, **settings: Any) -> Any:
    """The source, built as for a recipe."""
    spec = next(spec for spec in clt_sources() if spec.name == "remote")
    config = {"buffer_tokens": 64, "patience_s": 2.0, **settings}
    return spec.build(RemoteConfig(url=url, dataset="data", **config), make_context())


def answering(*answers: bytes) -> Callable[[socket.socket], None]:
    """Gives one answer to each request of a connection, the last one for ever."""

    def answer(connection: socket.socket) -> None:
        number = 0
        while connection.recv(10_000):
            connection.sendall(answers[min(number, len(answers) - 1)])
            number += 1

    return answer


def sized(body: bytes, head: bytes = OK) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


class TestSizes:
    def test_a_manifest_without_end_is_not_read(self) -> None:
        sent: list[int] = []
        piece = b"100000\r\n" + b"x" * 2**20 + b"\r\n"

        def answer(connection: socket.socket) -> None:
            connection.recv(10_000)
            connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(3000):
                connection.sendall(piece)
                sent.append(len(piece))

        begun = time.monotonic()
        with pytest.raises(Refused, match=r"data: an answer of more than 33,554,432 bytes, which is no data set's$"):
            remote(Fake(answer).url, patience_s=600)
        # And what the system takes in its buffers.
        assert sum(sent) < LARGEST_MANIFEST + 2**24
        assert time.monotonic() - begun < 5

    def test_an_answer_that_says_it_is_too_large_is_not_read(self) -> None:
        server = Fake(answering(OK + b"Content-Length: 3000000000\r\n\r\n"))
        with pytest.raises(Refused, match="an answer of more than"):
            remote(server.url, patience_s=600)
        assert server.connections == 1

    @pytest.mark.parametrize("path", ["statistics", "summary"])
    def test_what_has_a_known_size_is_not_read_beyond_it(self, path: str, serving: Any, tmp_path: Path) -> None:
        """Everything else is what a true server sends."""
        write_numbered(tmp_path / "root" / "data", [30])
        true = serving()

        def answer(connection: socket.socket) -> None:
            while request := connection.recv(10_000):
                target = request.split()[1].decode()
                if target.endswith(path):
                    connection.sendall(sized(b"x" * 2**20))
                else:
                    connection.sendall(sized(true.get(target)[1]))

        def use() -> None:
            source = remote(Fake(answer).url)
            try:
                source.statistics()
                source.next()
            finally:
                source.close()

        with pytest.raises(Refused, match="an answer of more than"):
            use()

    def test_blocks_that_no_server_sends_are_not_waited_for(self, tmp_path: Path) -> None:
        write_numbered(tmp_path / "data", [30])
        manifest = (tmp_path / "data" / "manifest.json").read_bytes()
        absurd = re.sub(rb'"d_model": \d+', b'"d_model": 500000000000', manifest)
        with pytest.raises(Refused, match=r"blocks have more than|a block of|cannot hold"):
            remote(Fake(answering(sized(absurd))).url)


class TestTime:
    """Patience says how long nothing new may come; a byte now and then is nothing."""

    @pytest.mark.parametrize("part", ["head", "body", "block", "continue"])
    def test_answers_that_drip_end(self, part: str, monkeypatch: Any) -> None:
        def answer(connection: socket.socket) -> None:
            connection.recv(10_000)
            start = {"head": OK + b"X: ", "continue": b"", "block": OK + b"Content-Length: 100000\r\n\r\n"}
            piece = b"HTTP/1.1 100 Continue\r\n\r\n" if part == "continue" else b"x"
            try:
                connection.sendall(start.get(part, OK + b"Content-Length: 100000\r\n\r\n"))
                while True:
                    connection.sendall(piece)
                    time.sleep(0.02)
            except OSError:
                return

        client = Client(Fake(answer).url, "data", patience_s=0.5)
        into = [np.empty(100_000, np.uint8)]
        begun = time.monotonic()
        with pytest.raises(OSError, match=r"data: no success in 0\.5 s: "):
            client.fill("chunks/0/blocks/0", into) if part == "block" else client.get("manifest")
        assert time.monotonic() - begun < 3
        client.close()

    def test_a_busy_server_says_when_to_come_back(self, monkeypatch: Any) -> None:
        times: list[float] = []
        busy = sized(b'{"error": "busy"}', b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\n")

        def answer(connection: socket.socket) -> None:
            while connection.recv(10_000):
                times.append(time.monotonic())
                connection.sendall(busy if len(times) == 1 else sized(b"content"))

        client = Client(Fake(answer).url, "data", patience_s=20)
        assert client.get("manifest") == b"content"
        assert 1 <= times[1] - times[0] < 2
        client.close()

    def test_a_full_server_is_told_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "train_00000.h5").write_bytes(b"rows")
        full = sized(b'{"error": "the server\'s disk is full"}', b"HTTP/1.1 507 Full\r\n")
        client = Client(Fake(answering(full)).url, "data", patience_s=600)
        begun = time.monotonic()
        with pytest.raises(Full, match=r"data: 507 the server's disk is full: make room on the server, then run the"):
            client.put(tmp_path / "train_00000.h5")
        assert time.monotonic() - begun < 1
        client.close()


class TestLies:
    def test_a_token_is_not_sent_to_another_address(self, monkeypatch: Any) -> None:
        monkeypatch.setenv("CLT_TOKEN", "secret")
        other = Fake(answering(sized(b"{}")))
        away = b"HTTP/1.1 302 Found\r\nLocation: %b/x\r\n" % other.url.encode()
        with pytest.raises(Refused, match="302 Found: the server sends to another address; that is not followed"):
            remote(Fake(answering(sized(b"", away))).url)
        assert other.connections == 0

    def test_a_servers_text_cannot_control_the_terminal(self) -> None:
        body = b'{"error": "\\u001b[2J\\u202eowned\\n' + b"x" * 3000 + b'"}'
        client = Client(Fake(answering(sized(body, b"HTTP/1.1 404 \x1b[31mX\r\n"))).url, "data", patience_s=1)
        with pytest.raises(Refused) as refused:
            client.get("manifest")
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 400
        client.close()

    @pytest.mark.parametrize(
        "body", [b"[" * 4000, b"[" * 60_000, b'{"complete": false, "offset": -5}', b'{"complete": "yes", "offset": 0}']
    )
    def test_answers_to_an_upload_that_are_none(self, body: bytes, tmp_path: Path) -> None:
        (tmp_path / "train_00000.h5").write_bytes(b"rows")
        client = Client(Fake(answering(sized(body))).url, "data", patience_s=0.3)
        with pytest.raises(OSError, match=r"no success in 0\.3 s: the answer is not that of `serve`"):
            client.put(tmp_path / "train_00000.h5")
        client.close()

    def test_errors_nested_without_end_are_errors(self) -> None:
        assert isinstance(retry.failure("x", 404, "Not Found", b"[" * 4096), Refused)

    def test_a_data_set_that_is_replaced_while_it_is_read_is_named(self, serving: Any, tmp_path: Path) -> None:
        path = tmp_path / "root" / "data"
        write_numbered(path, [64] * 8)
        server: Serving = serving()
        here, there = local(path), remote(server.url)
        assert here.next().tokens == there.next().tokens
        server.stop()
        shutil.rmtree(path)
        write_numbered(path, [64] * 7 + [63])
        server.start()
        with pytest.raises(Refused, match=r"/data: the server has another data set of this name now"):
            join([there.next() for _ in range(50)])
        there.close()


GENERATE = """
name = "small"
[source]
name = "synthetic"
layers = 2
d_model = 4
features = 8
[transcoder]
features = 8
[activation]
name = "relu"
[train]
steps = 4
batch_tokens = 32
eval_tokens = 32
"""


@pytest.mark.parametrize(("number", "server"), [(signal.SIGINT, "down"), (signal.SIGTERM, "silent")])
def test_generate_obeys_while_it_waits_for_a_server(number: int, server: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(GENERATE)
    reached = threading.Event()

    def answer(connection: socket.socket) -> None:
        reached.set()
        if server == "silent":
            time.sleep(60)
        connection.close()

    fake = Fake(answer)
    process = start("-m", "clt_plugins", "generate", "recipe.toml", "--out", "data", "--to", fake.url, cwd=tmp_path)
    assert reached.wait(60)
    time.sleep(0.3)
    begun = time.monotonic()
    process.send_signal(number)
    assert process.wait(30) == 130
    assert time.monotonic() - begun < 3
    assert process.stderr is not None
    assert process.stderr.read().splitlines()[-1] == "interrupted"


class TestTokens:
    """Messages name where a token comes from."""

    @pytest.mark.parametrize("token", ["пароль", "two words", "line\nline", "x" * 2000, "caf\udce9"])
    def test_one_that_no_header_can_carry(self, token: str, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv("CLT_TOKEN", token)
        with pytest.raises(Refused, match=r"^CLT_TOKEN: not a token: use 1 to 1024 ASCII letters"):
            Client("http://127.0.0.1:9", "data", patience_s=1)
        with pytest.raises(Refused, match=r"^CLT_TOKEN: not a token"):
            CliRunner().invoke(serve, [str(tmp_path)], catch_exceptions=False)

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            (b"\xff\xfe", "tok: its first line is not text in UTF-8"),
            (b"", "tok: its first line is empty"),
            ("пароль".encode(), "tok: not a token: use 1 to 1024 ASCII letters"),
            (b"x" * 10**6, "tok: not a token: use 1 to 1024 ASCII letters"),
        ],
    )
    def test_a_token_file_that_holds_none(self, content: bytes, text: str, tmp_path: Path) -> None:
        (tmp_path / "tok").write_bytes(content)
        with pytest.raises(Refused, match=rf"^--token-file.*{text}"):
            CliRunner().invoke(serve, [str(tmp_path), "--token-file", str(tmp_path / "tok")], catch_exceptions=False)

    def test_a_byte_order_mark_is_no_part_of_it(self, tmp_path: Path, monkeypatch: Any) -> None:
        (tmp_path / "tok").write_bytes(b"\xef\xbb\xbfsecret\r\nmore\n")
        served: list[Any] = []
        monkeypatch.setattr("clt_datasets.net.serve.serve", lambda *arguments, **_: served.append(arguments[3]))
        CliRunner().invoke(serve, [str(tmp_path), "--token-file", str(tmp_path / "tok")], catch_exceptions=False)
        assert served == ["secret"]

    @pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"-----BEGIN CERTIFICATE-----\nx\n"])
    def test_certificates_that_are_none(self, content: bytes | None, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / "ca.pem").write_bytes(content)
        with pytest.raises(Refused, match=r"^source\.ca_file: cannot use .*ca\.pem: \S"):
            remote("https://127.0.0.1:9", ca_file=tmp_path / "ca.pem")

    @pytest.mark.parametrize("url", ["http://a..b", "http://h:99999", "http://h:x", "ftp://h", "http://h\n", "http://"])
    def test_addresses_that_are_none(self, url: str) -> None:
        with pytest.raises(Refused, match=r"^source\.url: expected http://HOST:PORT"):
            remote(url)

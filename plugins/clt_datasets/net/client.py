"""The other end of `serve`: downloads and uploads that continue where they broke off.

Everything goes through `http.client`, on connections that are kept for the next request. A block goes from the socket
straight into the arrays where it belongs, in the thread that needs it.
"""

from __future__ import annotations

import json
import os
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import numpy as np

from clt_datasets.format.files import file_digest
from clt_datasets.format.manifest import DATASET_NAME
from clt_datasets.net.limits import LARGEST_MANIFEST
from clt_datasets.net.retry import CONNECT_S, Again, Full, Patience, failure
from clt_datasets.net.token import check_token
from clt_datasets.net.wire import Answer, Sockets, TooLarge, connect
from clt_plugins import DamagedError, Refused

T = TypeVar("T")

PIECE = 2**18
"""Bytes of an upload that are sent at a time; a connection that does not accept one in a minute counts as stalled."""
LARGEST = 2**16
"""Bytes of an answer to an upload."""


class Client:
    """Requests to one data set of a server; can be used by several threads at a time.

    Args:
        url: the server's address.
        dataset: the data set's name there.
        patience_s: a request fails when nothing new has come for so long, over all attempts.
        ca_file: certificates to trust.
        options: what the user calls address and name, for messages.

    Raises:
        Refused: the address or the name cannot be one, the token cannot be one, or the certificates cannot be read.
    """

    def __init__(
        self,
        url: str,
        dataset: str,
        *,
        patience_s: float,
        ca_file: Path | None = None,
        options: tuple[str, str] = ("source.url", "source.dataset"),
    ):
        if not _is_address(url):
            raise Refused(options[0], f"expected http://HOST:PORT or https://..., got {url!r}")
        if not DATASET_NAME.fullmatch(dataset):
            raise Refused(options[1], f"not the name of a data set: {dataset!r}; use letters, digits, '.', '-' and '_'")
        self.base, self.patience_s = f"{url.rstrip('/')}/v1/datasets/{dataset}", patience_s
        self._address = urlsplit(self.base)
        token = os.environ.get("CLT_TOKEN", "").strip()
        self._headers = {"Authorization": f"Bearer {check_token(token, 'CLT_TOKEN')}"} if token else {}
        self._tls = None
        if self._address.scheme == "https":
            try:
                self._tls = ssl.create_default_context(cafile=ca_file)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise Refused("source.ca_file", f"cannot use {ca_file}: {reason}") from error
        self._lock = threading.Lock()
        self._idle: list[HTTPConnection] = []
        self._sockets = Sockets()

    def get(self, path: str, limit: int = LARGEST_MANIFEST) -> bytes:
        """Download a small file.

        Args:
            limit: bytes that it can have.

        Raises:
            OSError: no success for too long, or the client was closed meanwhile.
            Refused: the server refuses, or sends more.
        """

        def attempt(patience: Patience) -> bytes:
            with self._request("GET", path, patience) as answer:
                answer.more_time(patience.limit_s)
                return answer.all(limit)

        return self._retry(attempt)

    def fill(self, path: str, into: list[np.ndarray]) -> None:
        """Download into arrays, one after the other. What came before an error is not asked for again.

        Raises:
            OSError: no success for too long, or the client was closed meanwhile.
            Refused: the server refuses.
        """
        body = _Body(into)
        self._retry(lambda patience: self._fill(path, body, patience))

    def put(self, path: Path, checksum: str | None = None) -> None:
        """Upload a file, or what the server lacks of it.

        Args:
            checksum: the file's XXH3-128, if it is known.

        Raises:
            OSError: no success for too long, no room on the server, the file cannot be read, or the client was closed
                meanwhile.
            Refused: the server refuses.
            DamagedError: the file is not what its name says.
        """
        known = checksum or file_digest(path)
        self._retry(lambda patience: self._put(path, known, patience))

    def close(self) -> None:
        """Close the connections. Requests under way fail at once."""
        self._sockets.close()
        with self._lock:
            while self._idle:
                self._idle.pop().close()

    def _retry(self, attempt: Callable[[Patience], T]) -> T:
        """Repeat attempts until one succeeds; see `Patience.after`."""
        patience = Patience(self.base, self.patience_s)
        closed = self._sockets.closed
        while True:
            try:
                return attempt(patience)
            except (DamagedError, Full, Unread):
                raise
            except TooLarge as error:
                raise Refused(self.base, str(error)) from error
            except (OSError, HTTPException, Again) as error:
                # `close` also ends the pause.
                if closed.is_set() or closed.wait(patience.after(error)):
                    raise OSError(f"{self.base}: closed") from None

    def _fill(self, path: str, body: _Body, patience: Patience) -> None:
        """One attempt to get the rest of a body."""
        headers = {"Range": f"bytes={body.done}-"} if body.done else {}
        with self._request("GET", path, patience, headers) as answer:
            if answer.status != 206:
                body.done = 0
            if answer.length != body.size - body.done:
                raise Again(f"{answer.length} bytes came instead of {body.size - body.done}")
            while body.done < body.size:
                # Only what has come already, so that nothing is lost when the connection breaks.
                count = answer.fp.readinto1(body.rest())
                if not count:
                    raise Again("the connection broke off")
                body.done += count
                if patience.progress(body.done, end=body.done == body.size):
                    answer.more_time(patience.stalled_s)
            answer.close()

    def _put(self, path: Path, checksum: str, patience: Patience) -> None:
        """One attempt to upload the rest of a file."""
        with _reading(path):
            target, size = f"files/{path.name}", path.stat().st_size
        # The server says here already if it will refuse: an answer to a half-sent body can get lost.
        with self._request("GET", f"{target}?checksum={checksum}&size={size}", patience) as answer:
            complete, offset = _stored(answer.all(LARGEST), size)
        if complete:
            return
        headers = {"X-Checksum": checksum, "Upload-Offset": str(offset), "Content-Length": str(size - offset)}
        with self._request("PUT", target, patience, headers, _pieces(path, offset, size, patience)) as answer:
            complete, _ = _stored(answer.all(LARGEST), size)
        if not complete:
            raise Again("the server accepted the file, and says that it is not complete")

    @contextmanager
    def _request(
        self,
        method: str,
        path: str,
        patience: Patience,
        headers: Mapping[str, str] | None = None,
        body: Iterator[bytes] | None = None,
    ) -> Iterator[Answer]:
        """One request: its answer, if it is a success. The connection is kept if the answer is read to its end."""
        connection = self._connection(min(CONNECT_S, patience.stalled_s))
        sock = connection.sock
        reusable = False
        try:
            sock.settimeout(patience.stalled_s)
            try:
                connection.request(method, f"{self._address.path}/{path}", body, {**self._headers, **(headers or {})})
            except BrokenPipeError:
                # A server that refuses may answer and close before it has read all of the body.
                if body is None:
                    raise
            sock.settimeout(patience.stalled_s)
            answer = connection.getresponse()
            assert isinstance(answer, Answer)
            if answer.status >= 300:
                raise failure(
                    self.base, answer.status, answer.reason, answer.read(4096), answer.getheader("Retry-After")
                )
            yield answer
            reusable = answer.isclosed() and connection.sock is not None
        finally:
            self._sockets.discard(sock)
            with self._lock:
                if reusable and not self._sockets.closed.is_set():
                    self._idle.append(connection)
                else:
                    connection.close()

    def _connection(self, timeout_s: float) -> HTTPConnection:
        """A connection that no other thread uses."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            self._sockets.add(connection.sock)
            return connection
        return connect(self._address.hostname or "", self._address.port, self._tls, timeout_s, self._sockets)


class _Body:
    """Arrays that are filled one after the other."""

    def __init__(self, arrays: list[np.ndarray]):
        self.views = [array.reshape(-1).view(np.uint8).data for array in arrays]
        self.size = sum(map(len, self.views))
        self.done = 0
        """Bytes that have come."""

    def rest(self) -> memoryview:
        """The memory for the next byte, and for those after it in the same array."""
        offset = self.done
        for view in self.views:
            if offset < len(view):
                return view[offset:]
            offset -= len(view)
        raise AssertionError("full")


def _pieces(path: Path, offset: int, size: int, patience: Patience) -> Iterator[bytes]:
    """A file from a byte on, in pieces; each piece is counted as progress when the system has accepted it."""
    with _reading(path):
        file = path.open("rb")
    with file:
        while True:
            with _reading(path):
                file.seek(offset)
                piece = file.read(PIECE)
            if not piece:
                return
            yield piece
            offset += len(piece)
            patience.progress(offset, end=offset == size)


class Unread(OSError):
    """A file of this machine cannot be read: another request would not help."""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What fails while a file of this machine is read is `Unread`, and names it."""
    try:
        yield
    except OSError as error:
        raise Unread(f"{path}: could not be read: {error.strerror or error}") from error


def _stored(answer: bytes, size: int) -> tuple[bool, int]:
    """What a server says about a file: whether it is complete there, and how many bytes of it are."""
    try:
        stored = json.loads(answer)
        complete, offset = stored["complete"], stored["offset"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Again("the answer is not that of `serve`") from error
    if not isinstance(complete, bool) or type(offset) is not int or not 0 <= offset <= size:
        raise Again("the answer is not that of `serve`")
    return complete, offset


def _is_address(url: str) -> bool:
    try:
        split = urlsplit(url)
        host = (split.hostname or "").encode("idna")
        return split.scheme in ("http", "https") and bool(host) and split.port != 0 and url.isprintable()
    except ValueError:  # no port, or no name of a host
        return False

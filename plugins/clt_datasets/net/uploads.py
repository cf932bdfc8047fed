"""Uploads to `serve`: in pieces, resumable, checked, and visible only when complete.

A file grows as `.NAME.CHECKSUM.upload`. It gets its name when its XXH3-128 is the promised one and its content fits the
name. The manifest is accepted when everything that it lists is there. Nothing is changed afterwards.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import ClientError, web
from aiohttp.http_exceptions import HttpProcessingError

from clt_datasets.format.chunk import read_summary
from clt_datasets.format.files import file_digest, publish
from clt_datasets.format.manifest import CHUNK_NAME, MANIFEST, STATISTICS, Manifest
from clt_plugins import DamagedError

PIECE = 2**20
"""Bytes read from a connection and written at a time."""
SMALL = 2**26
"""The largest manifest and statistics."""


class BadRequest(Exception):
    """A request that is answered with a 4xx status.

    Args:
        again: whether the same request may succeed later; clients then repeat it.
    """

    def __init__(self, status: int, text: str, *, again: bool = False):
        super().__init__(text)
        self.status, self.again = status, again


class Uploads:
    """Receives files.

    Args:
        work: runs a function in a thread.
        max_upload: bytes of a file.
        stalled_s: a client that sends nothing for so long is dropped.
    """

    def __init__(self, work: Callable[..., Any], max_upload: int, stalled_s: float):
        self.work, self.max_upload, self.stalled_s = work, max_upload, stalled_s
        self.busy: set[Path] = set()
        """Files of which an upload is under way."""
        self.received = 0
        """Bytes, of all uploads."""

    async def stored(self, folder: Path, request: web.Request) -> dict[str, Any]:
        """Whether a file is complete, and how many bytes of it are there; refuses what `put` would refuse."""
        file, checksum = _file(request), _checksum(request.query.get("checksum", ""))
        self._check_size(file, _bytes(request.query.get("size", "0"), "size"))
        self._check_busy(folder / file)
        return await self.work(_stored, folder / file, checksum)

    async def put(self, folder: Path, request: web.Request) -> dict[str, Any]:
        """Receive a file, or the rest of it."""
        file, checksum = _file(request), _checksum(request.headers.get("X-Checksum", ""))
        offset = _bytes(request.headers.get("Upload-Offset", "0"), "Upload-Offset")
        size = request.content_length
        if size is None:
            raise BadRequest(411, "Content-Length is missing")
        self._check_size(file, offset + size)
        path = folder / file
        self._check_busy(path)
        self.busy.add(path)
        try:
            return await self._receive(path, checksum, offset, size, request)
        finally:
            self.busy.discard(path)

    def _check_size(self, file: str, size: int) -> None:
        largest = self.max_upload if CHUNK_NAME.fullmatch(file) else min(SMALL, self.max_upload)
        if size > largest:
            raise BadRequest(413, f"a file of more than {largest} bytes")

    def _check_busy(self, path: Path) -> None:
        # A client whose connection broke may be back before the server has noticed that it broke.
        if path in self.busy:
            raise BadRequest(409, "another upload of this file is under way", again=True)

    async def _receive(self, path: Path, checksum: str, offset: int, size: int, request: web.Request) -> dict[str, Any]:
        stored = await self.work(_stored, path, checksum)
        if stored["complete"]:
            return stored
        if stored["offset"] != offset:
            raise BadRequest(409, f"{stored['offset']} bytes are there: the upload continues from them", again=True)
        partial = _partial(path, checksum)
        await self.work(lambda: path.parent.mkdir(exist_ok=True))
        received = 0
        file = await self.work(lambda: partial.open("ab"))
        try:
            while received < size:
                piece = await self._piece(request)
                await self.work(file.write, piece)
                received += len(piece)
                self.received += len(piece)
        finally:
            await self.work(file.close)
        await self.work(_accept, partial, path, checksum)
        return {"complete": True, "offset": offset + size}

    async def _piece(self, request: web.Request) -> bytes:
        """The next bytes of a body that has not ended."""
        try:
            piece = await asyncio.wait_for(request.content.read(PIECE), self.stalled_s)
        except TimeoutError:
            raise BadRequest(408, f"nothing came for {self.stalled_s:g} s") from None
        except (ClientError, HttpProcessingError, ConnectionError) as error:
            raise BadRequest(400, f"the body broke off: {type(error).__name__}") from error
        if not piece:
            raise BadRequest(400, "the body is shorter than Content-Length")
        return piece


def _stored(path: Path, checksum: str) -> dict[str, Any]:
    """Whether a file is complete, and how many bytes of it are there."""
    if path.is_file() and file_digest(path) == checksum:
        return {"complete": True, "offset": path.stat().st_size}
    if path.is_file() or (path.parent / MANIFEST).is_file():
        raise BadRequest(409, "the data set is complete, or has another file of this name: it is not changed")
    partial = _partial(path, checksum)
    return {"complete": False, "offset": partial.stat().st_size if partial.is_file() else 0}


def _accept(partial: Path, path: Path, checksum: str) -> None:
    """Give an uploaded file its name, if its content fits; otherwise delete it."""
    try:
        if file_digest(partial) != checksum:
            raise BadRequest(422, "the file's checksum is not X-Checksum")
        if path.name == MANIFEST:
            _check_manifest(partial, path.parent)
        elif CHUNK_NAME.fullmatch(path.name):
            read_summary(partial)
    except DamagedError as error:
        partial.unlink()
        raise BadRequest(422, str(error).replace(str(partial), path.name)) from error
    except BadRequest:
        partial.unlink()
        raise
    publish(partial, path)


def _check_manifest(partial: Path, folder: Path) -> None:
    """Whether everything that a manifest lists is there."""
    try:
        manifest = Manifest.from_json(partial.read_bytes(), MANIFEST)
    except ValueError as error:
        raise BadRequest(422, str(error)) from error
    for name in [*(chunk.file for chunk in manifest.chunks), STATISTICS]:
        if not (folder / name).is_file():
            raise BadRequest(409, f"{name} is not there yet: another process still uploads it", again=True)
    for chunk in manifest.chunks:
        path = folder / chunk.file
        if path.stat().st_size != chunk.bytes or read_summary(path).checksum != chunk.checksum:
            raise BadRequest(422, f"{chunk.file} is not the one that the manifest lists")
    if file_digest(folder / STATISTICS) != manifest.statistics:
        raise BadRequest(422, f"{STATISTICS} is not the one that the manifest lists")


def _file(request: web.Request) -> str:
    file = request.match_info["file"]
    if file not in (MANIFEST, STATISTICS) and not CHUNK_NAME.fullmatch(file):
        raise BadRequest(400, "not the name of a data set's file")
    return file


def _checksum(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{32}", text):
        raise BadRequest(400, "checksum: needs the file's XXH3-128, 32 hexadecimal digits")
    return text


def _bytes(text: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise BadRequest(400, f"{name}: needs a number of bytes")
    return int(text)


def _partial(path: Path, checksum: str) -> Path:
    return path.with_name(f".{path.name}.{checksum}.upload")

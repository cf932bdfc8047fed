"""Uploads to `serve`: in pieces, resumable, checked, and visible only when whole.

A file grows as `.NAME.CHECKSUM.upload` and takes its place when its XXH3-128 is the one promised and it is what its
name says; the manifest is taken when everything that it lists is there. Nothing is changed afterwards.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from aiohttp import ClientError, web
from aiohttp.http_exceptions import HttpProcessingError

from clt_datasets.format.chunk import read_summary
from clt_datasets.format.manifest import CHUNK_NAME, MANIFEST, STATISTICS, Manifest
from clt_plugins import DamagedError

PIECE = 2**20
"""Bytes read from a connection and written at a time."""
SMALL = 2**26
"""The largest manifest and statistics."""


class Refused(Exception):
    """A request that is answered with a 4xx status."""

    def __init__(self, status: int, text: str, **more: Any):
        super().__init__(text)
        self.status, self.more = status, more


class Receiver:
    """Takes files.

    Args:
        work: runs a function in a thread.
        max_upload: bytes of a file.
        stalled_s: a client that gives nothing for so long is dropped.
    """

    def __init__(self, work: Callable[..., Any], max_upload: int, stalled_s: float):
        self.work, self.max_upload, self.stalled_s = work, max_upload, stalled_s
        self.busy: set[Path] = set()
        self.received = 0

    async def offset(self, folder: Path, request: web.Request) -> dict[str, Any]:
        """How many bytes of a file are there."""
        path = folder / _file(request)
        checksum = _checksum(request.query.get("checksum", ""))
        return await self.work(self._offset, path, checksum)

    def _offset(self, path: Path, checksum: str) -> dict[str, Any]:
        if path.is_file():
            return {"whole": _digest(path) == checksum, "offset": path.stat().st_size}
        partial = _partial(path, checksum)
        return {"whole": False, "offset": partial.stat().st_size if partial.is_file() else 0}

    async def put(self, folder: Path, request: web.Request) -> dict[str, Any]:
        """Take a file, or the rest of it."""
        file = _file(request)
        checksum = _checksum(request.headers.get("X-Checksum", ""))
        text = request.headers.get("Upload-Offset", "0")
        if not re.fullmatch(r"[0-9]{1,15}", text):
            raise Refused(400, "Upload-Offset: a number of bytes is wanted")
        size = request.content_length
        if size is None:
            raise Refused(411, "Content-Length is wanted")
        largest = self.max_upload if CHUNK_NAME.fullmatch(file) else min(SMALL, self.max_upload)
        if int(text) + size > largest:
            raise Refused(413, f"a file of more than {largest} bytes")
        path = folder / file
        if path in self.busy:
            raise Refused(409, "another upload of this file is under way")
        self.busy.add(path)
        try:
            return await self._take(path, checksum, int(text), size, request)
        finally:
            self.busy.discard(path)

    async def _take(self, path: Path, checksum: str, offset: int, size: int, request: web.Request) -> dict[str, Any]:
        there = await self.work(self._offset, path, checksum)
        if there["whole"]:
            return there
        if await self.work((path.parent / MANIFEST).is_file) or await self.work(path.is_file):
            raise Refused(409, "the data set is whole, or has another file of this name: it is not changed")
        if there["offset"] != offset:
            raise Refused(409, "the upload goes on elsewhere", **there)
        partial = _partial(path, checksum)
        await self.work(lambda: path.parent.mkdir(exist_ok=True))
        got = 0
        file = await self.work(lambda: partial.open("ab"))
        try:
            while got < size:
                piece = await self._piece(request)
                await self.work(file.write, piece)
                got += len(piece)
                self.received += len(piece)
        finally:
            await self.work(file.close)
        await self.work(_settle, partial, path, checksum)
        return {"whole": True, "offset": offset + size}

    async def _piece(self, request: web.Request) -> bytes:
        """The next bytes of a body that has not ended."""
        try:
            piece = await asyncio.wait_for(request.content.read(PIECE), self.stalled_s)
        except TimeoutError:
            raise Refused(408, f"nothing came for {self.stalled_s:g} s") from None
        except (ClientError, HttpProcessingError, ConnectionError) as error:
            raise Refused(400, f"the body broke off: {type(error).__name__}") from error
        if not piece:
            raise Refused(400, "the body is shorter than Content-Length")
        return piece


def _settle(partial: Path, path: Path, checksum: str) -> None:
    """Put an uploaded file in its place, if it is what it should be; otherwise drop it."""
    try:
        if _digest(partial) != checksum:
            raise Refused(422, "the file's checksum is not X-Checksum")
        if path.name == MANIFEST:
            _check_manifest(partial, path.parent)
        elif CHUNK_NAME.fullmatch(path.name):
            read_summary(partial)
    except DamagedError as error:
        partial.unlink()
        raise Refused(422, str(error).replace(str(partial), path.name)) from error
    except Refused:
        partial.unlink()
        raise
    partial.rename(path)


def _check_manifest(partial: Path, folder: Path) -> None:
    """Whether all that a manifest lists is there."""
    try:
        manifest = Manifest.from_json(partial.read_bytes(), MANIFEST)
    except ValueError as error:
        raise Refused(422, str(error)) from error
    for chunk in manifest.chunks:
        path = folder / chunk.file
        if not path.is_file():
            raise Refused(409, f"{chunk.file} is not there yet", missing=chunk.file)
        if path.stat().st_size != chunk.bytes or read_summary(path).checksum != chunk.checksum:
            raise Refused(422, f"{chunk.file} is not the one that the manifest lists")
    statistics = folder / STATISTICS
    if not statistics.is_file():
        raise Refused(409, f"{STATISTICS} is not there yet", missing=STATISTICS)
    if _digest(statistics) != manifest.statistics:
        raise Refused(422, f"{STATISTICS} is not the one that the manifest lists")


def _file(request: web.Request) -> str:
    file = request.match_info["file"]
    if file not in (MANIFEST, STATISTICS) and not CHUNK_NAME.fullmatch(file):
        raise Refused(400, "no name of a data set's file")
    return file


def _checksum(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{32}", text):
        raise Refused(400, "checksum: XXH3-128 of the file is wanted, 32 hexadecimal digits")
    return text


def _partial(path: Path, checksum: str) -> Path:
    return path.with_name(f".{path.name}.{checksum}.upload")


def _digest(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            state.update(piece)
    return state.hexdigest()

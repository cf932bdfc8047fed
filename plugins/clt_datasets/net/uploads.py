"""Uploads to `serve`: in pieces, resumable, checked, and visible only when complete.

A file grows as `.NAME.CHECKSUM.upload`. It gets its name when its XXH3-128 is the promised one and its content fits the
name. The manifest is accepted when everything that it lists is there. Nothing is changed afterwards. An upload that is
acknowledged is on the disk.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import ClientError, web
from aiohttp.http_exceptions import HttpProcessingError

from clt_datasets.format.chunk import read_summary
from clt_datasets.format.files import file_digest, sync
from clt_datasets.format.manifest import CHUNK_NAME, MANIFEST, STATISTICS, Manifest
from clt_datasets.net.answers import BadRequest
from clt_datasets.net.limits import LARGEST_BLOCK, LARGEST_MANIFEST, LARGEST_STATISTICS, Limits
from clt_datasets.net.served import NotServed, regular
from clt_datasets.net.storage import Storage
from clt_plugins import DamagedError

PIECE = 2**20
"""Bytes read from a connection and written at a time."""
LEAST = 2**18
"""Bytes that have to come in `Limits.stalled_s`."""


class Uploads:
    """Receives files.

    Args:
        work: runs a function in a thread.
        storage: where they are kept.
        max_upload: bytes of a file.
        limits: see there.
    """

    def __init__(self, work: Callable[..., Any], storage: Storage, max_upload: int, limits: Limits):
        self.work, self.storage, self.max_upload, self.limits = work, storage, max_upload, limits
        self.busy: set[Path] = set()
        """Files of which an upload is under way."""
        self.received = 0
        """Bytes, of all uploads."""
        self._digests: dict[tuple[int, ...], str] = {}
        """XXH3-128 of complete files, by the state of the file."""

    async def stored(self, folder: Path, request: web.Request) -> dict[str, Any]:
        """Whether a file is complete, and how many bytes of it are there; refuses what `put` would refuse."""
        file, checksum = _file(request), _checksum(request.query.get("checksum", ""))
        size = _bytes(request.query.get("size", "0"), "size")
        self._check_size(file, size)
        self._check_busy(folder / file)
        stored = await self.work(self._stored, folder / file, checksum)
        if not stored["complete"]:
            await self.work(self.storage.check, max(0, size - stored["offset"]))
        return stored

    async def put(self, folder: Path, request: web.Request) -> dict[str, Any]:
        """Receive a file, or the rest of it."""
        file, checksum = _file(request), _checksum(request.headers.get("X-Checksum", ""))
        offset = _bytes(request.headers.get("Upload-Offset", "0"), "Upload-Offset")
        size = request.content_length
        if size is None:
            raise BadRequest(411, "Content-Length is missing")
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise BadRequest(415, "uploads are not compressed")
        self._check_size(file, offset + size)
        path = folder / file
        self._check_busy(path)
        if len(self.busy) >= self.limits.uploads:
            raise BadRequest(503, f"{len(self.busy)} uploads are under way", again=True)
        self.busy.add(path)
        try:
            return await self._receive(path, checksum, offset, size, request)
        finally:
            self.busy.discard(path)

    def _check_size(self, file: str, size: int) -> None:
        small = {MANIFEST: LARGEST_MANIFEST, STATISTICS: LARGEST_STATISTICS}
        largest = min(small.get(file, self.max_upload), self.max_upload)
        if size > largest:
            raise BadRequest(413, f"a file of more than {largest} bytes")

    def _check_busy(self, path: Path) -> None:
        # A client whose connection broke may be back before the server has noticed that it broke.
        if path in self.busy:
            raise BadRequest(409, "another upload of this file is under way", again=True)

    async def _receive(self, path: Path, checksum: str, offset: int, size: int, request: web.Request) -> dict[str, Any]:
        stored = await self.work(self._stored, path, checksum)
        if stored["complete"]:
            return stored
        if stored["offset"] != offset:
            raise BadRequest(409, f"{stored['offset']} bytes are there: the upload continues from them", again=True)
        partial = self.storage.partial(path, checksum)
        handle = await self.work(self.storage.begin, partial, size)
        try:
            try:
                await self._append(handle, partial, size, request)
            finally:
                await self.work(os.close, handle)
            await self.work(self._accept, partial, path, checksum)
        finally:
            self.storage.end(partial)
        return {"complete": True, "offset": offset + size}

    async def _append(self, handle: int, partial: Path, size: int, request: web.Request) -> None:
        """Write a body to a file."""
        received = counted = 0
        deadline = time.monotonic() + self.limits.stalled_s
        while received < size:
            piece = await self._piece(request, min(PIECE, size - received), deadline - time.monotonic())
            await self.work(self.storage.write, handle, partial, piece)
            received += len(piece)
            self.received += len(piece)
            if received - counted >= LEAST:
                counted, deadline = received, time.monotonic() + self.limits.stalled_s

    async def _piece(self, request: web.Request, most: int, timeout_s: float) -> bytes:
        """The next bytes of a body that has not ended."""
        try:
            async with asyncio.timeout(timeout_s):
                piece = await request.content.read(most)
        except TimeoutError:
            raise BadRequest(408, f"too little came in {self.limits.stalled_s:g} s") from None
        except (ClientError, HttpProcessingError, ConnectionError) as error:
            raise BadRequest(400, f"the body broke off: {type(error).__name__}") from error
        if not piece:
            raise BadRequest(400, "the body is shorter than Content-Length")
        return piece

    def _stored(self, path: Path, checksum: str) -> dict[str, Any]:
        """Whether a file is complete, and how many bytes of it are there."""
        if (state := _state(path)) is not None:
            if self._digest(path, state) != checksum:
                complete = _state(path.parent / MANIFEST) is not None
                there = "the data set is complete" if complete else "another file of this name is there already"
                raise BadRequest(409, f"{there}: it is not changed")
            # The server may have been killed before it was on the disk.
            sync(path)
            sync(path.parent)
            return {"complete": True, "offset": state.st_size}
        if _state(path.parent / MANIFEST) is not None:
            raise BadRequest(409, "the data set is complete: it is not changed")
        partial = _state(self.storage.partial(path, checksum))
        return {"complete": False, "offset": partial.st_size if partial else 0}

    def _digest(self, path: Path, state: os.stat_result) -> str:
        """XXH3-128 of a file; it is not read again while its state is the same."""
        key = state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
        if key not in self._digests:
            if len(self._digests) >= 2**16:
                self._digests.clear()
            self._digests[key] = file_digest(path)
        return self._digests[key]

    def _accept(self, partial: Path, path: Path, checksum: str) -> None:
        """Give an uploaded file its name, if its content fits; otherwise delete it."""
        try:
            if file_digest(partial) != checksum:
                raise BadRequest(422, "the file's checksum is not X-Checksum")
            if path.name == MANIFEST:
                _check_manifest(partial, path.parent)
            elif CHUNK_NAME.fullmatch(path.name):
                read_summary(partial)
        except DamagedError as error:
            self.storage.discard(partial)
            raise BadRequest(422, str(error).replace(str(partial), path.name)) from error
        except BadRequest:
            self.storage.discard(partial)
            raise
        self.storage.publish(partial, path)


def _state(path: Path) -> os.stat_result | None:
    """The state of a regular file; None if there is no file."""
    try:
        return regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except NotServed as error:
        raise BadRequest(409, str(error)) from error


def _check_manifest(partial: Path, folder: Path) -> None:
    """Whether everything that a manifest lists is there."""
    try:
        manifest = Manifest.from_json(partial.read_bytes(), MANIFEST)
    except ValueError as error:
        raise BadRequest(422, str(error)) from error
    if manifest.largest_block > LARGEST_BLOCK:
        most = max(1, LARGEST_BLOCK // manifest.row_bytes)
        text = f"a block has {manifest.largest_block:,} bytes, more than the {LARGEST_BLOCK:,} that are served"
        raise BadRequest(422, f"{text}: generate it again with --block-rows {most} or fewer, into another folder")
    for name in [*(chunk.file for chunk in manifest.chunks), STATISTICS]:
        if _state(folder / name) is None:
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

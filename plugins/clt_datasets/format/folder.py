"""A data set in a folder: blocks of rows, read by several threads at a time, each checked against its checksum.

Uncompressed rows lie in one stretch of the file, so that a block is read without HDF5, whose lock would let only one
thread read at a time. HDF5 itself reads compressed rows.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import xxhash

from clt_datasets.format.chunk import ARRAYS, Style, compression_library, open_chunk, read_summary
from clt_datasets.format.files import digest
from clt_datasets.format.manifest import STATISTICS, Manifest, read_manifest
from clt_datasets.format.read import read_stretches
from clt_plugins import DamagedError, Refused, passing, read_small


class ChunkReader:
    """Reads the blocks of one chunk.

    Args:
        path: the chunk's file.
        manifest: of the data set; None if it is not complete yet.
        number: the chunk's number in the manifest.
        page_cache: whether uncompressed rows are read through the page cache.

    Raises:
        DamagedError: the file is damaged, or not the one that the manifest lists.
        OSError: it cannot be opened (no permission, too many open files).
    """

    def __init__(self, path: Path, manifest: Manifest | None = None, number: int = 0, *, page_cache: bool = True):
        self.path, self.page_cache = path, page_cache
        self.name = f"{path}: " if manifest is None else f"{path}: chunk {number}, "
        self.summary = read_summary(path)
        if manifest is not None:
            listed, size = manifest.chunks[number], path.stat().st_size
            if size != listed.bytes:
                raise DamagedError(f"{path}: truncated or changed: {size} bytes, {listed.bytes} when written")
            if self.summary.checksum != listed.checksum or self.summary.rows != listed.rows:
                raise DamagedError(f"{path}: damaged, or of another data set: its checksum is not the manifest's")
            style = Style(manifest.dtype, manifest.compression, manifest.block_rows)
            if self.summary.style != style or self.summary.row_shapes != manifest.row_shapes:
                raise DamagedError(f"{path}: of another data set: its rows are not stored as the manifest says")
        if self.summary.offsets is None:
            compression_library()

    def verify(self) -> None:
        """Read every block.

        Raises:
            DamagedError: a block's rows are not those that were written; names the first.
        """
        for begin in range(0, self.summary.rows, self.summary.style.block_rows):
            rows = min(self.summary.style.block_rows, self.summary.rows - begin)
            self.read(begin, [np.empty((rows, *shape), dtype) for dtype, shape in self.summary.row_shapes])

    def read(self, begin: int, into: list[np.ndarray]) -> None:
        """Read a block into arrays of its rows.

        Args:
            begin: the block's first row in the chunk.
            into: contiguous arrays, as `Summary.row_shapes` says.

        Raises:
            DamagedError: the rows are not those that were written; names file, chunk and rows.
            OSError: they could not be read now (no permission, too many open files).
        """
        offsets = self.summary.offsets
        try:
            if offsets is None:
                # Looked at again: it may be another file by now.
                with open_chunk(self.path) as file:
                    for name, array in zip(ARRAYS, into, strict=False):
                        file[name].read_direct(array, np.s_[begin : begin + len(array)])
            else:
                stretches = [(offset + begin * x[0].nbytes, x) for offset, x in zip(offsets, into, strict=True)]
                read_stretches(self.path, stretches, page_cache=self.page_cache)
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            if (now := passing(error, self.path)) is not None:
                raise now from error
            raise self._damaged(begin, into, f"cannot be read: {' '.join(str(error).split())}") from error
        if digest(*into) != int(self.summary.checksums[begin // self.summary.style.block_rows]):
            raise self._damaged(begin, into, "damaged: their checksum is not the one that was written")

    def _damaged(self, begin: int, into: list[np.ndarray], what: str) -> DamagedError:
        return DamagedError(f"{self.name}rows {begin} to {begin + len(into[0]) - 1}: {what}")


class LocalData:
    """A data set's files.

    Of each chunk that was read, a few numbers and 8 bytes per block are kept, and no open file.

    Args:
        page_cache: whether uncompressed rows are read through the page cache.
        setting: of a recipe, which names the folder.

    Raises:
        Refused: the folder is no data set.
    """

    def __init__(self, path: Path, *, page_cache: bool = True, setting: str = ""):
        self.path, self.manifest, self.page_cache = path, read_manifest(path, setting), page_cache
        self._readers: dict[int, ChunkReader] = {}
        self._lock = threading.Lock()

    def chunk(self, number: int) -> ChunkReader:
        """A chunk's reader.

        Raises:
            DamagedError: the chunk is missing, truncated or damaged.
        """
        with self._lock:
            reader = self._readers.get(number)
        if reader is None:
            path = self.path / self.manifest.chunks[number].file
            reader = ChunkReader(path, self.manifest, number, page_cache=self.page_cache)
            with self._lock:
                self._readers[number] = reader
        return reader

    def read(self, number: int, begin: int, into: list[np.ndarray]) -> None:
        """Read a block; see `ChunkReader.read`."""
        self.chunk(number).read(begin, into)

    def scales(self, number: int) -> np.ndarray:
        """Scales of a chunk's int8 rows, [2, L] float32."""
        return self.chunk(number).summary.scales

    def statistics(self) -> bytes:
        """The statistics file.

        Raises:
            DamagedError: it is missing or damaged.
        """
        path = self.path / STATISTICS
        try:
            data = read_small(path)
        except Refused as error:
            raise DamagedError(str(error)) from error
        if xxhash.xxh3_128_hexdigest(data) != self.manifest.statistics:
            raise DamagedError(f"{path}: damaged: its checksum is not the manifest's")
        return data

    def close(self) -> None:
        """No file is open."""

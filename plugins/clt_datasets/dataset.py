"""The source `local`: a data set in a folder."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from clt_datasets.format.chunk import ChunkReader
from clt_datasets.format.manifest import STATISTICS, Manifest, read_manifest
from clt_plugins import Batch, DamagedError, StoredSource

if TYPE_CHECKING:
    from clt_datasets import LocalConfig
    from clt_plugins import Context


class Folder:
    """A data set's files; blocks can be read by several threads at a time.

    Of each chunk that was read, a few numbers and 8 bytes per block are kept, and no open file.

    Args:
        page_cache: whether uncompressed rows are read through it.

    Raises:
        ValueError: it is no data set.
    """

    def __init__(self, path: Path, *, page_cache: bool = True):
        self.path, self.manifest, self.page_cache = path, read_manifest(path), page_cache
        self._readers: dict[int, ChunkReader] = {}
        self._lock = threading.Lock()

    def chunk(self, number: int) -> ChunkReader:
        """A chunk's reader.

        Raises:
            DamagedError: the chunk is missing, truncated or damaged.
        """
        with self._lock:
            found = self._readers.get(number)
        if found is None:
            found = ChunkReader(self.path, self.manifest, number, page_cache=self.page_cache)
            with self._lock:
                self._readers[number] = found
        return found

    def read(self, number: int, begin: int, into: list[np.ndarray]) -> None:
        """Read a block; see `ChunkReader.read`."""
        self.chunk(number).read(begin, into)

    def scales(self, number: int) -> np.ndarray:
        """Of int8 rows of a chunk, [2, L]."""
        return self.chunk(number).summary.scales

    def statistics(self) -> bytes:
        """The statistics file, checked.

        Raises:
            DamagedError: it is missing or damaged.
        """
        path = self.path / STATISTICS
        data = path.read_bytes() if path.is_file() else b""
        if xxhash.xxh3_128_hexdigest(data) != self.manifest.statistics:
            raise DamagedError(f"{path}: {'damaged' if data else 'missing'}")
        return data

    def close(self) -> None:
        """Nothing is open."""


class DatasetStore:
    """A `Store` of a data set, in a folder or on a server.

    Args:
        place: where manifest, statistics and blocks come from.
        name: for messages.
    """

    def __init__(self, place: Any, name: str):
        self.place, self.name = place, name
        manifest: Manifest = place.manifest
        self.manifest = manifest
        self.n_layers, self.d_model = manifest.layers, manifest.d_model
        self.block_rows, self.has_tokens = manifest.block_rows, manifest.has_tokens
        self.dtype = torch.float32 if manifest.dtype == "int8" else getattr(torch, manifest.dtype)
        self.identity = manifest.identity
        self.numbers = {
            part: [number for number, chunk in enumerate(manifest.chunks) if chunk.part == part]
            for part in ("train", "held_out")
        }
        self.chunks: Mapping[Any, Sequence[int]] = {
            part: [manifest.chunks[number].rows for number in numbers] for part, numbers in self.numbers.items()
        }

    def read(self, part: str, chunk: int, begin: int, into: Batch) -> None:
        """See `Store.read`."""
        number = self.numbers[part][chunk]
        given = [into.inputs, into.targets, into.token_ids, into.positions]
        arrays = []
        for (dtype, shape), tensor in zip(self.manifest.row_shapes, given, strict=False):
            assert tensor is not None
            # What is stored as it is handed out is read straight into its place.
            direct = tensor.element_size() == dtype.itemsize
            arrays.append(_array(tensor, dtype) if direct else np.empty((into.tokens, *shape), dtype))
        self.place.read(number, begin, arrays)
        if self.manifest.dtype == "int8":
            scales = torch.from_numpy(self.place.scales(number))
            for tensor, array, scale in zip((into.inputs, into.targets), arrays, scales, strict=False):
                tensor.copy_(torch.from_numpy(array)).mul_(scale[:, None])
        if into.token_ids is not None:
            into.token_ids.copy_(torch.from_numpy(arrays[2]))

    def statistics(self) -> Mapping[str, Tensor]:
        """As generated."""
        from safetensors.torch import load

        return load(self.place.statistics())

    def close(self) -> None:
        """Close the place."""
        self.place.close()


def _array(tensor: Tensor, dtype: np.dtype[Any]) -> np.ndarray:
    """The memory of a contiguous tensor."""
    return tensor.view(torch.uint8).numpy().view(dtype).reshape(tensor.shape)


def build_local(config: LocalConfig, context: Context) -> StoredSource:
    """The source `local`."""
    store = DatasetStore(Folder(config.path, page_cache=config.page_cache), str(config.path))
    return StoredSource(store, context, buffer_tokens=config.buffer_tokens, on_corrupt=config.on_corrupt)

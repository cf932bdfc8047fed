"""A data set as a store of rows, wherever it is; and the source `local`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clt_datasets.format.folder import LocalData
from clt_datasets.format.manifest import STATISTICS, Manifest
from clt_datasets.format.statistics import read_statistics
from clt_plugins import Batch, StoredSource

if TYPE_CHECKING:
    from clt_datasets import LocalConfig
    from clt_plugins import Context


class Data(Protocol):
    """A data set in a folder (`LocalData`) or on a server (`RemoteData`); used by several threads at a time."""

    manifest: Manifest

    def read(self, number: int, begin: int, into: list[np.ndarray]) -> None:
        """Read the block that begins at row `begin` of a chunk into arrays, as `Manifest.row_shapes` says.

        Raises:
            DamagedError: the rows are not those that were written; names file, chunk and rows.
        """

    def scales(self, number: int) -> np.ndarray:
        """Scales of a chunk's int8 rows, [2, L] float32."""

    def statistics(self) -> bytes:
        """The statistics file.

        Raises:
            DamagedError: it is missing or damaged.
        """

    def close(self) -> None:
        """Release files and connections."""


class DatasetStore:
    """A `Store` of a data set.

    Args:
        data: in a folder or on a server.
        name: for messages.
    """

    def __init__(self, data: Data, name: str):
        self.data, self.name = data, name
        self.manifest = manifest = data.manifest
        self.n_layers, self.d_model = manifest.n_layers, manifest.d_model
        self.block_rows, self.has_tokens = manifest.block_rows, manifest.has_tokens
        self.dtype = torch.float32 if manifest.dtype == "int8" else getattr(torch, manifest.dtype)
        self.identity = manifest.identity
        self.numbers = {
            part: [number for number, chunk in enumerate(manifest.chunks) if chunk.part == part]
            for part in ("train", "held_out")
        }
        """The numbers of each part's chunks in the manifest."""
        self.chunks: Mapping[Any, Sequence[int]] = {
            part: [manifest.chunks[number].rows for number in numbers] for part, numbers in self.numbers.items()
        }

    def read(self, part: str, chunk: int, begin: int, into: Batch) -> None:
        """See `Store.read`."""
        number = self.numbers[part][chunk]
        tensors = [into.inputs, into.targets, into.token_ids, into.positions]
        arrays = []
        for (dtype, shape), tensor in zip(self.manifest.row_shapes, tensors, strict=False):
            assert tensor is not None
            # What is stored in the tensor's own type is read straight into its memory.
            direct = tensor.element_size() == dtype.itemsize
            arrays.append(_memory(tensor, dtype) if direct else np.empty((into.tokens, *shape), dtype))
        self.data.read(number, begin, arrays)
        if self.manifest.dtype == "int8":
            scales = torch.from_numpy(self.data.scales(number))
            for tensor, array, scale in zip((into.inputs, into.targets), arrays, scales, strict=False):
                tensor.copy_(torch.from_numpy(array)).mul_(scale[:, None])
        if into.token_ids is not None:
            into.token_ids.copy_(torch.from_numpy(arrays[2]))

    def statistics(self) -> Mapping[str, Tensor]:
        """The statistics that were written with the data."""
        return read_statistics(self.data.statistics(), self.n_layers, self.d_model, f"{self.name}/{STATISTICS}")

    def close(self) -> None:
        """Release files and connections."""
        self.data.close()


def _memory(tensor: Tensor, dtype: np.dtype[Any]) -> np.ndarray:
    """The memory of a contiguous tensor, as an array of another type of the same size."""
    return tensor.view(torch.uint8).numpy().view(dtype).reshape(tensor.shape)


def build_local(config: LocalConfig, context: Context) -> StoredSource:
    """The source `local`."""
    setting = "source.path"
    data = LocalData(config.path, page_cache=config.page_cache, setting=setting)
    return StoredSource(
        DatasetStore(data, str(config.path)),
        context,
        buffer_tokens=config.buffer_tokens,
        on_corrupt=config.on_corrupt,
        setting=setting,
    )

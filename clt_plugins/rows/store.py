"""What a source of stored rows reads from, a `Store`; and its memory: buffers, and the memory of batches."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from clt_plugins.data.batch import Batch

Part = Literal["train", "held_out"]


class Store(Protocol):
    """Rows that can be read in blocks, by several threads at a time."""

    n_layers: int
    d_model: int
    dtype: torch.dtype
    """The type of the activations that `read` fills in."""
    has_tokens: bool
    """Whether token ids and positions are known."""
    chunks: Mapping[Part, Sequence[int]]
    """Rows of each chunk, of the part to train on and of the held-out part."""
    block_rows: int
    """Rows of a block; blocks begin at multiples of it, and the last one of a chunk may be shorter."""
    name: str
    """Where the data are, for messages."""

    @property
    def identity(self) -> str:
        """Changes with the data, and not with their path: a saved position is valid in the same data only."""

    def read(self, part: Part, chunk: int, begin: int, into: Batch) -> None:
        """Fill `into` with a block's rows, from row `begin` of the chunk on.

        Raises:
            DamagedError: they are not what was written.
        """

    def statistics(self) -> Mapping[str, Tensor] | None:
        """See `Source.statistics`."""

    def close(self) -> None:
        """Release files and connections; readings under way may fail."""


AHEAD = 2
"""Batches that are made before they are asked for."""


class Buffer:
    """Memory for the blocks of a group."""

    def __init__(self, rows: int, store: Store):
        self.rows = empty(rows, store, _huge)
        self.order = torch.empty(0, dtype=torch.int64)
        """The rows in the order in which they are yielded."""


class Shelf:
    """Memory for batches of one size, used again as soon as no tensor holds it.

    On a CPU the first touch of fresh memory costs more than all other work on a batch. Pinned memory needs no shelf:
    torch's own allocator keeps it.
    """

    def __init__(self, *, pinned: bool):
        self.pinned = pinned
        self.free: deque[np.ndarray] = deque(maxlen=4 + 2 * AHEAD)
        self.closed = False

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        if self.pinned:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        size = torch.Size(shape).numel() * dtype.itemsize
        raw = self.free.popleft() if self.free else np.empty(size, np.uint8)
        # All tensors that share the memory hold this view of it, and nothing else does.
        view = raw[:]
        weakref.finalize(view, self._give_back, raw).atexit = False
        return torch.from_numpy(view).view(dtype).view(shape)

    def close(self) -> None:
        """Keep nothing from here on."""
        self.closed = True
        self.free.clear()

    def _give_back(self, raw: np.ndarray) -> None:
        if not self.closed:
            self.free.append(raw)


def empty(rows: int, store: Store, make: Callable[..., Tensor]) -> Batch:
    """A batch to be filled; the activations are made by `make(shape, dtype=...)`."""
    inputs, targets = (make((rows, store.n_layers, store.d_model), dtype=store.dtype) for _ in range(2))
    if not store.has_tokens:
        return Batch(inputs, targets)
    return Batch(inputs, targets, torch.empty(rows, dtype=torch.int64), torch.empty(rows, 2, dtype=torch.int64))


def _huge(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in NumPy's memory: it is in huge pages, whose first touch is a hundred times faster."""
    return torch.from_numpy(np.empty(torch.Size(shape).numel() * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def tensors(batch: Batch) -> list[Tensor]:
    return [x for x in (batch.inputs, batch.targets, batch.token_ids, batch.positions) if x is not None]

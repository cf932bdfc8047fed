"""Memory of a stored source: its buffers, and the batches that it hands out."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clt_plugins.data.batch import Batch

if TYPE_CHECKING:
    from clt_plugins.rows.source import Store

AHEAD = 2
"""Batches that are made ahead."""


class Buffer:
    """Room for the blocks of a group."""

    def __init__(self, rows: int, store: Store):
        self.rows = empty(rows, store, _room)
        self.order = torch.empty(0, dtype=torch.int64)
        """Which row is handed out when."""


class Shelf:
    """Memory for batches of one size, used again as soon as nobody holds its tensors.

    The first touch of fresh memory costs more than all else that is done to a batch on a CPU; pinned memory is kept by
    torch's own allocator.
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
    inputs, targets = (make((rows, store.layers, store.d_model), dtype=store.dtype) for _ in range(2))
    if not store.has_tokens:
        return Batch(inputs, targets)
    return Batch(inputs, targets, torch.empty(rows, dtype=torch.int64), torch.empty(rows, 2, dtype=torch.int64))


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in NumPy's memory, which asks for huge pages: they are touched a hundred times faster."""
    return torch.from_numpy(np.empty(torch.Size(shape).numel() * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def tensors(batch: Batch) -> list[Tensor]:
    return [x for x in (batch.inputs, batch.targets, batch.token_ids, batch.positions) if x is not None]

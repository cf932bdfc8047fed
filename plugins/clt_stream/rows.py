"""The memory that activations are read into.

Shapes: R rows, L layers, D d_model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clt_plugins import Batch, Refused

if TYPE_CHECKING:
    from clt_stream.contexts import Contexts


class Rows:
    """Memory for R tokens: their activations, ids and positions.

    Args:
        setting: the recipe's setting that `count` comes from.

    Raises:
        Refused: the device has too little memory.
    """

    def __init__(self, count: int, n_layers: int, d_model: int, dtype: torch.dtype, device: torch.device, setting: str):
        try:
            self.inputs, self.targets = (_empty((count, n_layers, d_model), dtype, device) for _ in range(2))
        except (MemoryError, torch.OutOfMemoryError) as error:
            size = 2 * count * n_layers * d_model * dtype.itemsize / 1e9
            raise Refused(setting, f"{count} rows need {size:.1f} GB, more than {device} has free") from error
        self.token_ids = torch.empty(count, dtype=torch.int64, device=device)
        self.positions = torch.empty(count, 2, dtype=torch.int64, device=device)

    def view(self, rows: slice) -> Batch:
        """Neighbouring rows, not copied."""
        return Batch(self.inputs[rows], self.targets[rows], self.token_ids[rows], self.positions[rows])

    def pick(self, index: Tensor) -> Batch:
        """Copies of the rows at `index`, [B]."""
        # Three times as fast as `x[index]`, since it copies whole rows.
        return Batch(*(x.index_select(0, index) for x in self._tensors()))

    def take(self, source: Rows, rows: slice, to: int) -> None:
        """Copy rows of some memory, which may be this one, to the rows from `to` on."""
        for x, other in zip(self._tensors(), source._tensors(), strict=True):
            x[to : to + rows.stop - rows.start] = other[rows].clone() if x is other else other[rows]

    def label(self, contexts: Contexts, rows: Tensor, at: slice) -> None:
        """Write which tokens some rows are of.

        Args:
            rows: indices into C * T, [R].
        """
        self.token_ids[at] = moved(contexts.ids.flatten()[rows], self.token_ids.device)
        self.positions[at] = moved(contexts.positions(rows), self.positions.device)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.inputs, self.targets, self.token_ids, self.positions


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on another device. No copy waits for what a GPU still has to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; on a CPU in memory from NumPy, which asks for huge pages.

    A block is written in strides, and its rows are read in random order. With small pages, looking up the address of
    each row takes as long as copying it.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    raw = np.empty(torch.Size(shape).numel() * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)

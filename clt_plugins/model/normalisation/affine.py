"""What a normalisation needs besides its formula: buffers, `inputs`, `targets`, `restore`, `fold`.

Shapes: B tokens, L layers, D d_model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from clt_plugins.data.affine import Affine, Folding, rows_times
from clt_plugins.errors import Refused
from clt_plugins.model.normalisation.statistics import unusable

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context

Side = Literal["input", "target"]
SIDES: tuple[Side, Side] = ("input", "target")


class AffineNormalisation(nn.Module):
    """A normalisation by a shift and a scale for each layer. A subclass says which statistics it `needs`, and sets its
    buffers in `fit`; it is a complete `Normalisation` then.

    Buffers, each for `input` and `target`, in at least float32 (statistics stay so where weights are bfloat16):

    - `input_shift` [L, D]: 0 at first;
    - `input_scale`, raw units per normalised unit: [L, D], 1 at first; or a matrix for each layer [L, D, D], the
      identity at first. Then there is also `input_inverse` [L, D, D], which `fit` must set too.

    Args:
        context: sizes, device, and the type of the weights.
        matrix: the sides, "input" and "target", whose scale is a matrix.
        identity: activations stay as they are, so no copy is made of them.
    """

    needs: tuple[str, ...] = ()

    def __init__(self, context: Context, *, matrix: Collection[Side] = (), identity: bool = False):
        super().__init__()
        self.identity = identity
        self.matrix = tuple(matrix)
        where: dict[str, Any] = {"dtype": torch.promote_types(context.dtype, torch.float32), "device": context.device}
        L, D = context.n_layers, context.d_model
        for side in SIDES:
            self.register_buffer(f"{side}_shift", torch.zeros(L, D, **where))
            if side in self.matrix:
                for name in ("scale", "inverse"):
                    self.register_buffer(f"{side}_{name}", torch.eye(D, **where).repeat(L, 1, 1))
            else:
                self.register_buffer(f"{side}_scale", torch.ones(L, D, **where))

    def fit(self, statistics: Mapping[str, Tensor]) -> None:
        """Set the buffers; see `Normalisation.fit`. Here nothing is to be set."""

    def side(self, side: Side) -> Affine:
        """What is done to inputs, or to targets: the buffers themselves, so that `fit` may fill them."""
        return Affine(
            self.get_buffer(f"{side}_shift"),
            self.get_buffer(f"{side}_scale"),
            self.get_buffer(f"{side}_inverse") if side in self.matrix else None,
        )

    def units(self) -> Affine:
        """See `Normalisation.units`."""
        return self.side("target")

    def fold(self) -> Folding:
        """See `Normalisation.fold`."""
        return Folding(self.side("input"), self.side("target"))

    def inputs(self, raw: Tensor) -> Tensor:
        """Raw MLP inputs [B, L, D] -> normalised."""
        return self._normalised(raw, self.side("input"))

    def targets(self, raw: Tensor) -> Tensor:
        """Raw MLP outputs [B, L, D] -> normalised."""
        return self._normalised(raw, self.side("target"))

    def _normalised(self, raw: Tensor, units: Affine) -> Tensor:
        dtype = units.shift.dtype
        if self.identity or torch.promote_types(raw.dtype, dtype) != dtype:
            raw = raw.to(dtype)
        if self.identity:
            # No copy of the activations: at large batches that is a pass over 2 · B·L·D numbers.
            return raw
        # Narrow activations are widened as they are read, which is a pass less.
        if units.inverse is not None:
            return rows_times(raw - units.shift, units.inverse)
        # (raw - shift) / scale in one pass. Its summands have the size of raw / scale, so rounding them costs no more
        # than the rounding of raw has cost already, also where the shift is large.
        inverse = units.scale.reciprocal()
        return torch.addcmul(-units.shift * inverse, raw, inverse)

    def restore(self, normalised: Tensor) -> Tensor:
        """Normalised outputs [B, L, D] in raw units."""
        return normalised if self.identity else self.units().restore(normalised)

    def check_stored(self, origin: str | Path) -> None:
        """Refuse scales from a file that no activation can be divided by.

        Args:
            origin: the file.

        Raises:
            Refused: a scale is not a positive number; names layer and dimension.
        """
        for side in SIDES:
            scale = self.get_buffer(f"{side}_scale")
            if side not in self.matrix and (wrong := unusable(scale, negative=False, zero=False)):
                raise Refused(
                    origin, f"normaliser.{side}_scale: {wrong}: the file is damaged, or was written by a broken run"
                )

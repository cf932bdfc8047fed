"""How normalised activations and raw ones belong together.

Shapes: L layers, D d_model; `...` any number of axes, such as the tokens of a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@attrs.frozen(eq=False)
class Affine:
    """For each layer: raw = normalised · scale + shift, and normalised = (raw - shift) / scale.

    `scale` is a number for each dimension, or a matrix for each layer. An activation is a row, so a matrix multiplies
    it from the right, and its inverse undoes that.

    Raises:
        ValueError: the shapes do not fit, or a matrix has no inverse with it.
    """

    shift: Tensor
    """[L, D], in raw units."""
    scale: Tensor
    """Raw units per normalised unit: [L, D], or [L, D, D]."""
    inverse: Tensor | None = None
    """The inverse of each matrix, [L, D, D]; None where the scale is [L, D]."""

    def __attrs_post_init__(self) -> None:
        matrix = (*self.shift.shape, self.shift.shape[-1])
        shapes = [tuple(x.shape) for x in (self.scale, self.inverse) if x is not None]
        if self.shift.dim() != 2 or shapes not in ([tuple(self.shift.shape)], [matrix, matrix]):
            raise ValueError(
                f"shift must be [layers, d_model], scale the same, or a matrix for each layer with its inverse; got "
                f"shift {tuple(self.shift.shape)} and {shapes}"
            )

    @property
    def diagonal(self) -> bool:
        """Whether the scale is a number for each dimension, [L, D]."""
        return self.inverse is None

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw activations [..., L, D] -> normalised; a new tensor."""
        return self.normalised(raw - self.shift)

    def restore(self, normalised: Tensor) -> Tensor:
        """Normalised activations [..., L, D] -> raw; a new tensor."""
        return self.raw(normalised) + self.shift

    def raw(self, difference: Tensor) -> Tensor:
        """A difference of normalised activations, such as an error, in raw units; [..., L, D]."""
        return difference * self.scale if self.diagonal else rows_times(difference, self.scale)

    def normalised(self, difference: Tensor) -> Tensor:
        """A difference of raw activations in normalised units; [..., L, D]."""
        return difference / self.scale if self.inverse is None else rows_times(difference, self.inverse)

    def readers(self, rows: Tensor) -> Tensor:
        """Rows [..., L, D] whose products with normalised activations are taken -> those for raw ones.

        row · normalised = readers(row) · (raw - shift): so an encoder on normalised inputs becomes one on raw inputs.
        """
        return rows / self.scale if self.inverse is None else rows_times(rows, self.inverse.mT)

    def layers(self, start: int, stop: int | None = None) -> Affine:
        """The same for some layers."""
        part = slice(start, stop)
        return Affine(self.shift[part], self.scale[part], None if self.inverse is None else self.inverse[part])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Affine:
        """The same numbers on another device, in another type."""
        inverse = None if self.inverse is None else self.inverse.to(device, dtype)
        return Affine(self.shift.to(device, dtype), self.scale.to(device, dtype), inverse)


@attrs.frozen(eq=False)
class Folding:
    """What a normalisation does to inputs and targets, for exporters that fold it into the weights."""

    inputs: Affine
    targets: Affine


def rows_times(rows: Tensor, matrices: Tensor) -> Tensor:
    """Rows [..., L, D] times a matrix for each layer [L, D, D]; contiguous."""
    flat = rows.reshape(-1, *matrices.shape[:2]).transpose(0, 1)
    return (flat @ matrices).transpose(0, 1).reshape(rows.shape).contiguous()

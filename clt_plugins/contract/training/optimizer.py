"""What `[optimizer]` builds: what changes weights by their gradients.

Shapes: L layers, D d_model, F features per layer (of this rank).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import attrs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Role = Literal["encoder", "decoder", "bias", "threshold", "loss", "other"]
"""What a weight is for: matrices of the encoder and of the decoder (its skip path too), what is added (biases, offsets)
or multiplied (scales) beside them, parameters of the activation, of losses, and all else."""


@attrs.frozen(eq=False)
class Piece:
    """A part of a weight that files hold as one tensor; the same for any number of ranks."""

    name: str
    """Its name in files: `W_enc`, `W_dec.03`."""
    key: int = 0
    """32 bits that follow from the run's seed and the name, for random numbers."""
    view: Callable[[Tensor], Tensor] = lambda x: x
    """From a tensor of the weight's shape to the part: a view, contiguous where the tensor is."""
    axis: int | None = None
    """The axis of the part that counts features; None if every rank has all of it."""
    own: range = range(0)
    """This rank's features along that axis,"""
    features: int = 0
    """of so many of all ranks."""

    def numbering(self, shape: torch.Size) -> dict[str, int]:
        """`first`, `period` and `stride` of an `AdamUpdate` of the part, whose rows are along its last axis.

        Args:
            shape: the part's.
        """
        if self.axis is None:
            return {"first": 0, "period": max(1, shape[:-1].numel()), "stride": 0}
        inner = shape[self.axis + 1 :].numel()
        period = len(self.own) * inner // shape[-1] if self.axis < len(shape) - 1 else 1
        return {"first": self.own.start * inner, "period": period, "stride": self.features * inner}


@attrs.frozen(eq=False, kw_only=True)
class Weight:
    """A parameter that is trained."""

    name: str
    """`encoder.W_enc`, `tying.weight`, `activation.log_threshold`, `losses[1].scale`."""
    parameter: nn.Parameter
    """This rank's part of it: its features, where it has some."""
    role: Role
    rows: bool
    """Whether it holds rows, of features or between dimensions: matrices, which weight decay is for."""
    lr_factor: float = 1.0
    """What the plugin that made it multiplies the learning rate by (`parameter(..., lr_factor=...)`). An optimizer puts
    it into `group["lr_factor"]`, times its own."""
    pieces: Sequence[Piece]
    """How it is cut; together they are all of it."""


class Optimizer(Protocol):
    """Makes the optimizer of a run."""

    def make(self, weights: Sequence[Weight]) -> torch.optim.Optimizer:
        """The optimizer, with every weight in one of its groups.

        Before every step the engine sets `group["lr"]`: the rate of the step, times `group["lr_factor"]` if there is
        one. A rate that is a tensor is filled, so that it can lie on a GPU. Gradients of weights that a step does not
        reach are None.

        The engine saves the tensors in `optimizer.state[parameter]`, and numbers beside them: of the parameter's shape,
        or with length 1 along axes that do not count features (one number per row), split over ranks as the parameter
        is; counts (no axes); and others where all features are on one rank. What else it keeps, such as in groups, is
        not saved.

        With `_step_supports_amp_scaling = True`, as torch's fused optimizers have it, gradients are clipped as they are
        read: they are to be divided by `grad_scale`, a float32 scalar on their device, where that is set. For others
        the engine scales them.

        Raises:
            Refused: it cannot train these weights, or not split over ranks (`context.parallel`); says what to set.
        """

    def state_bytes(self, weight: Weight) -> int:
        """Bytes that it keeps beside a weight, without counts; its parameter may be on the device "meta"."""

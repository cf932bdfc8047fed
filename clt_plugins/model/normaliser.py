"""Normalisation of activations. Its statistics are saved in the transcoder, so a transcoder works on raw activations.

Every method is a shift and a scale per layer and dimension, so one pair of tensors holds them all:

| method | shift | scale |
| --- | --- | --- |
| `none` | 0 | 1 |
| `mean_std` | mean of each dimension | standard deviation of each dimension |
| `rms` | 0 | root of the mean square, one number per layer |
| `sqrt_d_model` | 0 | 1 / sqrt(D) |

Shapes: B tokens, L layers, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from clt_plugins.data.moments import Moments
from clt_plugins.errors import Refused

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Parallel
    from clt_plugins.data.batch import Batch

Method = Literal["none", "mean_std", "rms", "sqrt_d_model"]

EPSILON = 1e-6
"""Added to standard deviations, as the reference library does, so that a constant dimension stays finite."""


def estimate(
    batches: Iterable[Batch], n_layers: int, d_model: int, parallel: Parallel | None = None
) -> dict[str, Tensor]:
    """Statistics of some batches, of all ranks: see `Moments.statistics`.

    Raises:
        Refused: there are fewer than two tokens.
    """
    moments = Moments(n_layers, d_model)
    for batch in batches:
        moments.add(batch)
    if parallel is not None and parallel.data_ranks > 1:
        moments.total(parallel)
    if moments.count < 2:
        raise Refused(
            "transcoder.normalisation_tokens", f"statistics need at least 2 tokens, got {moments.count}: raise it"
        )
    return moments.statistics()


class Normaliser(nn.Module):
    """Shifts and scales raw activations to normalised ones, and reconstructions back to raw units.

    Buffers, [L, D]: `input_shift`, `input_scale`, `target_shift`, `target_scale`; and `target_variance` [L], the
    variance of the raw targets (mean over dimensions), which makes errors comparable between layers.

    Args:
        n_layers: L.
        d_model: D.
        identity: activations stay as they are (normalisation "none"), so no copy is made of them.
    """

    input_shift: Tensor
    input_scale: Tensor
    target_shift: Tensor
    target_scale: Tensor
    target_variance: Tensor

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        identity: bool = False,
    ):
        super().__init__()
        self.identity = identity
        for side in ("input", "target"):
            self.register_buffer(f"{side}_shift", torch.zeros(n_layers, d_model, dtype=dtype, device=device))
            self.register_buffer(f"{side}_scale", torch.ones(n_layers, d_model, dtype=dtype, device=device))
        self.register_buffer("target_variance", torch.ones(n_layers, dtype=dtype, device=device))

    def reset(self) -> None:
        """Set all shifts to 0, all scales and variances to 1: activations stay as they are."""
        for name, value in self.named_buffers():
            value.fill_(0 if name.endswith("shift") else 1)

    def detect_method(self) -> Method:
        """The method that shifts and scales from another tool's file correspond to: "none" or "mean_std".

        It is "none" where they change nothing; then `identity` is set.
        """
        shifted = any(bool(self.get_buffer(f"{side}_shift").any()) for side in ("input", "target"))
        scaled = any(bool((self.get_buffer(f"{side}_scale") != 1).any()) for side in ("input", "target"))
        self.identity = not (shifted or scaled)
        return "none" if self.identity else "mean_std"

    def fit(self, method: Method, statistics: Mapping[str, Tensor]) -> None:
        """Set shifts and scales for a method.

        Args:
            statistics: see `Moments.statistics`; computed, or stored by a source.

        Raises:
            Refused: the statistics have other shapes, or are not finite.
        """
        shape = self.input_shift.shape
        for name, value in statistics.items():
            fits = value.shape in (shape, shape[:1])
            if not fits or not bool(torch.isfinite(value).all()):
                got = "NaN or infinite ones" if fits else str(tuple(value.shape))
                raise Refused(
                    "source", f"statistics {name}: expected finite numbers of shape {tuple(shape)}, got {got}"
                )
        self.identity = method == "none"
        for side in ("input", "target"):
            shift, scale = getattr(self, f"{side}_shift"), getattr(self, f"{side}_scale")
            shift.zero_()
            if method == "none":
                scale.fill_(1)
            elif method == "sqrt_d_model":
                scale.fill_(shape[1] ** -0.5)
            elif method == "rms":
                # One number per layer: directions keep their relative size.
                scale.copy_(statistics[f"{side}s.rms"][:, None].clamp_min(EPSILON).expand(shape))
            else:
                shift.copy_(statistics[f"{side}s.mean"])
                scale.copy_(statistics[f"{side}s.std"] + EPSILON)
        # Kept for every method, since losses and metrics divide errors by it. The bound keeps a constant layer finite.
        self.target_variance.copy_(statistics["targets.std"].square().mean(1).clamp_min(EPSILON**2))

    def inputs(self, raw: Tensor) -> Tensor:
        """Raw MLP inputs [B, L, D] -> normalised."""
        return self._normalised(raw, self.input_shift, self.input_scale)

    def targets(self, raw: Tensor) -> Tensor:
        """Raw MLP outputs [B, L, D] -> normalised."""
        return self._normalised(raw, self.target_shift, self.target_scale)

    def _normalised(self, raw: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        raw = raw.to(shift.dtype)
        # "none" makes no copy of the activations: at large batches that is a pass over 2 · B·L·D numbers.
        return raw if self.identity else (raw - shift).div_(scale)

    def restore(self, reconstruction: Tensor) -> Tensor:
        """A normalised reconstruction [B, L, D], in raw units."""
        return reconstruction if self.identity else reconstruction * self.target_scale + self.target_shift

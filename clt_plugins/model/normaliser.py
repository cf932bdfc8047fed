"""Normalisation of activations. Its statistics are saved in the transcoder, so a transcoder works on raw activations.

Every method is a shift and a scale per layer and dimension, so one pair of tensors holds them all:

| method | shift | scale |
| --- | --- | --- |
| `none` | 0 | 1 |
| `mean_std` | mean of each dimension | standard deviation of each dimension |
| `rms` | 0 | root of the mean square, one number per layer |
| `sqrt_d_model` | 0 | mean norm of a token / sqrt(D), one number per layer: the mean norm becomes sqrt(D) |

A dimension that never varied among the tokens of the statistics has no standard deviation. `mean_std` scales it as the
layer's other dimensions: divided by almost 0, a first deviation in later data would be larger than everything else.

Shapes: B tokens, L layers, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from clt_plugins.data.moments import Moments
from clt_plugins.errors import ExitCode, Refused, Stopped

if TYPE_CHECKING:
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.data.batch import Batch

Method = Literal["none", "mean_std", "rms", "sqrt_d_model"]

EPSILON = 1e-6
"""Added to standard deviations, as the reference library does, so that a constant dimension stays finite."""


SIDES = {"inputs": "MLP inputs", "targets": "MLP outputs"}


def estimate(
    batches: Iterable[Batch], n_layers: int, d_model: int, parallel: Parallel | None = None
) -> dict[str, Tensor]:
    """Statistics of some batches, of all ranks: see `Moments.statistics`; and `inputs.norm` and `targets.norm`, the
    mean over tokens of ‖activation‖, [L].

    Raises:
        Refused: there are fewer than two tokens, or a number among them is not finite; names layer, dimension and type.
    """
    moments = Moments(n_layers, d_model)
    norms = torch.zeros(2, n_layers, dtype=torch.float64)
    unfinished = ""
    for batch in batches:
        unfinished = unfinished or not_finite(batch)
        moments.add(batch)
        for total, side in zip(norms, SIDES, strict=True):
            total += getattr(batch, side).detach().cpu().double().norm(dim=-1).sum(0)
    if parallel is not None and parallel.data_ranks > 1:
        moments.total(parallel)
        norms = parallel.total(norms, over="tokens")
        # Each rank saw other tokens: all must refuse what one of them cannot use.
        unfinished = next(filter(None, parallel.gather(unfinished)), "")
    if unfinished:
        # One rank tells the user.
        raise Refused("source", unfinished) if parallel is None or parallel.rank == 0 else Stopped(ExitCode.USAGE, "")
    if moments.count < 2:
        raise Refused(
            "transcoder.normalisation_tokens", f"statistics need at least 2 tokens, got {moments.count}: raise it"
        )
    statistics = moments.statistics()
    for total, side in zip(norms, SIDES, strict=True):
        statistics[f"{side}.norm"] = total / moments.count
    return statistics


def not_finite(batch: Batch) -> str:
    """Where a batch has a number that is not finite, and what to do; "" if it has none."""
    for side, name in SIDES.items():
        x: Tensor = getattr(batch, side)
        bad = ~torch.isfinite(x)
        if bool(bad.any()):
            token, layer, dimension = bad.nonzero()[0].tolist()
            dtype = str(x.dtype).removeprefix("torch.")
            return (
                f"an activation of layer {layer} is not a finite number in {dtype}: "
                f"{float(x[token, layer, dimension])} in dimension {dimension} of its {name}: set model.dtype = "
                '"float32" or "bfloat16", or generate stored activations again'
            )
    return ""


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
            statistics: see `estimate`; computed, or stored by a source, which need not have the norms.

        Raises:
            Refused: the statistics have other shapes, or are not finite.
        """
        shape = self.input_shift.shape
        for name, value in statistics.items():
            if value.shape not in (shape, shape[:1]):
                text = f"expected numbers of shape {tuple(shape)}, got {tuple(value.shape)}"
                raise Refused("source", f"statistics {name}: {text}")
            if wrong := unusable(value, negative=name.endswith("mean")):
                raise Refused(
                    "source", f"statistics {name}: {wrong}; estimate them from activations that are finite numbers"
                )
        self.identity = method == "none"
        for side in ("input", "target"):
            shift, scale = getattr(self, f"{side}_shift"), getattr(self, f"{side}_scale")
            shift.zero_()
            if method == "none":
                scale.fill_(1)
            elif method == "sqrt_d_model":
                # A layer that writes nothing has no norm.
                norm = statistics[f"{side}s.norm"][:, None] * shape[1] ** -0.5
                scale.copy_(norm.clamp_min(EPSILON).expand(shape))
            elif method == "rms":
                # One number per layer: directions keep their relative size.
                scale.copy_(statistics[f"{side}s.rms"][:, None].clamp_min(EPSILON).expand(shape))
            else:
                shift.copy_(statistics[f"{side}s.mean"])
                scale.copy_(_deviations(statistics[f"{side}s.std"]) + EPSILON)
        # Kept for every method, since losses and metrics divide errors by it. The bound keeps a constant layer finite.
        self.target_variance.copy_(statistics["targets.std"].square().mean(1).clamp_min(EPSILON**2))

    def check_stored(self, origin: str | Path) -> None:
        """Refuse statistics from a file that no activation can be normalised with.

        Args:
            origin: the file.

        Raises:
            Refused: a number is not finite, or a scale is not positive; names layer and dimension.
        """
        for name, value in self.named_buffers():
            # A layer that writes nothing has a variance of 0 in other tools' files.
            zero = name == "target_variance"
            if wrong := unusable(value, negative=name.endswith("shift"), zero=zero):
                raise Refused(
                    origin, f"normaliser.{name}: {wrong}: the file is damaged, or was written by a broken run"
                )

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


def unusable(values: Tensor, *, negative: bool, zero: bool = True) -> str:
    """The first of some statistics, [L, D] or [L], that makes no sense; "" if there is none.

    Args:
        negative: whether numbers may be below 0 (means); then they may be 0 too.
        zero: whether they may be 0 (a deviation may, a scale may not).
    """
    bad = ~torch.isfinite(values)
    if not negative:
        bad |= (values < 0) if zero else (values <= 0)
    if not bool(bad.any()):
        return ""
    where = bad.nonzero()[0].tolist()
    names = zip(("layer", "dimension"), where, strict=False)
    return f"{float(values[tuple(where)])} at {', '.join(f'{name} {index}' for name, index in names)}"


def _deviations(std: Tensor) -> Tensor:
    """Standard deviations [L, D]; of a dimension without one, the root mean square of those of its layer."""
    varies = std > 0
    square = std.square().sum(1, keepdim=True) / varies.sum(1, keepdim=True).clamp_min(1)
    # A layer that never varies stays at 0: errors are divided by its variance, which is 0 too.
    return torch.where(varies, std, square.sqrt())

"""Streamed mean, standard deviation and root mean square of activations.

Shapes: B tokens, L layers, D d_model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clt_plugins.data.batch import Batch


class Totals(Protocol):
    """The part of `Parallel` that moments need; this folder imports nothing from the contract."""

    def total(self, x: Tensor, over: Literal["tokens"]) -> Tensor:
        """A sum over the ranks that share the tokens."""


class Moments:
    """Streamed mean, standard deviation and root mean square of the inputs and targets, in float64.

    Args:
        n_layers: L.
        d_model: D.
        device: where the sums are kept; batches are copied there.
    """

    def __init__(self, n_layers: int, d_model: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.sums = {
            side: torch.zeros(2, n_layers, d_model, dtype=torch.float64, device=device)
            for side in ("inputs", "targets")
        }
        # Sums of squares about zero lose digits where a mean is large; a shift near the mean keeps them.
        self.shift: dict[str, Tensor] = {}

    def add(self, batch: Batch) -> None:
        """Add a batch of B tokens."""
        self.count += batch.tokens
        for side, sums in self.sums.items():
            # float64: sums over millions of tokens lose digits in float32.
            x = getattr(batch, side).to(sums.device, torch.float64)
            shift = self.shift.setdefault(side, x.mean(0))
            sums[0] += (x - shift).sum(0)
            sums[1] += (x - shift).square().sum(0)

    def merge(self, other: Moments) -> None:
        """Add the tokens that `other` has seen."""
        # The two were summed around different shifts; the sums of `other` are moved to this one's.
        if not other.count:
            return
        for side, sums in self.sums.items():
            shift = self.shift.setdefault(side, other.shift[side])
            sums += _moved(other.sums[side], other.count, other.shift[side] - shift)
        self.count += other.count

    def total(self, parallel: Totals) -> None:
        """Make these the moments of the tokens of all ranks; all ranks must call it."""
        count = int(parallel.total(torch.tensor(self.count), over="tokens"))
        for side, sums in self.sums.items() if count else ():
            shift = self.shift.get(side, torch.zeros_like(sums[0]))
            # From each rank's shift to a common one: the mean of all tokens.
            mean = parallel.total(sums[0] + self.count * shift, over="tokens") / count
            self.sums[side] = parallel.total(_moved(sums, self.count, shift - mean), over="tokens")
            self.shift[side] = mean
        self.count = count

    def statistics(self) -> dict[str, Tensor]:
        """`inputs.mean`, `inputs.std` (n - 1) [L, D], `inputs.rms` [L], and the same for targets; float64.

        Raises:
            ValueError: fewer than two tokens were seen.
        """
        if self.count < 2:
            raise ValueError(f"statistics need at least 2 tokens, got {self.count}")
        statistics = {}
        for side, (first, second) in self.sums.items():
            mean = first / self.count
            variance = (second - self.count * mean.square()).clamp_min(0) / (self.count - 1)
            raw_mean = mean + self.shift[side]
            square = variance * (self.count - 1) / self.count + raw_mean.square()
            statistics[f"{side}.mean"] = raw_mean
            statistics[f"{side}.std"] = variance.sqrt()
            statistics[f"{side}.rms"] = square.mean(-1).sqrt()
        return statistics


def _moved(sums: Tensor, count: int, step: Tensor) -> Tensor:
    """Sums of x - a and of its square over `count` tokens, [2, L, D], made those of x - a + step and its square."""
    return torch.stack([sums[0] + count * step, sums[1] + 2 * step * sums[0] + count * step.square()])

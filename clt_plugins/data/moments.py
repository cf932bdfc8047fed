"""Streamed mean, standard deviation and root mean square of activations.

Shapes: B tokens, L layers, D d_model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clt_plugins.data.batch import Batch

Parallel = Any
"""An `interfaces.Parallel`; the contract stands above this folder."""


class Moments:
    """Streamed mean, standard deviation and root mean square of the inputs and targets, in float64."""

    def __init__(self, n_layers: int, d_model: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.sums = {
            side: torch.zeros(2, n_layers, d_model, dtype=torch.float64, device=device)
            for side in ("inputs", "targets")
        }
        # Sums of squares about zero lose digits where a mean is large; a shift near the mean keeps them.
        self.shift: dict[str, Tensor] = {}

    def add(self, batch: Batch) -> None:
        """Take a batch of B tokens into account."""
        self.count += batch.tokens
        for side, sums in self.sums.items():
            # float64: sums over millions of tokens lose digits in float32.
            x = getattr(batch, side).to(sums.device, torch.float64)
            shift = self.shift.setdefault(side, x.mean(0))
            sums[0] += (x - shift).sum(0)
            sums[1] += (x - shift).square().sum(0)

    def merge(self, other: Moments) -> None:
        """Take the tokens that `other` has seen into account."""
        if not other.count:
            return
        for side, sums in self.sums.items():
            shift = self.shift.setdefault(side, other.shift[side])
            sums += _moved(other.sums[side], other.count, other.shift[side] - shift)
        self.count += other.count

    def total(self, parallel: Parallel) -> None:
        """Make these the moments of all tokens that ranks have seen, each its own."""
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
        found = {}
        for side, (first, second) in self.sums.items():
            mean = first / self.count
            variance = (second - self.count * mean.square()).clamp_min(0) / (self.count - 1)
            raw_mean = mean + self.shift[side]
            square = variance * (self.count - 1) / self.count + raw_mean.square()
            found[f"{side}.mean"] = raw_mean
            found[f"{side}.std"] = variance.sqrt()
            found[f"{side}.rms"] = square.mean(-1).sqrt()
        return found


def _moved(sums: Tensor, count: int, step: Tensor) -> Tensor:
    """Sums of x - a and of its square [2, L, D], as sums of x - a + step."""
    return torch.stack([sums[0] + count * step, sums[1] + 2 * step * sums[0] + count * step.square()])

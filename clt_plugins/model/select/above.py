"""Selecting everything above a bound, and how many places it gets where its number cannot be read.

On a CPU there are as many pairs as pass. On a GPU the host would have to wait for their number in each layer. There a
training step has a fixed number of places, more than passed in the steps before the last log. All pairs are counted on
the device. If ever more pass than there are places, those farthest above their bound are kept, and the next log says
how many were left out; then there are places for them too.

Shapes: B tokens, L layers, F features per layer (of this rank), N pairs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from clt_plugins.contract.model.kernels import FixedSizes
from clt_plugins.data.features import Pairs

if TYPE_CHECKING:
    from clt_plugins.contract.model.kernels import Kernels
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.contract.select import Select

logger = logging.getLogger(__name__)

SLACK = 1.5
"""Places for each pair of the fullest step since the log before."""
LEAST = 1024
"""Places at least."""


class Above:
    """Keeps every pre-activation above a bound: as many as there are.

    Args:
        bound: [L, F], or one number.
    """

    def __init__(self, bound: Tensor | float, tokens: int, n_layers: int, n_features: int):
        self.bound = bound
        self.shape = tokens, n_layers, n_features
        self.kept: list[tuple[Tensor, Tensor]] = []
        """Of each layer: the pair as one number, (token * L + layer) * F + f, and its pre-activation."""
        self.select: Select | None = None
        self.counted: Callable[[Tensor], None] | None = None
        self.passed: list[Tensor] = []
        """How many passed in each layer, where the number of places is limited."""

    def limit(self, kernels: Kernels, places: int, counted: Callable[[Tensor], None]) -> None:
        """Keep at most so many pairs, those farthest above their bound. Sizes are then fixed, and nothing is read back.

        Args:
            counted: called at the end with the number of those that passed, a scalar int64 on the device.
        """
        self.select, self.counted = kernels.select(*self.shape, places, per="batch"), counted

    def see(self, layer: int, pre: Tensor) -> None:
        """Consider the pre-activations [B, F] of a layer."""
        _, n_layers, n_features = self.shape
        bound = self.bound[layer] if isinstance(self.bound, Tensor) else self.bound
        # "not <=" instead of ">": NaN passes, and stops the run instead of vanishing.
        passes = ~(pre <= bound)
        if self.select is not None:
            self.passed.append(passes.sum())
            self.select.see(layer, pre, score=(pre - bound).masked_fill_(~passes, -torch.inf))
            return
        token, feature = passes.nonzero(as_tuple=True)
        number = token * (n_layers * n_features) + layer * n_features + feature
        self.kept.append((number, pre[token, feature]))

    def finish(self) -> tuple[Pairs, Tensor]:
        """The pairs and their pre-activations, [N]."""
        if self.select is not None and self.counted is not None:
            self.counted(torch.stack(self.passed).sum())
            kept = self.select.finish()
            return Pairs(kept.token, kept.feature, *self.shape, kept.count), kept.pre
        tokens, n_layers, n_features = self.shape
        order, permutation = torch.cat([number for number, _ in self.kept]).sort()
        pre = torch.cat([values for _, values in self.kept])[permutation]
        width = n_layers * n_features
        return Pairs(order // width, order % width, tokens, n_layers, n_features), pre


@attrs.frozen(kw_only=True)
class CapacityState:
    """A `Capacity` in a checkpoint; the same on all ranks."""

    share: float
    """Of B · L · F there are places."""
    most: float
    """The largest share that passed in a step since the last log."""
    lost: int
    """Pairs that had no place since then, on all ranks."""


class Capacity:
    """How many places a training step has.

    Args:
        share: of B · L · F, until pairs were counted.
    """

    def __init__(self, share: float):
        self.first = self.share = share
        self.used = False
        """Whether something was limited, here or before the checkpoint."""
        self.size = 0
        """B · L · F of the last batch."""
        self.most: Tensor | None = None
        self.lost: Tensor | None = None
        self.before = CapacityState(share=share, most=0.0, lost=0)
        """What a checkpoint had counted since its last log."""

    @property
    def places(self) -> int:
        """For pairs of a step."""
        return min(self.size, max(LEAST, math.ceil(self.share * self.size)))

    def limit(self, above: Above, kernels: Kernels) -> None:
        """Give a selection its places, with kernels of fixed sizes."""
        if isinstance(kernels, FixedSizes) and kernels.fixed:
            self.used, self.size = True, math.prod(above.shape)
            above.limit(kernels, self.places, self._counted)

    def _counted(self, passed: Tensor) -> None:
        if self.most is None or self.lost is None:
            self.most, self.lost = torch.zeros_like(passed), torch.zeros_like(passed)
        torch.maximum(self.most, passed, out=self.most)
        self.lost += (passed - self.places).clamp_min(0)

    def state(self, parallel: Parallel) -> CapacityState | None:
        """What a checkpoint holds; None where nothing was limited. Reads numbers from the device; all ranks call it."""
        if not self.used:
            return None
        most, lost = 0.0, 0
        if self.most is not None and self.lost is not None:
            most, lost = int(self.most) / self.size, int(self.lost)
        most = max(float(text) for text in parallel.gather(repr(most)))
        lost = sum(int(text) for text in parallel.gather(str(lost)))
        return CapacityState(share=self.share, most=max(most, self.before.most), lost=lost + self.before.lost)

    def load_state(self, state: CapacityState | None) -> None:
        """Go on as a checkpoint did."""
        if state is not None:
            self.used, self.share, self.before = True, state.share, state

    def read(self, parallel: Parallel) -> int | None:
        """How many pairs had no place since the last call; None where nothing was limited. Then the capacity grows to
        what was counted. Reads numbers from the device; all ranks call it."""
        state = self.state(parallel)
        if state is None:
            return None
        places, most = self.places, math.ceil(state.most * self.size)
        # Only where it matters: every other size needs other memory.
        if not (1 + SLACK) / 2 * state.most <= self.share <= 2 * SLACK * state.most:
            self.share = min(1.0, SLACK * state.most)
        if state.lost:
            text = "%d pairs above their threshold had no place since the last log (in a step up to %d, for %d): those "
            text += "closest to it were left out of those steps; from here on there are %d places"
            logger.warning(text, state.lost, most, places, self.places)
        self.most = self.lost = None
        self.before = CapacityState(share=self.share, most=0.0, lost=0)
        return state.lost

    def reset(self) -> None:
        """Forget what was counted."""
        self.used, self.share, self.most, self.lost = False, self.first, None, None
        self.before = CapacityState(share=self.share, most=0.0, lost=0)

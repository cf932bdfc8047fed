"""TopK per token and BatchTopK over the batch; kept pre-activations pass a ReLU.

Shapes: B tokens, L layers, F features per layer, N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from clt_plugins import Context, Refused, Top, build

if TYPE_CHECKING:
    from clt_activations import TopKConfig
    from clt_plugins import Schedule

EPSILON = 1e-6
"""What crosslayer-coding adds to a standard deviation before it divides by it."""


class TopK(nn.Module):
    """The k pre-activations with the highest score of each token (per "token"), or k · B of a batch (per "batch")."""

    fixed_size = True

    def __init__(self, config: TopKConfig, context: Context, *, per: Literal["token", "batch"]):
        super().__init__()
        self.available = context.n_features * (context.n_layers if config.scope == "global" else 1)
        """Features in scope."""
        of_layers = 1 if config.scope == "global" else context.n_layers
        numbers = config.k if isinstance(config.k, list) else [config.k] * of_layers
        if len(numbers) != of_layers:
            text = f"has {len(numbers)} numbers for {of_layers} layers: give one for each layer, or one for all"
            raise Refused("activation.k", text)
        self.k = [self._count(number) for number in numbers]
        """k over all layers, [1], or of each layer, [L]."""
        self.config = config
        self.per = per
        self.context = context
        chosen = config.anneal_schedule
        self.anneal: Schedule | None = None if chosen is None else build(chosen, context)
        self.training_k = self.k
        """The same in the current training step."""

    def schedule(self, progress: float) -> None:
        """Set k for training at this share of the steps.

        With more features at first, each gets a gradient from more tokens, finds a use, and fewer of them die.
        """
        left = max(0.0, 1 - progress / self.config.anneal_over)
        if self.anneal is not None:
            steps = self.context.schedule_steps
            left = self.anneal(round(progress * steps), steps, 1.0)
        factor = 1 + (self.config.anneal_from - 1) * left
        self.training_k = [min(self.available, round(k * factor)) for k in self.k]

    def selection(self, tokens: int, norms: Callable[[], Tensor]) -> Top:
        """Selects the k best; in eval mode k is not annealed.

        While k falls, it falls by a little in each step. A GPU's results have a fixed size: k rounded up to a multiple
        of an eighth of the last k. So shapes change some 16 times in a run for each k, not with each step. k itself is
        exact.
        """
        eighths = [-(-k // 8) for k in self.k]
        places = [-(-k // step) * step for k, step in zip(self.training_k, eighths, strict=True)]
        affine: Callable[[int, Tensor], tuple[Tensor | None, Tensor | None]] | None = None
        if self.config.ranking == "norm":
            by_layer = norms()
            affine = lambda layer, pre: (by_layer[layer], None)  # noqa: E731
        elif self.config.ranking == "zscore":
            affine = self._standardise
        return Top(
            self.training_k if self.training else self.k,
            tokens,
            self.context.n_layers,
            self.context.n_features,
            per=self.per,
            scope=self.config.scope,
            affine=affine,
            kernels=self.context.kernels,
            capacity=places if self.training else self.k,
            parallel=self.context.parallel,
        )

    def forward(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        """Kept pre-activations below 0 become 0."""
        return pre.relu()

    def _count(self, k: float) -> int:
        """A count, or the count that a share is."""
        # Rounded first: 0.07 of 100 is 7.000000000000001 in floating-point numbers.
        count = math.ceil(round(k * self.available, 9)) if k < 1 else int(k)
        if count > self.available:
            raise Refused("activation.k", f"{count} is more than the {self.available} features in scope: lower it")
        return count

    def _standardise(self, layer: int, pre: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift of (pre - mean) / std of each feature over the tokens of the batch, as crosslayer-coding
        ranks.

        The deviation of a single token is 0 / 0. Its pre-activations are compared as they are.
        """
        parallel = self.context.parallel
        count = pre.shape[0] * parallel.batch_ranks
        if count == 1:
            return None, None
        if parallel.batch_ranks == 1:
            mean, std = pre.mean(0), pre.std(0)
        else:
            mean = parallel.total(pre.sum(0), over="tokens", what="selection") / count
            squares = parallel.total((pre - mean).square().sum(0), over="tokens", what="selection")
            std = (squares / (count - 1)).sqrt()
        scale = 1 / (std + EPSILON)
        return scale, -mean * scale

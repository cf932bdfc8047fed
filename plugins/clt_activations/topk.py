"""TopK per token and BatchTopK over the batch; kept pre-activations pass a ReLU.

Shapes: B tokens, L layers, F features per layer, N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from clt_plugins import Context, Refused, Top

if TYPE_CHECKING:
    from clt_activations import TopKConfig


class TopK(nn.Module):
    """The k highest-ranked pre-activations of each token (per "token"), or k · B of a batch (per "batch")."""

    fixed_size = True

    def __init__(self, config: TopKConfig, context: Context, *, per: Literal["token", "batch"]):
        super().__init__()
        room = context.n_features * (context.n_layers if config.scope == "global" else 1)
        self.k = math.ceil(config.k * room) if config.k < 1 else int(config.k)
        if self.k > room:
            raise Refused("activation.k", f"{self.k} features are wanted of {room} in scope: lower it")
        self.config = config
        self.per = per
        self.context = context
        self.room = room
        self.training_k = self.k

    def schedule(self, progress: float) -> None:
        """Set what training keeps at this share of its steps: more features at first get a gradient (and so a use)
        from more tokens, and fewer of them die."""
        left = max(0.0, 1 - progress / self.config.anneal_over)
        self.training_k = min(self.room, round(self.k * (1 + (self.config.anneal_from - 1) * left)))

    def selection(self, tokens: int, norms: Callable[[], Tensor]) -> Top:
        rank = None
        if self.config.ranking == "norm":
            by_layer = norms()
            rank = lambda layer, pre: pre * by_layer[layer]  # noqa: E731
        elif self.config.ranking == "zscore":
            rank = self._standardise
        return Top(
            self.training_k if self.training else self.k,
            tokens,
            self.context.n_layers,
            self.context.n_features,
            per=self.per,
            scope=self.config.scope,
            score=rank,
            parallel=self.context.parallel,
        )

    def forward(self, pre: Tensor, feature: Tensor | None) -> Tensor:
        return pre.relu()

    def _standardise(self, layer: int, pre: Tensor) -> Tensor:
        """(pre - mean) / std of each feature over the tokens of the batch, as the reference library ranks."""
        parallel = self.context.parallel
        if parallel.batch_ranks == 1:
            return (pre - pre.mean(0)) / (pre.std(0) + 1e-6)
        count = pre.shape[0] * parallel.batch_ranks
        centred = pre - parallel.total(pre.sum(0), over="tokens", what="selection") / count
        squares = parallel.total(centred.square().sum(0), over="tokens", what="selection")
        return centred / ((squares / (count - 1)).sqrt() + 1e-6)

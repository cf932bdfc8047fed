"""A toy language model, so that losses that run one can be tried without any. Its activations are not the source's.

Token n + 1 follows from token n alone. Each layer adds tanh(x · A_l) · B_l to the residual stream x, which begins as
the token's embedding; the logits are what is left times an unembedding.

Shapes: R positions, L layers, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import torch
from torch import Tensor

from clt_plugins import generator

VOCABULARY = 32
LENGTHS = (9, 16)
"""Tokens of a context: at least, and less than."""
HELD_OUT = 16
"""Contexts that are not trained on."""

Replace = Callable[[int, Tensor, Tensor], Tensor | None]


@attrs.frozen(eq=False)
class Text:
    """Some contexts."""

    contexts: list[Tensor]
    """The token ids of each, int64."""


class ToyModel:
    """A `TrainableModel`. Each context's last token is only predicted: it is no position."""

    def __init__(self, n_layers: int, d_model: int, seed: int):
        self.n_layers, self.d_model, self.seed = n_layers, d_model, seed
        random = generator(seed, "toy model")

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random) * shape[-2] ** -0.5

        self.embedding = torch.randn(VOCABULARY, d_model, generator=random)
        self.weights = draw(n_layers, 2, d_model, d_model)
        self.unembedding = draw(d_model, VOCABULARY)

    def context(self, part: str, number: int) -> Tensor:
        """The tokens of a context, which depend on the seed and its number only."""
        random = generator(self.seed, "toy text", part, number)
        length = int(torch.randint(*LENGTHS, (1,), generator=random))
        return torch.randint(VOCABULARY, (length,), generator=random)

    def held_out(self, tokens: int) -> Iterator[Text]:
        """The first held-out contexts, of `tokens` positions at most."""
        for number in range(HELD_OUT):
            context = self.context("held out", number)[: tokens + 1]
            tokens -= len(context) - 1
            if len(context) > 1:
                yield Text([context])

    def lengths(self, text: Text) -> list[int]:
        """Positions of each context."""
        return [len(context) - 1 for context in text.contexts]

    def following(self, text: Text) -> Tensor:
        """The token after each position, [R]."""
        return torch.cat([context[1:] for context in text.contexts])

    def spell(self, ids: list[int]) -> list[str]:
        """A letter for each token."""
        return [chr(ord("A") + number) for number in ids]

    def run(self, text: Text, replace: Replace | None = None) -> Tensor:
        """Logits [R, V]."""
        with torch.inference_mode():
            return self.logits(text, replace)

    def logits(self, text: Text, replace: Replace | None = None) -> Tensor:
        """Logits [R, V], in the type of what `replace` returns; differentiable in it."""
        x = self.embedding[torch.cat([context[:-1] for context in text.contexts])]
        for layer, (inner, outer) in enumerate(self.weights):
            written = torch.tanh(x @ inner.to(x.dtype)) @ outer.to(x.dtype)
            new = None if replace is None else replace(layer, x, written)
            x = x + (written if new is None else new.to(x.device))
        return x @ self.unembedding.to(x.dtype)

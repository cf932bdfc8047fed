"""Batches of sparse features that are known exactly. Each batch depends only on the seed and its number.

A feature f of layer s has a unit direction in that layer's inputs, and one in the targets of each layer t >= s:

    inputs_s = sum over f of a_sf E_sf + noise,    targets_t = sum over s <= t and f of a_sf W_sft + noise

where a is between 0.5 and 1.5 for a few features of each token, and 0 for the others.

Shapes: B tokens, L layers, D d_model, F true features per layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins import Batch, check_data, generator
from clt_synthetic.model import Text, ToyModel

if TYPE_CHECKING:
    from clt_plugins import Context
    from clt_synthetic import SyntheticConfig


SAMPLE = 4096
"""Numbers of the truth that its identity is taken from."""


@attrs.frozen(eq=False)
class Truth:
    """The features that the data consist of."""

    encoders: Tensor
    """Direction of each feature in the inputs of its layer, [L, F, D], unit norm."""
    decoders: Tensor
    """Direction of each feature in the targets of each layer, [L (source), L (target), F, D]: unit norm for the source
    layer and later ones, 0 for earlier ones."""


class Synthetic:
    """A `Source` of sparse features that are known. It is also `Identified`, and `TrainsInModel`: of a toy model.

    Raises:
        Refused: the batch cannot be divided among the data ranks.
    """

    def __init__(self, config: SyntheticConfig, context: Context):
        self.config, self.seed = config, context.seed
        self.n_layers, self.d_model = config.layers, config.d_model
        self.rank, self.ranks = context.parallel.data_rank, context.parallel.data_ranks
        self.batch_tokens, self.share = context.batch_tokens, context.batch_share()
        self.count = 0
        random = generator(self.seed, "truth")
        L, F, D = config.layers, config.features, config.d_model
        directions = torch.nn.functional.normalize(torch.randn(L, 1 + L, F, D, generator=random), dim=-1)
        later = torch.ones(L, L).triu()[:, :, None, None]
        self._truth = Truth(directions[:, 0], directions[:, 1:] * later)
        self._identity = {"source": f"sha256 {self._digest(directions)}"}

    def truth(self) -> Truth:
        """The features that a perfect transcoder has learned."""
        return self._truth

    def active(self, part: str, number: int) -> Tensor:
        """The activations of the true features in one batch, [B, L, F].

        Args:
            part: "train" or "held_out".
        """
        return self._active(generator(self.seed, part, number))

    def next(self) -> Batch:
        """The next training batch: this rank's share of the batch of a single process."""
        batch = self._batch("train", self.count)
        self.count += 1
        return batch.rows(slice(self.rank * self.share, (self.rank + 1) * self.share))

    def held_out(self, tokens: int) -> Iterator[Batch]:
        """Batches that are no training batches, numbered from 0."""
        for number, left in enumerate(range(tokens, 0, -self.batch_tokens)):
            batch = self._batch("held_out", number)
            yield batch if left >= batch.tokens else batch.rows(slice(0, left))

    def statistics(self) -> Mapping[str, Tensor] | None:
        """None: the engine estimates them from the first batches."""
        return None

    def trainable_model(self) -> ToyModel:
        """A toy model, whose activations have nothing to do with those of the batches."""
        return ToyModel(self.n_layers, self.d_model, self.seed)

    def training_text(self, contexts: int, position: Any) -> tuple[Text, Any]:
        """This rank's part of the next contexts of the toy model, every so many-th; and how many were read so far."""
        model, first = self.trainable_model(), position or 0
        numbers = range(first + self.rank, first + contexts, self.ranks)
        return Text([model.context("train", number) for number in numbers]), first + contexts

    def identity(self) -> Mapping[str, str]:
        """See `Identified`: of the settings and of what this version of torch draws."""
        return self._identity

    def state(self) -> dict[str, Any]:
        """How many batches were yielded; the same on every data rank."""
        return {"data": dict(self._identity), "count": self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue after that many batches, which other data ranks may have read, more or fewer.

        Raises:
            Refused: the state is of other data.
        """
        check_data(state, self._identity)
        self.count = state["count"]

    def _digest(self, drawn: Tensor) -> str:
        settings = json.dumps([drawn.shape, self.config.active, self.config.noise, self.seed, self.batch_tokens])
        bits = drawn.flatten()[:SAMPLE].numpy().tobytes()
        return hashlib.sha256(settings.encode() + bits).hexdigest()[:32]

    def _batch(self, part: str, number: int) -> Batch:
        random = generator(self.seed, part, number)
        active = self._active(random)
        inputs = torch.einsum("blf,lfd->bld", active, self._truth.encoders)
        targets = torch.einsum("bsf,stfd->btd", active, self._truth.decoders)
        if self.config.noise:
            inputs += self.config.noise * torch.randn(inputs.shape, generator=random)
            targets += self.config.noise * torch.randn(targets.shape, generator=random)
        return Batch(inputs, targets)

    def _active(self, random: torch.Generator) -> Tensor:
        shape = self.batch_tokens, self.n_layers, self.config.features
        share = self.config.active / (self.n_layers * self.config.features)
        on = torch.rand(shape, generator=random) < share
        return on * (0.5 + torch.rand(shape, generator=random))

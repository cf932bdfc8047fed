"""The source `planted`. Each batch depends only on the settings, the seed and its number.

Shapes: B tokens, L layers, D d_model, N true features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor

from clt_planted.activity import draw
from clt_planted.circuit import Truth, plant
from clt_plugins import Batch, check_data, generator

if TYPE_CHECKING:
    from clt_planted import PlantedConfig
    from clt_plugins import Context

PARTS = ("train", "held_out")


@runtime_checkable
class KnowsTruth(Protocol):
    """A source that knows what its activations consist of."""

    def truth(self) -> Truth:
        """The model."""

    def amounts(self, batch: Batch) -> Tensor:
        """How much of each feature is in the stream before each layer, and after the last, at a batch's tokens:
        [B, L + 1, N]."""


class Planted:
    """A `Source` of activations of a planted model. It is also `Identified`, and `KnowsTruth`.

    inputs[l] is the stream that layer l reads, x_l; targets[l] is what it adds, y_l. So x_{l+1} = x_l + y_l. The
    context of a token in `Batch.positions` is twice the batch's number, plus 1 in held-out batches.

    Raises:
        Refused: the batch cannot be divided among the data ranks.
    """

    def __init__(self, config: PlantedConfig, context: Context):
        self.config, self.seed = config, context.seed
        self.n_layers, self.d_model = config.layers, config.d_model
        self.rank = context.parallel.data_rank
        self.batch_tokens, self.share = context.batch_tokens, context.batch_share()
        self.count = 0
        self._truth = plant(config, self.seed)
        self._identity = {"source": f"sha256 {self._digest()}"}

    def truth(self) -> Truth:
        """The model that a perfect transcoder has learned."""
        return self._truth

    def amounts(self, batch: Batch) -> Tensor:
        """See `KnowsTruth`; drawn anew, for any rows of batches that this source yielded."""
        assert batch.positions is not None
        contexts, rows = batch.positions.cpu().unbind(1)
        out = torch.zeros(len(rows), self.n_layers + 1, len(self._truth.features))
        for context in contexts.unique().tolist():
            mine = contexts == context
            out[mine] = self._amounts(generator(self.seed, PARTS[context % 2], context // 2))[rows[mine]]
        return out

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

    def _digest(self) -> str:
        settings = json.dumps([attrs.asdict(self.config), self.seed, self.batch_tokens], sort_keys=True)
        drawn = self._amounts(generator(self.seed, PARTS[0], 0))[:, 0].numpy().tobytes()
        return hashlib.sha256(settings.encode() + drawn).hexdigest()[:32]

    def _amounts(self, random: torch.Generator) -> Tensor:
        return self._truth.run(draw(self.config, self._truth, self.batch_tokens, random))

    def _batch(self, part: str, number: int) -> Batch:
        random = generator(self.seed, part, number)
        amounts = self._amounts(random)
        # Summed up as the stream is, so that noise is passed on and x_{l+1} = x_l + y_l holds to the last bit.
        stream = [amounts[:, 0] @ self._truth.directions + self._noise(random)]
        targets = []
        for change in amounts.diff(dim=1).unbind(1):
            targets.append(change @ self._truth.directions + self._noise(random))
            stream.append(stream[-1] + targets[-1])
        context = torch.full((self.batch_tokens,), 2 * number + PARTS.index(part))
        positions = torch.stack([context, torch.arange(self.batch_tokens)], 1)
        return Batch(torch.stack(stream[:-1], 1), torch.stack(targets, 1), positions=positions)

    def _noise(self, random: torch.Generator) -> Tensor | float:
        if not self.config.noise:
            return 0.0
        return self.config.noise * torch.randn(self.batch_tokens, self.d_model, generator=random)

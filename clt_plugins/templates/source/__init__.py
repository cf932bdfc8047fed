"""The source `example`: inputs are noise, targets are what a fixed random network makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins import Batch, Context


@frozen(kw_only=True)
class ExampleConfig:
    """Inputs are normal noise; the targets of a layer are tanh(inputs · M), with a random matrix M for each layer."""

    layers: int = field(default=3, validator=validators.gt(0))
    """L."""
    d_model: int = field(default=16, validator=validators.gt(0))
    """D."""


class Example:
    """A `Source`. Every batch follows from the run's seed and its number, so that the state is one number."""

    def __init__(self, config: ExampleConfig, context: Context):
        self.n_layers, self.d_model = config.layers, config.d_model
        self.seed, self.batch_tokens = context.seed, context.batch_tokens
        # Data ranks train on different tokens: this rank's share is the `data_rank`-th part of each batch.
        share, rank = context.batch_share(), context.parallel.data_rank
        self.rows = slice(rank * share, (rank + 1) * share)
        self.count = 0

    def next(self) -> Batch:
        """This rank's share of the next batch: inputs and targets, [share, L, D]."""
        batch = self._batch("train", self.count).rows(self.rows)
        self.count += 1
        return batch

    def held_out(self, tokens: int) -> Iterator[Batch]:
        """The same batches at each call, which are never trained on."""
        for number, missing in enumerate(range(tokens, 0, -self.batch_tokens)):
            yield self._batch("held_out", number).rows(slice(0, missing))

    def statistics(self) -> Mapping[str, Tensor] | None:
        """None: the engine estimates mean and spread from the first batches."""
        return None

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON; a checkpoint holds it."""
        return {"count": self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        """The next batch is the one that would have followed `state()`."""
        self.count = state["count"]

    def _batch(self, *key: Any) -> Batch:
        """A batch of all ranks. `generator` depends on the seed and the key only, in every process."""
        import torch

        from clt_plugins import Batch, generator

        shape = self.n_layers, self.d_model, self.d_model
        matrices = torch.randn(shape, generator=generator(self.seed, "matrices")) * self.d_model**-0.5
        shape = self.batch_tokens, self.n_layers, self.d_model
        inputs = torch.randn(shape, generator=generator(self.seed, *key))
        return Batch(inputs, torch.einsum("bld,lde->ble", inputs, matrices).tanh())


@hookimpl
def clt_sources() -> list[Spec]:
    return [Spec("example", ExampleConfig, Example)]

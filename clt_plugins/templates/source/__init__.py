"""The source `example`: noise, and what a fixed random network makes of it. Every batch can be made again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import Batch, Refused, Spec, hookimpl

if TYPE_CHECKING:
    import torch

    from clt_plugins import Context


@frozen(kw_only=True)
class ExampleConfig:
    """Inputs are normal noise; the targets of a layer are tanh(inputs · M), with a random matrix M for each layer."""

    layers: int = field(default=3, validator=validators.gt(0))
    """L."""
    d_model: int = field(default=16, validator=validators.gt(0))
    """D."""


class Example:
    def __init__(self, config: ExampleConfig, context: Context):
        parallel = context.parallel
        if context.batch_tokens % parallel.data_ranks:
            raise Refused(
                "train.batch_tokens", f"{context.batch_tokens} is no multiple of the {parallel.data_ranks} data ranks"
            )
        self.n_layers, self.d_model = config.layers, config.d_model
        self.seed, self.tokens = context.seed, context.batch_tokens
        self.rank, self.ranks = parallel.data_rank, parallel.data_ranks
        self.count = 0

    def next(self) -> Batch:
        """This rank's part of the next batch, [B, L, D] twice."""
        share = self.tokens // self.ranks
        batch = self._make("train", self.count).rows(slice(self.rank * share, (self.rank + 1) * share))
        self.count += 1
        return batch

    def held_out(self, tokens: int) -> Iterator[Batch]:
        """The same batches at each call, never trained on."""
        for number, left in enumerate(range(tokens, 0, -self.tokens)):
            yield self._make("held_out", number).rows(slice(0, left))

    def statistics(self) -> Mapping[str, torch.Tensor] | None:
        return None  # estimated from the first batches

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]

    def _make(self, part: str, number: int) -> Batch:
        import torch

        shape = self.n_layers, self.d_model, self.d_model
        matrices = torch.randn(shape, generator=self._generator("matrices")) * self.d_model**-0.5
        inputs = torch.randn(self.tokens, self.n_layers, self.d_model, generator=self._generator(part, number))
        return Batch(inputs, torch.einsum("bld,lde->ble", inputs, matrices).tanh())

    def _generator(self, *key: Any) -> torch.Generator:
        """Random numbers by the run's seed and a key; Python's own `hash` would differ between processes."""
        import torch

        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


@hookimpl
def clt_sources() -> list[Spec]:
    return [Spec("example", ExampleConfig, Example)]

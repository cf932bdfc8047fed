"""The transform `example`: no number of an activation is further from 0 than some multiple of the token's own size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins import Batch, Context


@frozen(kw_only=True)
class ExampleConfig:
    """Numbers that are large beside the others of their token and layer are cut."""

    limit: float = field(default=8.0, validator=validators.gt(0))
    """The largest number, as a multiple of the root mean square over dimensions."""


class Example:
    """A `Transform`. A random one would draw from `generator(context.seed, "example", number)`."""

    held_out = False
    """Only what is trained on is cut: held-out errors stay comparable."""
    drops = False
    """It gives every row back. One that drops rows says True, and returns `batch.rows(mask)`."""

    def __init__(self, config: ExampleConfig, context: Context):
        self.limit = config.limit

    def __call__(self, batch: Batch, number: int) -> Batch:
        """A new batch; the one given is not changed."""
        from clt_plugins import Batch

        return Batch(self._cut(batch.inputs), self._cut(batch.targets), batch.token_ids, batch.positions)

    def _cut(self, x: Tensor) -> Tensor:
        """[B, L, D], each token and layer by itself: so the other rows of the batch do not matter."""
        largest = self.limit * x.float().square().mean(-1, keepdim=True).sqrt().to(x.dtype)
        return x.clamp(-largest, largest)


@hookimpl
def clt_transforms() -> list[Spec]:
    return [Spec("example", ExampleConfig, Example)]

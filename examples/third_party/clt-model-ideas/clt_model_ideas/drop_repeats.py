"""The transform `drop_repeats`: of equal neighbouring tokens of a context, the first is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen

from clt_plugins import Refused, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Batch, Context


@frozen(kw_only=True)
class DropRepeatsConfig:
    """Drop a token whose id is that of the one before it in its context, where both are in one batch.

    A source that shuffles its rows spreads neighbours over batches. With `source.buffer_tokens` as small as
    `train.batch_tokens` they stay together. `transforms/drop_repeats_dropped` counts what is dropped.
    """

    held_out: bool = field(default=True)
    """Whether they are dropped from held-out batches too."""


class DropRepeats:
    """A `Transform`."""

    drops = True

    def __init__(self, config: DropRepeatsConfig, context: Context):
        self.held_out = config.held_out

    def __call__(self, batch: Batch, number: int) -> Batch:
        """The batch without repeats, in its order."""
        import torch

        if batch.token_ids is None or batch.positions is None:
            raise Refused("transforms", "drop_repeats needs token ids and positions, which this source does not give")
        context, position = batch.positions.unbind(1)
        # By context, then by position.
        order = position.argsort(stable=True)
        order = order[context[order].argsort(stable=True)]
        context, position, token = context[order], position[order], batch.token_ids[order]
        repeat = (context[1:] == context[:-1]) & (position[1:] == position[:-1] + 1) & (token[1:] == token[:-1])
        keep = torch.ones_like(order, dtype=torch.bool)
        keep[order[1:]] = ~repeat
        return batch.rows(keep)


@hookimpl
def clt_transforms() -> list[Spec]:
    return [Spec("drop_repeats", DropRepeatsConfig, DropRepeats)]

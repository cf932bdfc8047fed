"""Transforms that drop tokens by what they are.

Shapes: B tokens, L layers, D d_model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from clt_plugins import Refused

if TYPE_CHECKING:
    from clt_plugins import Batch
    from clt_transforms import DropOutliersConfig, DropPositionsConfig, DropTokensConfig


class DropOutliers:
    """A `Transform`: drops a token if, in any layer, ‖input‖ >= factor · mean over the batch's tokens of ‖input‖."""

    drops = True

    def __init__(self, config: DropOutliersConfig):
        self.factor, self.held_out = config.factor, config.held_out

    def __call__(self, batch: Batch, number: int) -> Batch:
        if not batch.tokens:
            return batch
        norms = batch.inputs.float().norm(dim=-1)  # [B, L]
        # Of a layer whose inputs are all 0 none is larger than the others.
        outlier = ((norms >= self.factor * norms.mean(0)) & (norms > 0)).any(1)
        # How many there are decides the batch's shape: the host has to wait for it.
        return batch.rows(~outlier) if bool(outlier.any()) else batch


class DropPositions:
    """A `Transform`: drops the first tokens of each context."""

    drops = True

    def __init__(self, config: DropPositionsConfig):
        self.first, self.held_out = config.first, config.held_out

    def __call__(self, batch: Batch, number: int) -> Batch:
        if batch.positions is None:
            text = "drop_positions needs to know where in its context a token is, but the source does not say: leave it"
            raise Refused("transforms", f"{text} out, or use a source that reads text")
        return batch.rows(batch.positions[:, 1] >= self.first)


class DropTokens:
    """A `Transform`: drops tokens by their id."""

    drops = True

    def __init__(self, config: DropTokensConfig):
        self.ids, self.held_out = torch.tensor(config.ids), config.held_out

    def __call__(self, batch: Batch, number: int) -> Batch:
        if batch.token_ids is None:
            text = "drop_tokens needs token ids, but the source does not know them: leave it out"
            raise Refused("transforms", f"{text}, or use a source that reads text")
        return batch.rows(~torch.isin(batch.token_ids, self.ids.to(batch.token_ids.device)))

"""Where the ranks that share the features of a batch split its tokens: each computes the error of a share of them.

The sum over ranks of what features write, [B, L, D], is then no whole on every rank. Each rank gets the sum of its own
share of the tokens (a reduce-scatter), computes the error there, and its gradient is put together from all shares (an
all-gather): as many bytes as one sum of wholes. Passes over [B, L, D] become passes over [b, L, D], b = B / ranks.

Shapes: B tokens of a batch, b of a share, L layers, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugins.contract.model.parallel import Parallel, SplitsTokens
from clt_plugins.contract.training.loss import Share

if TYPE_CHECKING:
    from clt_plugins.data.features import Features
    from clt_plugins.model.transcoder import CrossLayerTranscoder


def own_tokens(parallel: Parallel, tokens: int) -> slice | None:
    """This rank's share of a batch's tokens; None where each rank computes the error of all of them."""
    ranks = parallel.tensor_ranks
    if ranks == 1 or not isinstance(parallel, SplitsTokens) or not parallel.splits_tokens or tokens % ranks:
        return None
    return slice(parallel.tensor_rank * tokens // ranks, (parallel.tensor_rank + 1) * tokens // ranks)


def share_of(
    transcoder: CrossLayerTranscoder, own: slice, features: Features, inputs: Tensor, raw_targets: Tensor
) -> Share:
    """A rank's share of a forward pass.

    Args:
        own: the tokens of the share.
        inputs: of all tokens, normalised, [B, L, D].
        raw_targets: of all tokens, [B, L, D].
    """
    parallel, tying = transcoder.context.parallel, transcoder.tying
    assert isinstance(parallel, SplitsTokens)

    def decoded(features: Features, affine: Callable[[], Tensor] | None = None) -> Tensor:
        written = tying.decode(features)
        arrives = parallel.sum_share_later(written)
        added = affine() if affine is not None else None  # computed while the sums of other ranks arrive
        return _Share.apply(written, added, arrives(), own, parallel)

    def mean(x: Tensor) -> Tensor:
        return transcoder.context.parallel.sum_features(x) / transcoder.context.parallel.tensor_ranks

    return Share(
        targets=transcoder.normaliser.targets(raw_targets[own]),
        reconstruction=decoded(features, partial(tying.affine, inputs)),
        decode=decoded,
        mean=mean,
    )


def whole(share: Tensor, own: slice, parallel: Parallel) -> Tensor:
    """The shares of all ranks put together, [B, L, D]; differentiable.

    What each rank computes from it is complete on each: so the gradient of a share is its part of the whole gradient.
    """
    return _Whole.apply(share, own, parallel)


class _Share(torch.autograd.Function):
    """A rank's share of the sum over ranks, which is known already, plus what is added to it: a bias, a skip path.

    The gradient by what each rank has written is that of the sum, put together from the shares of all ranks. So is the
    gradient by what is added, which is the same on all ranks.
    """

    @staticmethod
    def forward(ctx: Any, written: Tensor, added: Tensor | None, total: Tensor, own: slice, parallel: Any) -> Tensor:
        ctx.parallel = parallel
        ctx.mark_dirty(total)
        if added is None:
            return total
        ctx.added = added.shape
        by_token = added.dim() == 3 and added.shape[0] > 1
        return total.add_(added[own] if by_token else added)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        gradient = ctx.parallel.join_shares(grads[0])
        added = gradient.sum_to_size(ctx.added) if ctx.needs_input_grad[1] else None
        return gradient, added, None, None, None


class _Whole(torch.autograd.Function):
    """See `whole`."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, own: slice, parallel: Any) -> Tensor:
        ctx.own = own
        return parallel.join_shares(share)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.own], None, None

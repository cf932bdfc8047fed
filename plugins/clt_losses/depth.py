"""A penalty on what features write to later layers than their own.

Shapes: B tokens, L layers, D d_model, F features per layer (of this rank), N pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from clt_losses.terms import Term, of_weight, over_run
from clt_plugins import Context, Features, Forward, Pairs, generator

if TYPE_CHECKING:
    from clt_losses import DepthConfig

MASK = (1 << 62) - 1


class Depth(Term):
    """λ · mean over tokens of the sum over active features of Σ over t > s of (t - s)^p · ‖what it writes to layer t‖.

    s is the feature's layer. What a feature of value a writes is a · W_{s->t}, with factors and offsets where the
    decoder has them. The sum of norms over layers is that of crosscoders (Lindsey et al. 2024, "Sparse Crosscoders for
    Cross-Layer Features and Model Diffing"), whose penalty counts all layers; to count later ones alone is ours. The
    norm has a kink at 0, so writes that do not pay vanish, and those to the own layer cost nothing.

    All pairs would cost a pass over the decoder and tensors as large as that. Instead each token draws one of its
    active features, each with the same probability, and counts it as often as the token has active features: the
    expectation of term and gradient is that of the sum over all. A step decodes B pairs more.
    """

    def __init__(self, config: DepthConfig, context: Context):
        self.config = config
        self.seed, self.parallel = context.seed, context.parallel
        self.own = context.parallel.shard(context.n_features)
        self.n_features = context.n_features
        self.schedule = of_weight(config.weight_schedule, context)

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        tokens = forward.features.shape[0]
        total = sum(self._of_draw(forward, draw) for draw in range(self.config.draws))
        assert isinstance(total, Tensor)
        weight = over_run(self.schedule, forward, self.config.weight)
        return {"depth": weight * total / (tokens * self.config.draws)}

    def _of_draw(self, forward: Forward, draw: int) -> Tensor:
        """The sum over tokens of what a drawn feature of each costs, times how many are active there; a scalar."""
        features = forward.features
        tokens, n_layers, n_features = features.shape
        key, entry, count = self._best(features, forward.steps_done, draw)
        highest, count = self._of_ranks(key, count)
        # The drawn feature is on one of the ranks that share the features; the others decode a value of 0.
        here = (key == highest) & (key >= 0)
        # There may be no pair at all: an empty entry behind all others can always be pointed to.
        value = pad(features.values.flatten(), (0, 1)).index_select(0, entry) * here
        token = torch.arange(tokens, device=value.device)
        feature = entry % (n_layers * n_features)
        if features.pairs is not None:
            feature = pad(features.pairs.feature, (0, 1))[entry]
        written = forward.decode(Features(value, Pairs(token, feature, tokens, n_layers, n_features)))
        source = self.parallel.total(feature // n_features * here, over="features", what="selection")
        distance = torch.arange(n_layers, device=value.device) - source[:, None]
        factor = torch.where(distance > 0, distance.clamp_min(1).to(value.dtype) ** self.config.power, 0.0)
        return (count[:, None] * factor * torch.linalg.vector_norm(written, dim=2)).sum()

    @torch.no_grad()
    def _best(self, features: Features, step: int, draw: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token the active feature of this rank with the highest random key: its key (-1 if none is active) and
        its entry among the flat values; and how many are active. Each [B] int64.

        The key of a pair is the sum, modulo 2^62, of a number of its token and one of its feature. So every active
        feature of a token is as likely as another to have the highest, on any number of ranks.
        """
        values, pairs = features.values, features.pairs
        tokens, n_layers, n_features = features.shape
        device = values.device
        seed = generator(self.seed, "depth", step, draw).initial_seed()
        of_token = _keys(torch.arange(tokens, device=device) + self.parallel.data_rank * tokens, seed)
        number = torch.arange(n_layers, device=device)[:, None] * self.n_features
        number = number + torch.arange(self.own.start, self.own.stop, device=device)
        of_feature = _keys(-1 - number.flatten(), seed)
        active = values > 0
        if pairs is None:
            keys = ((of_token[:, None] + of_feature) & MASK).masked_fill(~active.flatten(1), -1)
            best, column = keys.max(1)
            return best, column + torch.arange(tokens, device=device) * keys.shape[1], active.sum((1, 2))
        keys = ((of_token[pairs.token] + of_feature[pairs.feature]) & MASK).masked_fill(~active, -1)
        best = keys.new_full((tokens,), -1).scatter_reduce(0, pairs.token, keys, "amax")
        entries = torch.arange(len(keys), device=device).masked_fill(keys != best[pairs.token], 0)
        entry = entries.new_zeros(tokens).scatter_reduce(0, pairs.token, entries, "amax")
        return best, entry, features.l0()

    def _of_ranks(self, key: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """The highest key and the number of active features of each token, of all ranks that share the features."""
        if self.parallel.tensor_ranks == 1:
            return key, count
        table = key.new_zeros(self.parallel.tensor_ranks + 1, len(key))
        table[self.parallel.tensor_rank], table[-1] = key + 1, count
        table = self.parallel.total(table, over="features", what="selection")
        return table[:-1].amax(0) - 1, table[-1]


def _keys(numbers: Tensor, seed: int) -> Tensor:
    """62 random bits for each number, the same on every device (SplitMix64: Steele et al. 2014, "Fast splittable
    pseudorandom number generators")."""
    x = numbers * _signed(0x9E3779B97F4A7C15) + seed
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) & MASK


def _signed(bits: int) -> int:
    """An unsigned number of 64 bits as torch has them."""
    return bits - (1 << 64) if bits >> 63 else bits

"""Whether a transcoder keeps the hops of a chain A -> B -> C, or writes C straight from A.

A cross-layer feature that reads A in an early layer can write B there and C in a later layer: one active feature in the
place of two, which sparsity rewards (Lange et al. 2026, "Cross-Layer Transcoders are incentivized to learn Unfaithful
Circuits"). The measure is an attribution. Let C be computed in layer l. At each held-out token with C active, feature i
of layer s <= l writes

    w_i = max(0, z_i u_i),    u_i: the coordinate of C in its row for layer l (see `weights.writes`)

and of what its pre-activation reads from B and from the features A that B is computed from, B's share is

    r_i = r(B) / (r(B) + sum over A of r(A)),    r(X) = max(0, <encoder row, direction of X> · amount of X in x_s)

Of all that is written of C:

    kept = w_i r_i:            it reads B
    direct = w_i (1 - r_i):    it reads A past B, in a layer whose stream has B: s > layer of B
    rewritten = w_i:           it reads A in a layer whose stream does not have B yet: s <= layer of B
    other = w_i:               it reads neither

The sums over tokens and features are divided by the sum of C's own values, so that no chain counts more because it is
active more often; the shares are those of the sums over chains. `written` is sum of z_i u_i, negative ones included, by
the sum of C's values: 1 if C is reconstructed.

Shapes: B tokens, L layers, F features per layer of the transcoder, N true features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_planted.source import KnowsTruth

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clt_planted.circuit import Chain
    from clt_plugins import Batch, Features, Scores

KINDS = ("kept", "direct", "rewritten", "other")


class HopSums:
    """A `HeldOut`: by chain, the four sums, all that is written, and C's values.

    Args:
        reads: [L F, N], see `weights.reads`.
        writes: coordinates [C, L F], see `weights.writes`.
    """

    def __init__(self, source: KnowsTruth, reads: Tensor, writes: Tensor, n_features: int):
        self.source, self.truth, self.reads = source, source.truth(), reads
        self.chains = self.truth.chains()
        computed = self.truth.computed()
        self.writes = [writes[computed.index(chain.child)] for chain in self.chains]
        self.layer = torch.arange(reads.shape[0]) // n_features
        """Of each feature of the transcoder."""
        self.sums = torch.zeros(len(self.chains), len(KINDS) + 2, dtype=torch.float64)

    def add(self, batch: Batch, features: Features, reconstruction: Tensor) -> None:
        amounts = self.source.amounts(batch)
        values = self.truth.values(amounts)
        z = features.dense().flatten(1).cpu().double()
        for number, chain in enumerate(self.chains):
            on = values[:, chain.child] > 0
            self.sums[number] += self._chain(chain, self.writes[number], z[on], amounts[on].double())
            self.sums[number, -1] += float(values[on, chain.child].sum())

    def _chain(self, chain: Chain, writes: Tensor, z: Tensor, amounts: Tensor) -> Tensor:
        """The sums of one chain over tokens at which C is active."""
        used = ((writes > 0) & (z > 0).any(0)).nonzero().flatten()
        w = z[:, used] * writes[used]
        # What was in the stream that each feature reads, [tokens, features].
        parent = self._read(chain.parent, used, amounts)
        before = sum((self._read(one, used, amounts) for one in chain.before), torch.zeros_like(parent))
        share = torch.where(parent > 0, parent / (parent + before).clamp(min=1e-300), 0.0)
        early = self.layer[used] <= self.truth.features[chain.parent].layer
        kept, past = w * share, w * (1 - share)
        reads = parent + before > 0
        return torch.stack(
            [
                kept.sum(),
                past[reads & ~early].sum(),
                past[reads & early].sum(),
                past[~reads].sum(),
                (z @ writes).sum(),
                torch.zeros((), dtype=torch.float64),
            ]
        )

    def _read(self, number: int, used: Tensor, amounts: Tensor) -> Tensor:
        return (self.reads[used, number] * amounts[:, self.layer[used], number]).clamp(min=0)

    def result(self, scores: Scores) -> Mapping[str, float]:
        return {}

    def by_chain(self) -> Tensor:
        """kept, direct, rewritten, other and written, each by the sum of C's values, [chains, 5]; 0 for a C that was
        never active."""
        return self.sums[:, :-1] / self.sums[:, -1:].clamp(min=1e-300)

    def seen(self) -> Tensor:
        """Whether C was ever active, [chains] bool."""
        return self.sums[:, -1] > 0


def shares(by_chain: Tensor) -> dict[str, float | None]:
    """The four shares of all that the features write of these chains' C, and `written`; None where there is nothing."""
    total = float(by_chain[:, :4].sum())
    out = {kind: float(by_chain[:, i].sum()) / total if total > 0 else None for i, kind in enumerate(KINDS)}
    return {**out, "written": float(by_chain[:, 4].mean()) if len(by_chain) else None}

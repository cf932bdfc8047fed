"""The k best of candidates that lie on several ranks, found by counting: no rank sees the numbers of another.

A radix selection. The k-th largest key is fixed digit by digit, from the most significant one. For each digit every
rank counts its own candidates by digit, and the counts are summed over the ranks. The digits of the score come first,
then, among equal scores, those of the id; so the result is that of one process for any number of ranks. The number of
collectives depends only on the widths of the two keys. Their size does not depend on the number of candidates.

Shapes: R rows, C candidates of this rank in each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

if TYPE_CHECKING:
    from clt_plugins.contract.select import Per


@attrs.define(eq=False, kw_only=True)
class Together:
    """`Ranks`: the ranks that select together."""

    per: Per
    n_layers: int
    own_tokens: int
    own_features: int
    """Of each layer."""
    sum: Callable[[Tensor], Tensor]
    tokens: int
    first_token: int
    features: int
    first_feature: int

    def total(self, counts: Tensor) -> Tensor:
        """See `Ranks.total`."""
        return self.sum(counts)

    def among(self, score: Tensor, ids: Tensor, k: int) -> Tensor:
        """See `Ranks.among`."""
        place, feature = ids // self.own_features, ids % self.own_features
        rows = self.n_layers
        if self.per == "batch":
            rows *= self.tokens
            place = (place // self.own_tokens) * self.tokens + self.first_token + place % self.own_tokens
        everywhere = place * self.features + self.first_feature + feature
        return among_best(score, everywhere, k, rows * self.features, self.total)


def among_best(score: Tensor, ids: Tensor, k: int, ids_end: int, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Which of this rank's candidates are among the k best of all ranks in each row: a mask [R, C].

    Args:
        score: [R, C] (C may differ between ranks); higher is better, NaN is highest; -inf marks an empty column, never
            kept.
        ids: [R, C] int64, unique over all ranks within a row; of equal scores the lower id is better.
        k: how many are kept in each row, of all ranks together; all where there are fewer.
        ids_end: all ids are below it.
        total: the sum of a tensor over the ranks.
    """
    rows = score.shape[0]
    score = score.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    width = _digit_bits(rows)
    left = torch.full((rows, 1), k, dtype=torch.int32, device=score.device)
    keep = torch.zeros_like(score, dtype=torch.bool)
    # Still undecided: equal to the k-th best in all digits so far.
    undecided = score > -torch.inf
    row = torch.arange(rows, device=score.device)[:, None] << width
    for digit in _digits(score, ids, ids_end, width):
        counts = torch.zeros(rows << width, dtype=torch.int32, device=score.device)
        counts.index_add_(0, (row + digit).flatten(), undecided.flatten().to(torch.int32))
        # How many candidates have this digit or a higher one; it falls from left to right.
        reach = total(counts).view(rows, -1).flip(1).cumsum(1, dtype=torch.int32).flip(1)
        reach = torch.nn.functional.pad(reach, (0, 1))
        # The k-th best has the highest digit that enough candidates reach (the lowest one where all are too few).
        kth = ((reach >= left).sum(1, keepdim=True) - 1).clamp_min(0)
        keep |= undecided & (digit > kth)
        undecided &= digit == kth
        left -= reach.gather(1, kth + 1)
    return keep | undecided


def _digit_bits(rows: int) -> int:
    """Few rounds where there are few rows, small counts where there are many."""
    return 11 if rows <= 4 else 8 if rows <= 64 else 4


def _digits(score: Tensor, ids: Tensor, ids_end: int, width: int) -> Iterator[Tensor]:
    """The digits [R, C] of both keys, most significant first, such that higher is better."""
    mask = (1 << width) - 1
    value, bits = _ordered_bits(score)
    for key, size in ((value, bits), (ids_end - 1 - ids, max(1, (ids_end - 1).bit_length()))):
        for shift in reversed(range(0, size, width)):
            yield (key >> shift) & mask


def _ordered_bits(x: Tensor) -> tuple[Tensor, int]:
    """Integers whose bits, read as unsigned, are ordered as the numbers are; and how many bits they have."""
    # Adding zero makes -0 to 0, which it is equal to.
    if x.dtype == torch.float64:
        signed = (x + 0.0).view(torch.int64)
        return signed ^ ((signed >> 63) | torch.iinfo(torch.int64).min), 64
    signed = (x.float() + 0.0).view(torch.int32)
    return (signed ^ ((signed >> 31) & 0x7FFFFFFF)).long() + 2**31, 32

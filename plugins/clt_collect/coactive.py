"""Co-active features: which others are active at the tokens at which a feature is.

The score of features f and g is the cosine of their activity, as 0 and 1 over all tokens: tokens at which both are
active / sqrt(tokens of f * tokens of g) (Ochiai 1957). Tokens at which both are active are counted at no more than M
tokens of f, drawn at random, and scaled up. So the time is that of M rows for each feature, and not of all pairs of
features. A score that is larger than the two densities allow, sqrt(min / max), is cut to that.

Shapes: F features of a block, M tokens of each, G features of all layers, T rows, N kept.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import numpy as np
import torch
from numba import njit

Array = np.ndarray[Any, Any]

CHUNK = 256
"""Features that a thread takes at a time."""


@attrs.frozen(eq=False)
class ByRow:
    """The active features of each row: those of row t are feature[start : start + count], for each of its parts."""

    feature: Array
    """Numbers of all layers, int32."""
    start: Array
    """[parts, T] int64; a part for each tensor rank."""
    count: Array
    """[parts, T] int32."""


def coactive(first: int, row: Array, sampled: Array, active: Array, by_row: ByRow, keep: int) -> tuple[Array, Array]:
    """The features with the highest scores, [F, N] int32, and the scores [F, N] float32; of equal ones, the first.

    Args:
        first: the number of the block's first feature.
        row: M rows of the text of each feature, [F, M]; only the first `sampled` of them count.
        sampled: [F].
        active: tokens at which each feature is active, [G] int64.
    """
    other = np.full((len(row), keep), -1, np.int32)
    score = np.zeros((len(row), keep), np.float64)
    if keep:
        # Loops without Python's lock: threads share the work by features.
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            chunks = [
                pool.submit(
                    _count,
                    first + begin,
                    row[begin : begin + CHUNK],
                    sampled[begin : begin + CHUNK],
                    active,
                    by_row.feature,
                    by_row.start,
                    by_row.count,
                    other[begin : begin + CHUNK],
                    score[begin : begin + CHUNK],
                )
                for begin in range(0, len(row), CHUNK)
            ]
            for chunk in chunks:
                chunk.result()
    return other, score.astype(np.float32)


def _compiled(function: Any) -> Any:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return njit(nogil=True)(function)  # no folder can be written: compiled in every process


@_compiled
def _count(first, row, sampled, active, feature, start, count, other, score):  # type: ignore[no-untyped-def]
    together = np.zeros(len(active), np.int32)
    seen = np.empty(len(active), np.int32)
    keep = other.shape[1]
    for f in range(len(row)):
        n = 0
        for m in range(sampled[f]):
            t = row[f, m]
            for part in range(start.shape[0]):
                for at in range(start[part, t], start[part, t] + count[part, t]):
                    g = feature[at]
                    if together[g] == 0:
                        seen[n] = g
                        n += 1
                    together[g] += 1
        of_f = active[first + f]
        for at in range(n):
            g = seen[at]
            of_g = active[g]
            cosine = together[g] / sampled[f] * np.sqrt(of_f / of_g)
            cosine = min(cosine, np.sqrt(min(of_f, of_g) / max(of_f, of_g)))
            together[g] = 0
            if g == first + f:
                continue
            # Into the sorted list of the best, if it is better than the last of them.
            position = keep
            while position > 0 and (
                other[f, position - 1] < 0
                or cosine > score[f, position - 1]
                or (cosine == score[f, position - 1] and g < other[f, position - 1])
            ):
                position -= 1
            if position < keep:
                for to in range(keep - 1, position, -1):
                    other[f, to], score[f, to] = other[f, to - 1], score[f, to - 1]
                other[f, position], score[f, position] = g, cosine

"""The k best by a stable sort in float64: the definition that `Kernels.select` is compared with, slow and plain.

Shapes: B tokens, L layers, F features per layer, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, BrokenBarrierError, Lock

import torch
from torch import Tensor

from clt_plugins.contract.select import Kept, Per
from clt_plugins.testing.report import complain, same

KINDS = ("normal", "ties", "negative", "special", "rising", "equal")


@cache
def numbers(kind: str, tokens: int, layers: int, features: int) -> Tensor:
    """Pre-activations of a hard kind, [L, B, F] float64. To be copied: the next call returns the same tensor."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(layers, tokens, features, generator=random, dtype=torch.float64)
    if kind == "ties":
        return (x * 2).round() / 2
    if kind == "negative":
        return -x.abs()
    if kind == "rising":  # each layer beats the one before
        return x + 8 * torch.arange(layers)[:, None, None]
    if kind == "equal":
        return torch.full_like(x, 0.5)
    if kind == "special":
        for value in (torch.nan, -torch.inf, torch.inf, -0.0, 0.0):
            x.view(-1)[torch.randperm(x.numel(), generator=random)[: max(1, x.numel() // 20)]] = value
    return x


def expected(score: Tensor, k: int, per: Per) -> Tensor:
    """Which of [L, B, F] are kept, by their score: a mask."""
    clean = score.double().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    layers, tokens, features = clean.shape
    # Rows in the order that decides between equals: layer, token, feature.
    rows = clean.reshape(1, -1) if per == "batch" else clean.transpose(0, 1).reshape(tokens, -1)
    order = rows.sort(dim=1, descending=True, stable=True).indices[:, :k]
    mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True) & (rows > -torch.inf)
    if per == "batch":
        return mask.view(layers, tokens, features)
    return mask.view(tokens, layers, features).transpose(0, 1)


def assert_kept(kept: Kept, mask: Tensor, pre: Tensor, what: str) -> None:
    """Compare what is kept with a mask [L, B, F]: pairs, their order and their pre-activations; and empty places."""
    hint = "`select`: of equal scores the lower layer, token, feature; NaN as +inf, never -inf"
    layers, tokens, features = mask.shape
    count = len(kept.token) if kept.count is None else int(kept.count)
    token, feature = mask.transpose(0, 1).reshape(tokens, -1).nonzero(as_tuple=True)
    same(kept.token[:count], token, f"tokens of {what}", hint)
    same(kept.feature[:count], feature, f"features of {what}", hint)
    values = pre[feature // features, token, feature % features]
    same(kept.pre[:count], values, f"pre-activations of {what}", hint)
    empty = kept.token[count:], kept.feature[count:], kept.pre[count:]
    filled = tokens - 1, layers * features - 1, -torch.inf
    right = all(bool((x == value).all()) for x, value in zip(empty, filled, strict=True))
    if not right:
        complain(f"empty places of {what}: last token, last feature, -inf", repr(empty)[:200], "`finish`: see `Kept`")


def by_ranks(ranks: int, run: Callable[[int, Callable[[Tensor], Tensor]], Kept]) -> list[Kept]:
    """What `run(rank, total)` returns on each of several ranks, which take turns in this process.

    Raises:
        Exception: what the first of them raised.
    """
    turn, barrier = Lock(), Barrier(ranks)
    sent: list[list[Tensor]] = [[] for _ in range(ranks)]

    def on_rank(rank: int) -> Kept:
        def total(x: Tensor) -> Tensor:
            sent[rank].append(x.clone())
            number = len(sent[rank]) - 1
            turn.release()
            try:
                barrier.wait(timeout=60)
            finally:
                turn.acquire()
            return torch.stack([each[number] for each in sent]).sum(0).to(x.dtype)

        with turn:
            try:
                return run(rank, total)
            except BaseException:
                barrier.abort()
                raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(on_rank, rank) for rank in range(ranks)]
    errors = [future.exception() for future in futures]
    # The others only stopped waiting.
    for error in sorted((e for e in errors if e is not None), key=lambda e: isinstance(e, BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]

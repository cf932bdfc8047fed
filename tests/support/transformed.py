"""A source whose rows are numbers, and transforms of it, for tests of which rows come in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from clt_plugins import Batch, Single
from clt_plugins.distributed.transformed import TransformedSource
from clt_plugins.model.assemble import make_context
from tests.support.helpers import recipe

BATCH = 8
L, D = 3, 2


class Numbered:
    """Row n has n in every number; rank r of R has the r-th part of each batch."""

    n_layers, d_model = L, D

    def __init__(self, rank: int = 0, ranks: int = 1):
        self.rank, self.share, self.count = rank, BATCH // ranks, 0

    def next(self) -> Batch:
        self.count += 1
        first = (self.count - 1) * BATCH + self.rank * self.share
        return numbered(range(first, first + self.share))

    def held_out(self, tokens: int) -> Iterator[Batch]:
        for first in range(0, tokens, BATCH):
            yield numbered(range(10_000 + first, 10_000 + min(first + BATCH, tokens)))

    def statistics(self) -> dict[str, Tensor]:
        return {"inputs.mean": torch.zeros(L, D)}

    def state(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]

    def identity(self) -> dict[str, str]:
        return {"source": "numbers"}

    def close(self) -> None:
        self.closed = True


def numbered(numbers: Sequence[int]) -> Batch:
    rows = torch.tensor(list(numbers), dtype=torch.float32)[:, None, None].expand(-1, L, D)
    ids = torch.tensor(list(numbers))
    return Batch(rows.clone(), rows + 0.5, ids, torch.stack([ids // 4, ids % 4], 1))


class Keep:
    """Keeps the rows whose number passes a test."""

    drops = True

    def __init__(self, test: Callable[[int], bool], held_out: bool = True):
        self.test, self.held_out = test, held_out

    def __call__(self, batch: Batch, number: int) -> Batch:
        assert batch.token_ids is not None
        return batch.rows(torch.tensor([self.test(n) for n in batch.token_ids.tolist()], dtype=torch.bool))


class Renumber:
    """Writes the batch's number into the targets; counts its calls in training."""

    held_out, drops = True, False

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: Batch, number: int) -> Batch:
        self.calls += number >= 0
        return attrs.evolve(batch, targets=torch.full_like(batch.targets, 1000 * self.calls + number))

    def state(self) -> int:
        return self.calls

    def load_state(self, state: int) -> None:
        self.calls = state


def opened(*transforms: Any, parallel: Any = None, rank: int = 0, ranks: int = 1) -> TransformedSource:
    context = make_context(recipe(train={"batch_tokens": BATCH}), parallel=parallel or Single(rank, ranks))
    named = [(f"{type(one).__name__.lower()}", one) for one in transforms]
    return TransformedSource(Numbered(rank, ranks), named, context)


def ids(batch: Batch) -> list[int]:
    """The rows of a batch, after a look whether their four parts belong together."""
    assert batch.token_ids is not None and batch.positions is not None
    assert torch.equal(batch.inputs[:, 0, 0].long(), batch.token_ids)
    assert torch.equal(batch.positions[:, 0] * 4 + batch.positions[:, 1], batch.token_ids)
    return batch.token_ids.tolist()

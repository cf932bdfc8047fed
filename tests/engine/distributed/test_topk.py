"""The k best: of several ranks by counting."""

from __future__ import annotations

import pytest
import torch

from clt_plugins.distributed.topk import among_best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows, columns, k", [(1, 4000, 900), (40, 60, 7), (300, 20, 5), (2, 6, 50)])
def test_counting_finds_what_sorting_finds(rows, columns, k, dtype):
    generator = torch.Generator().manual_seed(0)
    rank = ((torch.randn(rows, columns, generator=generator) * 4).round() / 4).to(dtype)  # ties, zeros of both signs
    rank[:, ::11] = -torch.inf
    rank[0, 3] = torch.nan
    ids = torch.stack([torch.randperm(3 * columns, generator=generator)[:columns] for _ in range(rows)])
    mask = among_best(rank, ids, k, 3 * columns, lambda counts: counts)
    for row in range(rows):
        value = rank[row].nan_to_num(nan=torch.inf, neginf=-torch.inf).tolist()
        valid = [column for column in range(columns) if value[column] > -torch.inf]
        best = sorted(valid, key=lambda column: (-value[column], int(ids[row, column])))[:k]
        assert mask[row].nonzero().flatten().tolist() == sorted(best)

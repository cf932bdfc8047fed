"""The matching is the best of all."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from clt_planted.matching import match


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 3), (3, 6), (5, 5), (4, 7), (6, 4), (5, 2), (7, 1)])
def test_no_other_matching_has_a_higher_sum(rows: int, columns: int) -> None:
    random = torch.Generator().manual_seed(10 * rows + columns)
    for number in range(12):
        scores = torch.rand(rows, columns, generator=random, dtype=torch.float64) - 0.3
        if number % 2:
            scores = (scores * 4).round() / 4  # with ties
        columns_of = match(scores)
        taken = [column for column in columns_of if column is not None]
        assert len(columns_of) == rows
        assert len(set(taken)) == len(taken) == min(rows, columns)
        total = sum(float(scores[row, column]) for row, column in enumerate(columns_of) if column is not None)
        wide = scores if rows <= columns else scores.T
        best = max(
            sum(float(wide[row, column]) for row, column in enumerate(chosen))
            for chosen in permutations(range(wide.shape[1]), wide.shape[0])
        )
        assert total == pytest.approx(best, abs=1e-9)


def test_a_hidden_permutation_is_undone() -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randperm(200, generator=random)
    scores = torch.rand(60, 200, generator=random)
    scores[torch.arange(60), hidden[:60]] += 1
    assert match(scores) == hidden[:60].tolist()


def test_nothing_to_match() -> None:
    assert match(torch.zeros(0, 4)) == []
    assert match(torch.zeros(2, 0)) == [None, None]

"""Checks for `[kernels]`: see `clt_plugins.contract.interfaces.Kernels`. The definition is in `sparse_products`."""

from __future__ import annotations

from typing import Any
from unittest import SkipTest

import attrs
import torch
from torch import Tensor

from clt_plugins.contract.abilities import Preferred, Selects
from clt_plugins.data.features import Pairs
from clt_plugins.data.layout import Layout
from clt_plugins.errors import Faults
from clt_plugins.model.devices import bare_context
from clt_plugins.model.sparse import sparse_decode
from clt_plugins.testing.bench import Bench
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import complain, expect, same
from clt_plugins.testing.sparse_products import LAYOUTS, TOLERANCES, Problem, assert_conforms, random_mask

EDGES = [
    (5, 3, 4, 6, 0.0),  # N = 0
    (1, 3, 5, 7, 0.5),  # one token
    (6, 3, 1, 5, 0.5),  # one feature per layer
    (6, 1, 5, 9, 0.5),  # one layer
    (3, 2, 3, 1, 1.0),  # one dimension, every feature on
    (40, 3, 40, 33, 0.3),  # many pairs per token and per feature
    (300, 2, 3, 300, 0.5),  # more tokens and dimensions than a tile holds
]
"""Tokens, layers, features, d_model, share of features that are on."""


def built(bench: Bench) -> Any:
    """The kernels for the CPU.

    Raises:
        unittest.SkipTest: they do not serve it, as `build` says.
    """
    try:
        return bench.build(bare_context(torch.device("cpu"), recipe=bench.recipe()))
    except Faults as error:
        raise SkipTest(str(error)) from error


@check("kernels", trial=True)
def products(bench: Bench) -> None:
    """The three products for every layout and type, with one value per pair and one per target; and `name`."""
    kernels = built(bench)
    mask = random_mask(9, 4, 7, 0.3)
    mask[3] = False  # a token with no pairs
    mask[:, :, 2] = False  # a feature never on
    for layout in LAYOUTS.values():
        for dtype, tolerances in TOLERANCES.items():
            for per_target in (False, True):
                assert_conforms(
                    kernels, Problem.random(layout(4, 7), mask, 13, dtype, per_target=per_target), *tolerances
                )
    expect(isinstance(kernels.name, str), "`name`, a str", repr(kernels.name), "the class of what `build` returns")
    if isinstance(kernels, Preferred):
        number = kernels.preference(torch.device("cpu"))
        expect(isinstance(number, int), "preference(device), an int", repr(number), '`preference`, which "auto" asks')


@check("kernels")
def edges(bench: Bench) -> None:
    """No pairs, one token, one feature, one layer, one dimension; shapes that do not fill a tile; empty tokens."""
    kernels = built(bench)
    for tokens, layers, features, d_model, share in EDGES:
        mask = random_mask(tokens, layers, features, share)
        for layout in LAYOUTS.values():
            for per_target in (False, True):
                problem = Problem.random(layout(layers, features), mask, d_model, torch.float64, per_target=per_target)
                assert_conforms(kernels, problem, 1e-12)
    mask = torch.zeros(6, 2, 3, dtype=torch.bool)
    mask[2, 1, 2] = mask[3, 0, 0] = True
    assert_conforms(kernels, Problem.random(Layout.untied(2, 3), mask, 5, torch.float64, per_target=False), 1e-12)


@check("kernels")
def rows(bench: Bench) -> None:
    """Rows of no feature become zero; a pair may occur twice; empty places at the end touch nothing."""
    kernels = built(bench)
    layout = attrs.evolve(Layout.own_layer(2, 3), first=(1, 5), rows=9)
    problem = Problem.random(layout, random_mask(4, 2, 3, 0.6), 5, torch.float64, per_target=False)
    assert_conforms(kernels, problem, 1e-12)
    token, feature = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 0, 7, 0, 3])
    problem = Problem.random(Layout.untied(3, 4), random_mask(1, 3, 4, 1.0), 5, torch.float64, per_target=False)
    values = torch.tensor([1.5, 0.5, 0.0, -2.0, 0.0], dtype=torch.float64)
    dense = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    changed = attrs.evolve(problem, pairs=Pairs(token, feature, 3, 3, 4), values=values, dense=dense)
    assert_conforms(kernels, changed, 1e-12)
    for make in LAYOUTS.values():
        for per_target in (False, True):
            mask = random_mask(6, 3, 4, 0.4)
            full = Problem.random(make(3, 4), mask, 5, torch.float64, per_target=per_target)
            assert_conforms(kernels, full.with_empty_places(7), 1e-12)


@check("kernels")
def strides(bench: Bench) -> None:
    """Dense tensors need not be contiguous."""
    problem = Problem.random(Layout.untied(3, 4), random_mask(5, 3, 4, 0.4), 6, torch.float64, per_target=False)
    strided = problem.dense.transpose(0, 1).contiguous().transpose(0, 1)
    assert_conforms(built(bench), attrs.evolve(problem, dense=strided), 1e-12)


@check("kernels")
def threads(bench: Bench) -> None:
    """Results have the same bits whatever the number of threads."""
    kernels, before = built(bench), torch.get_num_threads()
    # Enough work that kernels which keep small products on one thread use two.
    mask = random_mask(201, 3, 61, 0.3)
    for dtype in TOLERANCES:
        for name, layout in LAYOUTS.items():
            problem = Problem.random(layout(3, 61), mask, 130, dtype, per_target=False)
            results = []
            try:
                for count in (1, 2):
                    torch.set_num_threads(count)
                    results.append(problem.computed(kernels, problem.weight, overwrite=False))
            finally:
                torch.set_num_threads(before)
            for product, on_one, on_two in zip(("decode", "grad_values", "grad_rows"), *results, strict=True):
                what = f"{product} of layout {name} on 2 threads as on 1"
                same(on_two, on_one, what, "sums that several threads share: give each sum one owner and one order")


@check("kernels")
def best(bench: Bench) -> None:
    """The best of many numbers are exactly those of a stable sort, on one thread and on two.

    Skipped where the kernels have no `best`.
    """
    kernels, before = built(bench), torch.get_num_threads()
    if not isinstance(kernels, Selects):
        raise SkipTest("the kernels have no `best`")
    for dtype in TOLERANCES:
        for kind in ("normal", "ties", "negative", "special", "rising"):
            for rows, columns, k in ((1, 9000, 700), (1, 40, 7), (6, 5000, 3), (9, 60, 11), (3, 4, 99)):
                blocks = list(_scores(kind, rows, columns).to(dtype))
                for count in (1, 2):
                    torch.set_num_threads(count)
                    try:
                        search = kernels.best(rows, min(k, 3 * columns))
                        for number, block in enumerate(blocks):
                            search.see(block.clone(), block.clone() + 1, number * columns)
                        kept = search.finish()
                    finally:
                        torch.set_num_threads(before)
                    what = f"{kind} {dtype}, the {k} best of {rows} x {3 * columns} on {count} threads"
                    _assert_best(kept, torch.cat(blocks, 1), k, what)


def _scores(kind: str, rows: int, columns: int) -> Tensor:
    """Three blocks, [3, R, C]."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, rows, columns, generator=random)
    if kind == "ties":
        return (x * 2).round() / 2
    if kind == "negative":
        return -x.abs()
    if kind == "rising":  # each block beats the one before
        return x + 8 * torch.arange(3)[:, None, None]
    if kind == "special":
        for value in (torch.nan, -torch.inf, torch.inf, -0.0, 0.0):
            x.view(-1)[torch.randperm(x.numel(), generator=random)[: max(1, x.numel() // 20)]] = value
    return x


def _assert_best(best: tuple[Tensor, Tensor, Tensor], score: Tensor, k: int, what: str) -> None:
    """Compare with a stable sort of everything, row by row."""
    hint = "`best`: of equal scores the lower id, NaN as +inf, never -inf; results in the order of ids"
    clean = score.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    for row, numbers in enumerate(clean):
        order = numbers.sort(descending=True, stable=True).indices
        ids = order[numbers[order] > -torch.inf][:k].sort().values
        full = best[0][row] > -torch.inf
        same(best[2][row][full], ids, f"ids of {what}", hint)
        same(best[0][row][full], numbers[ids], f"scores of {what}", hint)
        same(best[1][row][full], score[row, ids] + 1, f"pre-activations of {what}", hint)


@check("kernels")
def gradient(bench: Bench) -> None:
    """`torch.autograd.gradcheck` through `clt_plugins.sparse_decode`."""
    kernels = built(bench)
    for layout in LAYOUTS.values():
        for per_target in (False, True):
            mask = random_mask(5, 3, 4, 0.4)
            problem = Problem.random(layout(3, 4), mask, 3, torch.float64, per_target=per_target)

            def run(values: Tensor, weight: Tensor, problem: Problem = problem) -> Tensor:
                return sparse_decode(values, problem.pairs, weight, problem.layout, kernels)

            inputs = (problem.values.requires_grad_(), problem.weight.requires_grad_())
            try:
                torch.autograd.gradcheck(run, inputs)
            except RuntimeError as error:
                if type(error).__name__ != "GradcheckError":
                    raise
                text = " ".join(str(error).split())[:300]
                complain(f"gradients of decode for {problem}", text, "`grad_values`, `grad_rows`")

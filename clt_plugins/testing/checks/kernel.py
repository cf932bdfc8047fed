"""Checks for `[kernels]`: see `clt_plugins.contract.model.kernels.Kernels`. The definition is in `sparse_products`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import SkipTest

import attrs
import torch
from torch import Tensor

from clt_plugins.contract.model.kernels import Preferred, Updates
from clt_plugins.contract.select import Kept, Per
from clt_plugins.data.features import Pairs
from clt_plugins.data.layout import Layout
from clt_plugins.distributed.topk import Together
from clt_plugins.errors import Faults
from clt_plugins.model.devices import bare_context
from clt_plugins.model.sparse import sparse_decode
from clt_plugins.testing.adam_update import assert_updates
from clt_plugins.testing.bench import Bench
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import complain, expect, same
from clt_plugins.testing.selection import KINDS, assert_kept, by_ranks, expected, numbers
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


@check("kernels", needs=("products",))
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


@check("kernels", needs=("products",))
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


@check("kernels", needs=("products",))
def strides(bench: Bench) -> None:
    """Dense tensors need not be contiguous."""
    problem = Problem.random(Layout.untied(3, 4), random_mask(5, 3, 4, 0.4), 6, torch.float64, per_target=False)
    strided = problem.dense.transpose(0, 1).contiguous().transpose(0, 1)
    assert_conforms(built(bench), attrs.evolve(problem, dense=strided), 1e-12)


@check("kernels", needs=("products",))
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


SELECTIONS: list[tuple[int, int, int, int, Per]] = [
    (5, 3, 900, 700, "batch"),
    (4, 3, 10, 7, "batch"),
    (2, 2, 3, 12, "batch"),  # all
    (4, 3, 1000, 3, "token"),
    (9, 3, 60, 11, "token"),
    (3, 3, 4, 99, "token"),  # more than there are
]
"""Tokens, layers, features, k, and of what."""


@check("kernels")
def select(bench: Bench) -> None:
    """What is selected is exactly what a stable sort selects: ties, NaN, infinities, any score, one thread and two."""
    kernels, before = built(bench), torch.get_num_threads()
    for kind in KINDS:
        for shape in SELECTIONS:
            for dtype in TOLERANCES:
                _assert_selects(kernels, kind, dtype, shape, "plain")
            try:
                torch.set_num_threads(2)
                _assert_selects(kernels, kind, torch.float32, shape, "plain")
            finally:
                torch.set_num_threads(before)
            if kind in ("ties", "special"):
                for by in ("scale", "shift"):
                    _assert_selects(kernels, kind, torch.float32, shape, by)
                for dtype in TOLERANCES:
                    for by in ("scale and shift", "score"):
                        _assert_selects(kernels, kind, dtype, shape, by)


@check("kernels", needs=("select",))
def select_by_ranks(bench: Bench) -> None:
    """Ranks with unequal shares of the features, or with parts of the batch, keep what one process keeps."""
    kernels = built(bench)
    for kind in KINDS:
        for tokens, layers, features, k, per in SELECTIONS[1:]:
            pre = numbers(kind, tokens, layers, features).float()
            cut = max(1, features // 4)
            shares = [(range(tokens), range(cut)), (range(tokens), range(cut, features))]
            if per == "batch":
                half = tokens // 2
                shares = [(part, own) for part in (range(half), range(half, tokens)) for _, own in shares]

            def run(rank: int, total: Callable[[Tensor], Tensor], shares=shares, pre=pre, k=k, per=per) -> Kept:
                own_tokens, own = shares[rank]
                search = kernels.select(len(own_tokens), pre.shape[0], len(own), k, per=per)
                for layer, block in enumerate(pre):
                    search.see(layer, block[own_tokens.start : own_tokens.stop, own.start : own.stop].clone())
                tokens, first = (pre.shape[1], own_tokens.start) if per == "batch" else (len(own_tokens), 0)
                return search.finish(
                    Together(
                        per=per,
                        n_layers=pre.shape[0],
                        own_tokens=len(own_tokens),
                        own_features=len(own),
                        sum=total,
                        tokens=tokens,
                        first_token=first,
                        features=pre.shape[2],
                        first_feature=own.start,
                    )
                )

            mask = expected(pre, k, per)
            for rank, kept in enumerate(by_ranks(len(shares), run)):
                own_tokens, own = shares[rank]
                part = slice(own_tokens.start, own_tokens.stop), slice(own.start, own.stop)
                what = f"{kind} numbers, the {k} best per {per} of {list(pre.shape)}, rank {rank} of {len(shares)}"
                assert_kept(kept, mask[:, *part], pre[:, *part], what)


def _assert_selects(kernels: Any, kind: str, dtype: torch.dtype, shape: tuple[Any, ...], by: str) -> None:
    """By the pre-activations themselves ("plain"), by scale and shift, or by a score of the caller's."""
    tokens, layers, features, k, per = shape
    pre = numbers(kind, tokens, layers, features).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    # Powers of two and small multiples of them: the scores are exact, however they are rounded.
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0]).repeat(features)[:features].to(wide)
    shift = torch.tensor([0.0, 0.5, -torch.inf, -1.0, 0.0]).repeat(features)[:features].to(wide)
    score = numbers("ties", tokens, layers, features).to(dtype) if by == "score" else pre
    given = {name: x for name, x in {"scale": scale, "shift": shift}.items() if name in by}
    search = kernels.select(tokens, layers, features, k, per=per)
    for layer in range(layers):
        block = pre[layer].t().clone().t() if by == "plain" else pre[layer].clone()  # not contiguous; contiguous
        search.see(layer, block, **({"score": score[layer].clone()} if by == "score" else given))
        block.fill_(torch.nan)  # the encoder writes the next layer there
    if "scale" in given:
        score = score * scale
    if "shift" in given:
        score = score + shift
    threads = torch.get_num_threads()
    what = f"{kind} numbers, {dtype}, by {by}, the {k} best per {per} of {tokens, layers, features}, {threads} threads"
    assert_kept(search.finish(), expected(score, k, per), pre, what)


@check("kernels")
def update(bench: Bench) -> None:
    """Adam's update as the engine computes it, with the same random bits, on one thread and on two.

    Skipped where the kernels have no `update_rows`.
    """
    kernels, before = built(bench), torch.get_num_threads()
    if not isinstance(kernels, Updates):
        raise SkipTest("the kernels have no `update_rows`")
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            assert_updates(kernels)
        finally:
            torch.set_num_threads(before)


@check("kernels", needs=("products",))
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

"""Checks for `[[losses]]`: see `clt_plugins.contract.training.loss.Loss` and `Forward`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest import SkipTest

import attrs
import torch
from torch import Tensor

from clt_plugins.contract.training.loss import Forward, ModelPass
from clt_plugins.data.features import Features
from clt_plugins.model.assemble import Parts
from clt_plugins.testing.bench import FEATURES, LAYERS, TOKENS, Bench, idle_tokens, passes
from clt_plugins.testing.checks.activation import IN_PLACE
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import complain, expect, same
from clt_plugins.training.objective import objective


@check("losses")
def terms(bench: Bench) -> None:
    """Terms are finite scalars by name, also for one token and without dead features; `Forward` is not changed."""
    parts = bench.parts()
    for tokens, dead in ((16, True), (1, True), (16, False)):
        forward = capture(parts, bench, tokens=tokens, dead=dead)
        before = {name: (x, x._version) for name, x in _tensors(forward).items()}
        terms = parts.losses[0](forward)
        look = "what `__call__` returns"
        expect(isinstance(terms, Mapping) and terms, "a term, or several, by name", repr(terms)[:200], look)
        for name, value in terms.items():
            right = isinstance(value, Tensor) and value.dim() == 0 and isinstance(name, str)
            got = f"{type(value).__name__} {list(getattr(value, 'shape', []))}"
            expect(right, f"a scalar tensor as term {name!r}", got, f"{look}: end with `.sum()` or `.mean()`")
            expect(
                bool(torch.isfinite(value)),
                f"a finite term {name!r} for {tokens} tokens" + (" and dead features" if dead else ""),
                f"{float(value.detach())}",
                "divisions by what can be 0: a count, a variance, a norm",
            )
        changed = [name for name, (x, version) in before.items() if x._version != version]
        expect(not changed, "Forward as it was: other losses read it too", f"{changed} changed in place", "`__call__`")
    needs_pre: Any = parts.losses[0].needs_pre
    expect(type(needs_pre) is bool, "`needs_pre`, True or False", repr(needs_pre), "the class of what `build` returns")


@check("losses")
def selection(bench: Bench) -> None:
    """The loss's selection leaves the pre-activations as they are. Skipped where it has none."""
    parts = bench.parts(transcoder={"dtype": "float64"})
    chosen = parts.losses[0].selection(TOKENS, idle_tokens())
    if chosen is None:
        raise SkipTest("it has no selection")
    numbers = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        pre = torch.randn(TOKENS, FEATURES, generator=numbers, dtype=torch.float64)
        block = pre.clone()
        with torch.no_grad():
            chosen.see(layer, block)
        same(block, pre, "`see` to leave the block as it is: other selections read it too", IN_PLACE)


@check("losses")
def gradient_reconstruction(bench: Bench) -> None:
    """Each term's derivative by the reconstruction is the numerical one, in float64.

    A term that stops this gradient on purpose fails here: list it in `expected_failures` and say so.
    """
    forward, loss = _forward(bench)
    _compare(forward.reconstruction, lambda x: attrs.evolve(forward, reconstruction=x), loss, "reconstruction")


@check("losses")
def gradient_features(bench: Bench) -> None:
    """Each term's derivative by the features' values is the numerical one, in float64; also by the values
    that the loss's selection kept, and by all pre-activations, where it has them."""
    forward, loss = _forward(bench)
    features, extra = forward.features, forward.extra
    _compare(
        features.values, lambda x: attrs.evolve(forward, features=Features(x, features.pairs)), loss, "features.values"
    )
    if extra is not None:
        _compare(extra.values, lambda x: attrs.evolve(forward, extra=Features(x, extra.pairs)), loss, "extra.values")
    model = forward.model
    if model is not None:
        _compare(
            model.logits, lambda x: attrs.evolve(forward, model=attrs.evolve(model, logits=x)), loss, "model.logits"
        )
    if forward.pre is not None:
        _compare(forward.pre, lambda x: attrs.evolve(forward, pre=x), loss, "pre")


@check("losses")
def runs_model(bench: Bench) -> None:
    """A loss that runs the language model asks for a fixed number of contexts, says in which steps, has no term in the
    others, and its terms are `mean`s over the positions of all data ranks. Skipped where it runs none."""
    forward, loss = _forward(bench)
    if forward.model is None:
        raise SkipTest("it does not run the language model: `contexts` and `runs` would say so")
    contexts: Any = loss.contexts
    good = type(contexts) is int and contexts > 0
    expect(good, "a number of contexts, 1 or more, in `contexts`", repr(contexts), "`contexts`")
    for step, progress in ((1, 0.0), (50, 0.5), (100, 0.99)):
        answers = [loss.runs(step, progress) for _ in range(2)]
        text = "True or False, the same each time: all ranks must agree"
        expect(answers in ([True, True], [False, False]), text, str(answers), "`runs`")
    model = forward.model
    with torch.no_grad():
        without = loss(attrs.evolve(forward, model=None))
        terms, halved = (loss(attrs.evolve(forward, model=each)) for each in (model, _halved(model)))
    text = "terms that do not need the model, or none, where `forward.model` is None"
    expect(isinstance(without, Mapping), text, repr(without)[:200], "`__call__`: return {} there")
    for name, value in terms.items():
        if name not in without:
            text = f"{name!r} in proportion to `forward.model.mean`, which knows the positions of all data ranks"
            same(
                halved[name], value / 2, text, "`__call__`: `forward.model.mean(x)` instead of `x.mean()` or `x.sum()`"
            )


def _halved(model: ModelPass) -> ModelPass:
    """As if other data ranks had as many positions, where the term is 0."""
    return attrs.evolve(model, mean=lambda x: model.mean(x) / 2)


def _forward(bench: Bench) -> tuple[Forward, Any]:
    parts = bench.parts(transcoder={"dtype": "float64", "path": "sparse"})
    return capture(parts, bench, dtype=torch.float64), parts.losses[0]


def _compare(value: Tensor, rebuilt: Callable[[Tensor], Forward], loss: Any, name: str) -> None:
    """Autograd against central differences, along a fixed random direction, for each term."""
    # Away from 0, where a ReLU has no derivative.
    point = torch.where(value.detach().abs() < 1e-3, 0.1, value.detach()).requires_grad_()
    numbers = torch.Generator().manual_seed(0)
    direction = torch.randn(point.shape, generator=numbers, dtype=torch.float64)
    size = 1e-6
    with torch.no_grad():
        up, down = loss(rebuilt(point + size * direction)), loss(rebuilt(point - size * direction))
    for term, value_of_term in loss(rebuilt(point)).items():
        numerical = float(up[term] - down[term]) / (2 * size)
        analytic = 0.0
        if value_of_term.requires_grad:
            (slope,) = torch.autograd.grad(value_of_term, point, allow_unused=True, retain_graph=True)
            analytic = 0.0 if slope is None else float((slope * direction).sum())
        # Central differences of float64 numbers near 1 are good to about 1e-9.
        if abs(analytic - numerical) > 1e-5 * max(1e-2, abs(numerical)):
            complain(
                f"the gradient of {term!r} by forward.{name} to be its derivative, {numerical:.6g} along a direction",
                "no gradient" if analytic == 0 else f"{analytic:.6g}",
                f"a `detach()`, `.item()`, `no_grad` or change in place of what comes from forward.{name}",
            )


def capture(
    parts: Parts, bench: Bench, *, dtype: torch.dtype = torch.float32, tokens: int = 16, dead: bool = True
) -> Forward:
    """The `Forward` that the choice's loss receives in a step; all tensors in it are detached."""
    seen: list[Forward] = []
    loss = parts.losses[0]

    class Spy:
        needs_pre = loss.needs_pre

        def selection(self, tokens: int, idle: Tensor) -> Any:
            return loss.selection(tokens, idle)

        def __call__(self, forward: Forward) -> dict[str, Tensor]:
            seen.append(forward)
            return {}

    batch = bench.batch(dtype).rows(slice(0, tokens))
    with torch.no_grad():
        idle = idle_tokens()
        objective(parts.transcoder, [Spy()], batch, idle if dead else idle * 0, 0.5, passes(parts, parts.losses[:1]))
    return seen[0]


def _tensors(forward: Forward) -> dict[str, Tensor]:
    tensors = {
        name: getattr(forward, name)
        for name in ("inputs", "targets", "reconstruction", "scale", "variance", "idle_tokens", "pre")
    }
    tensors |= {"features.values": forward.features.values, "batch.inputs": forward.batch.inputs}
    return {name: x for name, x in tensors.items() if x is not None}

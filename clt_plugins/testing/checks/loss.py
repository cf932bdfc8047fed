"""Checks for `[[losses]]`: see `clt_plugins.contract.training.loss.Loss` and `Forward`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from unittest import SkipTest

import attrs
import torch
from torch import Tensor

from clt_plugins.contract.training.loss import Forward, ModelPass
from clt_plugins.data.batch import Batch
from clt_plugins.data.features import Features, Pairs
from clt_plugins.model.assemble import Parts
from clt_plugins.testing.bench import FEATURES, LAYERS, TOKENS, Bench, as_now, idle_tokens, passes
from clt_plugins.testing.checks.activation import IN_PLACE
from clt_plugins.testing.derivatives import compare, leaves
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import complain, expect, same
from clt_plugins.training.objective import objective


@check("losses", trial=True, basic=True)
def terms(bench: Bench) -> None:
    """Terms are finite scalars by name, and so are their gradients: also for one token, without dead features, where no
    feature is active, and where activations and reconstruction are 0. `Forward` is not changed. Something gets a
    gradient."""
    parts = bench.parts()
    for case, forward in _forwards(parts, bench):
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
                f"a finite term {name!r} for {case}",
                f"{float(value.detach())}",
                "divisions by what can be 0: a count, a variance, a norm",
            )
            inputs = [x for x in _tensors(forward).values() if x.requires_grad]
            slopes = (
                torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True) if value.requires_grad else ()
            )
            finite = all(bool(torch.isfinite(slope).all()) for slope in slopes if slope is not None)
            expect(
                finite,
                f"a finite gradient of {name!r} for {case}",
                "inf or NaN in it",
                "roots, norms and divisions of what can be 0: `torch.where` around them does not stop a NaN",
            )
        changed = [name for name, (x, version) in before.items() if x._version != version]
        expect(not changed, "Forward as it was: other losses read it too", f"{changed} changed in place", "`__call__`")
    expect(
        bench.step(parts, bench.batch()).total.requires_grad,
        "a term that has a gradient",
        "none: the loss changes no weight",
        "a `detach()`, a `no_grad`, numbers read by `.item()`",
    )
    needs_pre: Any = parts.losses[0].needs_pre
    expect(type(needs_pre) is bool, "`needs_pre`, True or False", repr(needs_pre), "the class of what `build` returns")


def _forwards(parts: Parts, bench: Bench) -> Iterator[tuple[str, Forward]]:
    """What the loss may get, and in words; reconstruction and values require a gradient."""
    whole = capture(parts, bench)
    pairs = whole.features.pairs
    nothing = kept = Features(torch.zeros_like(whole.features.values), pairs)
    if pairs is not None:
        none = Pairs(pairs.token[:0], pairs.feature[:0], pairs.tokens, pairs.n_layers, pairs.n_features)
        nothing = Features(whole.features.values[:0], none)
    off = attrs.evolve(whole, reconstruction=torch.zeros_like(whole.reconstruction), features=nothing)
    zeros = torch.zeros_like(whole.targets)
    batch = Batch(torch.zeros_like(whole.batch.inputs), torch.zeros_like(whole.batch.targets))
    for case, forward in (
        ("16 tokens and dead features", whole),
        ("1 token", capture(parts, bench, tokens=1)),
        ("16 tokens", capture(parts, bench, dead=False)),
        ("a batch where no feature is kept", off),
        ("a batch where all features are 0", attrs.evolve(off, features=kept)),
        ("a batch of zeros", attrs.evolve(off, batch=batch, inputs=zeros, targets=zeros)),
    ):
        changes: dict[str, Any] = {"reconstruction": _leaf(forward.reconstruction)}
        changes["features"] = Features(_leaf(forward.features.values), forward.features.pairs)
        if forward.extra is not None:
            changes["extra"] = Features(_leaf(forward.extra.values), forward.extra.pairs)
        if forward.pre is not None:
            changes["pre"] = _leaf(forward.pre)
        yield case, attrs.evolve(forward, **changes)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


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


@check("losses", needs=("determinism",))
def gradient_reconstruction(bench: Bench) -> None:
    """Each term's derivative by the reconstruction is the numerical one, in float64.

    A term that stops this gradient on purpose fails here: list it in `expected_failures` and say so.
    """
    forward, loss = _forward(bench)
    compare(forward.reconstruction, lambda x: attrs.evolve(forward, reconstruction=x), loss, "reconstruction")


@check("losses", needs=("determinism",))
def gradient_features(bench: Bench) -> None:
    """Each term's derivative by the features' values is the numerical one, in float64; also by the values
    that the loss's selection kept, and by all pre-activations, where it has them."""
    forward, loss = _forward(bench)
    features, extra = forward.features, forward.extra
    compare(
        features.values, lambda x: attrs.evolve(forward, features=Features(x, features.pairs)), loss, "features.values"
    )
    if extra is not None:
        compare(extra.values, lambda x: attrs.evolve(forward, extra=Features(x, extra.pairs)), loss, "extra.values")
    model = forward.model
    if model is not None:
        compare(
            model.logits, lambda x: attrs.evolve(forward, model=attrs.evolve(model, logits=x)), loss, "model.logits"
        )
    if forward.pre is not None:
        compare(forward.pre, lambda x: attrs.evolve(forward, pre=x), loss, "pre")


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


@check("losses", needs=("resume",))
def own_gradient(bench: Bench) -> None:
    """The loss's own parameters are trained: each that requires a gradient gets one, its numerical derivative, and no
    other tensor of the loss does.

    Skipped where it has none.
    """
    parts = bench.parts(transcoder={"dtype": "float64", "path": "sparse"})
    forward, loss = capture(parts, bench, dtype=torch.float64), parts.losses[0]
    decoder = list(parts.transcoder.parameters())  # by `forward.decode`
    reached = [x for x in leaves(loss(forward)) if all(x is not p for p in decoder)]
    known = dict(loss.named_parameters()) if isinstance(loss, torch.nn.Module) else {}
    strangers = [list(x.shape) for x in reached if all(x is not p for p in known.values())]
    expect(
        not strangers,
        "gradients of the loss's own parameters only",
        f"a tensor of shape {strangers[:1]} gets one too, and is not trained",
        "the loss: a torch.nn.Module, whose parameters are attributes (of lists: `torch.nn.ParameterList`)",
    )
    trained = {name: p for name, p in known.items() if p.requires_grad}
    if not trained:
        raise SkipTest("it has no parameters")
    restore = as_now(loss)
    for name, parameter in trained.items():
        point = parameter.detach().clone()
        numbers = torch.Generator().manual_seed(0)
        direction = torch.randn(point.shape, generator=numbers, dtype=torch.float64).to(point)

        def total(size: float, p: Tensor = parameter, start: Tensor = point, way: Tensor = direction) -> Tensor:
            restore()
            with torch.no_grad():
                p.copy_(start + size * way)
            return torch.stack([x.double() for x in loss(forward).values()]).sum()

        size = 1e-6 if point.dtype == torch.float64 else 1e-3
        numerical = float(total(size).detach() - total(-size).detach()) / (2 * size)
        value = total(0.0)
        slope = torch.autograd.grad(value, parameter, allow_unused=True)[0] if value.requires_grad else None
        analytic = 0.0 if slope is None else float((slope * direction).sum())
        allowed = 1e-5 if point.dtype == torch.float64 else 1e-2
        if slope is None or abs(analytic - numerical) > allowed * max(1e-2, abs(numerical)):
            complain(
                f"the gradient of the loss by its parameter {name!r}, {numerical:.6g} along a direction",
                "none" if slope is None else f"{analytic:.6g}",
                "a `detach()`, a `no_grad` or `.data` on its way; what is only state says `requires_grad_(False)`",
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
        for name in ("inputs", "targets", "reconstruction", "variance", "idle_tokens", "pre")
    }
    tensors |= {"features.values": forward.features.values, "batch.inputs": forward.batch.inputs}
    tensors["units.scale"] = forward.units.scale
    if forward.extra is not None:
        tensors["extra.values"] = forward.extra.values
    return {name: x for name, x in tensors.items() if x is not None}

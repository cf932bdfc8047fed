"""Checks for `[optimizer]`: see `clt_plugins.contract.training.optimizer.Optimizer`."""

from __future__ import annotations

from typing import Any
from unittest import SkipTest

import torch
from safetensors.torch import load
from torch import Tensor

from clt_plugins.errors import Faults, Refused
from clt_plugins.model.assemble import Parts, close
from clt_plugins.testing.bench import FEATURES, Bench
from clt_plugins.testing.checks.tensor_parallel import CHOICE, Result, cut, packed, weights_by_name
from clt_plugins.testing.processes.pool import on_ranks
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import complain, expect, location, same
from clt_plugins.training import learned
from clt_plugins.training.kept.moments import moments
from clt_plugins.training.optimizers.make import build_optimizer, make_optimizer, weights_of
from clt_plugins.training.optimizers.rate import set_rate
from clt_plugins.training.saved.checkpoint import Progress, load_checkpoint, save_checkpoint

RATE = 1e-2
SMALL = 1e-4
"""A rate at which every optimizer goes downhill."""
STEPS = 3
FACTOR = 3.0
"""Of the learning rate of a weight, as its plugin says."""
ROUNDING = 1e-5
"""Of float32, as a share of the largest weight: sums of other lengths, over a few steps."""


def _made(bench: Bench, parts: Parts) -> torch.optim.Optimizer:
    recipe = parts.context.recipe
    assert recipe is not None
    return make_optimizer(parts.transcoder, recipe)


def _gradients(parts: Parts, step: int, without: str = "") -> None:
    """Random gradients, those of one process cut as files are; None for one parameter."""
    parameters, parallel = learned.parameters(parts), parts.context.parallel
    for name, (owner, view, axis) in learned.views(parts).items():
        p = parameters[owner]
        if owner == without:
            p.grad = None
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        shape = list(view(p.detach()).shape)
        if axis is not None:
            shape[axis] = FEATURES
        numbers = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * step)
        whole = torch.randn(shape, generator=numbers, dtype=torch.float64)
        view(p.grad).copy_(cut(whole, axis, parallel.shard(FEATURES)))


def _take(parts: Parts, optimizer: torch.optim.Optimizer, steps: range, without: str = "") -> None:
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        _gradients(parts, step, without)
        set_rate(optimizer, RATE / (1 + step))
        optimizer.step()


@check("optimizer", trial=True)
def moves(bench: Bench) -> None:
    """A step moves every weight that has a gradient, to finite numbers, at the rate of its group: at 0 nothing moves. A
    group has the `lr_factor` of its weights. Some steps at a small rate lower a quadratic function of each weight.

    A weight whose gradient is None stays.
    """
    parts = bench.parts()
    optimizer = _made(bench, parts)
    look = "`step`, and the groups that `make` gives"
    named = dict(parts.transcoder.named_parameters())
    last = list(named)[-1]
    for step, (rate, without) in enumerate(((RATE, ""), (RATE, last), (0.0, ""))):
        before = {name: p.detach().clone() for name, p in named.items()}
        optimizer.zero_grad(set_to_none=True)
        _gradients(parts, step, without)
        set_rate(optimizer, rate)
        optimizer.step()
        for name, p in named.items():
            expect(bool(torch.isfinite(p).all()), f"finite numbers in {name}", "some that are not", look)
            moved = not torch.equal(p.detach(), before[name])
            if rate == 0:
                reads = f'{look}: it reads `group["lr"]` in every step'
                expect(not moved, f"{name} as it was, at a rate of 0", "it moved", reads)
            elif name == without:
                expect(not moved, f"{name}, whose gradient is None, as it was", "it moved", look)
            else:
                expect(moved, f"{name} to move by its gradient", "it stayed", look)
    _has_factors(bench)
    _descends(bench)


def _has_factors(bench: Bench) -> None:
    """What a plugin multiplies the rate of a weight by is in the factor of its group, times the optimizer's own."""
    parts = bench.parts()
    named = dict(parts.transcoder.named_parameters())
    before, marked = _factors(_made(bench, parts)), list(named)[-1]
    named[marked].lr_factor = FACTOR  # type: ignore[attr-defined]
    after = _factors(_made(bench, parts))
    for name, p in named.items():
        factor = FACTOR if name == marked else 1.0
        expected = f"{name}, whose plugin says lr_factor={factor:g}, in a group of lr_factor {factor * before[p]:g}"
        got, right = f"{after[p]:g}", abs(after[p] - factor * before[p]) <= ROUNDING * factor * before[p]
        expect(right, expected, got, '`make`: `"lr_factor": weight.lr_factor` in a group for each factor')


def _factors(optimizer: torch.optim.Optimizer) -> dict[Any, float]:
    """What the engine multiplies the rate of each parameter by."""
    return {p: group.get("lr_factor", 1.0) for group in optimizer.param_groups for p in group["params"]}


def _descends(bench: Bench) -> None:
    """Some steps at a small rate lower |w - goal|^2 for each weight w, for a random goal."""
    parts = bench.parts()
    optimizer = _made(bench, parts)
    named = dict(parts.transcoder.named_parameters())
    numbers = torch.Generator().manual_seed(7)
    goals = {name: p.detach() + torch.randn(p.shape, generator=numbers).to(p) for name, p in named.items()}

    def away() -> dict[str, float]:
        return {name: float((p.detach().double() - goals[name].double()).square().sum()) for name, p in named.items()}

    before = away()
    for _ in range(STEPS):
        for name, p in named.items():
            p.grad = p.detach() - goals[name]
        set_rate(optimizer, SMALL)
        optimizer.step()
    for name, value in away().items():
        expected = f"|w - goal|^2 of {name} to fall, {before[name]:.6g} before, in {STEPS} steps at a rate of {SMALL:g}"
        expect(
            value < before[name], expected, f"{value:.6g}", "the sign of the update: a step goes against the gradient"
        )


@check("optimizer")
def resume(bench: Bench) -> None:
    """Saved in a checkpoint and read into a new optimizer, training goes on bit for bit as if it had not stopped."""
    parts = bench.parts()
    optimizer = _made(bench, parts)
    _take(parts, optimizer, range(STEPS))
    idle = torch.zeros(parts.transcoder.shape, dtype=torch.int64)
    look = "what it keeps: tensors in `self.state[parameter]`; not in groups, attributes or the class"
    try:
        path = save_checkpoint(bench.folder / "checkpoints", Progress(STEPS, 0, idle), parts, optimizer, 1)
    except Refused as error:
        complain("state that a checkpoint can hold", str(error), "`self.state[parameter]`")
    again = bench.parts(stirred=False)
    other = _made(bench, again)
    load_checkpoint(path, again, other)
    later = range(STEPS, 2 * STEPS)
    _take(parts, optimizer, later)
    _take(again, other, later)
    resumed = weights_by_name(again)
    for name, value in weights_by_name(parts).items():
        same(resumed[name], value, f"{name} as without a stop", look)


@check("optimizer")
def no_sync(bench: Bench) -> None:
    """A step reads nothing back from the device.

    Run on the device "meta", which has shapes but no numbers, and stands for a GPU here. Skipped where torch's own
    fused step is used, which the device "meta" does not have.
    """
    parts = bench.parts(device="meta", stirred=False)
    try:
        _take(parts, _made(bench, parts), range(2))
    except (RuntimeError, NotImplementedError) as error:
        if "fused=True" in str(error):
            raise SkipTest("a fused step of torch's own, which does not wait") from None
        complain(
            "a step that never waits for a GPU",
            " ".join(str(error).split())[:300],
            f"{location(error, bench.file)}: `.item()`, `float(...)`, `bool(...)`, `nonzero`? Use `torch.where`",
        )


@check("optimizer")
def state_bytes(bench: Bench) -> None:
    """`state_bytes` is what the optimizer keeps beside each weight, also told of a weight without memory; of float32
    weights, and of bfloat16 ones where it takes them."""
    for dtype in ("float32", "bfloat16"):
        try:
            parts = bench.parts(transcoder={"dtype": dtype})
            optimizer = _made(bench, parts)
        except Faults:
            if dtype == "bfloat16":
                continue
            raise
        _take(parts, optimizer, range(1))
        recipe = parts.context.recipe
        assert recipe is not None
        planned = bench.parts(device="meta", stirred=False, transcoder={"dtype": dtype})
        for source in (parts, planned):
            chosen = build_optimizer(source.transcoder, recipe)
            for weight, real in zip(weights_of(source.transcoder), weights_of(parts.transcoder), strict=True):
                state = optimizer.state.get(real.parameter, {}).values()
                kept = sum(x.numel() * x.element_size() for x in state if isinstance(x, Tensor) and x.dim())
                said, what = chosen.state_bytes(weight), f"the {kept} bytes that it keeps of {weight.name} in {dtype}"
                expect(said == kept, what, f"{said}", "`state_bytes`: of the types that `step` makes its state in")


@check("optimizer")
def clipped(bench: Bench) -> None:
    """An optimizer that says it divides gradients by `grad_scale` does. Skipped where it does not say so."""
    results = []
    for scale in (1.0, 8.0):
        parts = bench.parts()
        optimizer: Any = _made(bench, parts)
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise SkipTest("the engine scales its gradients")
        for step in range(STEPS):
            _gradients(parts, step)
            for p in parts.transcoder.parameters():
                if p.grad is not None:
                    p.grad.mul_(scale)
            optimizer.grad_scale = torch.tensor(scale)
            set_rate(optimizer, RATE)
            optimizer.step()
        results.append(weights_by_name(parts))
    for name, value in results[0].items():
        look = "`step`: divide each gradient by `self.grad_scale` where that is set"
        same(results[1][name], value, f"{name} as with gradients that are divided already", look, ROUNDING)


@check("optimizer")
def tensor_ranks(bench: Bench) -> None:
    """On 2 ranks that share the features, weights and their state are after some steps those of one process.

    Skipped where it refuses several ranks by `Refused`, or no choice `tensor` is installed for `[parallel]`.
    """
    if CHOICE not in bench.plugins.choices("parallel"):
        raise SkipTest(f"no choice {CHOICE!r} for [parallel] is installed")
    parts = bench.parts()
    weights = packed(weights_by_name(parts))
    optimizer = _made(bench, parts)
    _take(parts, optimizer, range(STEPS))
    expected = {**weights_by_name(parts), **moments(parts, optimizer)[0]}
    results = on_ranks(bench, 2, steps_on_rank, weights)
    if isinstance(results[0], str):
        expect(all(isinstance(one, str) for one in results), "all ranks to refuse", "some train", "`build` and `make`")
        raise SkipTest(f"it refuses several ranks: {results[0]}")
    look = "`step`: what it computes over several features of a matrix (a norm, a mean) misses those of other ranks"
    for rank, result in enumerate(results):
        for name, value in load(result.tensors).items():
            what = f"{name} on rank {rank} of 2 as in one process"
            same(value, cut(expected[name], result.axes[name], result.shard), what, look, ROUNDING)


def steps_on_rank(bench: Bench, weights: bytes) -> Result | str:
    """Some steps with the parent's weights and gradients, of which this rank uses its slice; why it refuses."""
    parts = bench.parts(stirred=False, parallel={"name": CHOICE})
    axes, shard = parts.transcoder.feature_axes(), parts.context.parallel.shard(FEATURES)
    local = weights_by_name(parts)
    for name, value in load(weights).items():
        local[name].copy_(cut(value, axes[name], shard))
    try:
        optimizer = _made(bench, parts)
    except Faults as error:
        close(parts)
        return str(error)
    _take(parts, optimizer, range(STEPS))
    state, of_state = moments(parts, optimizer)
    close(parts)
    return Result(tensors=packed({**weights_by_name(parts), **state}), axes=axes | of_state, shard=shard)

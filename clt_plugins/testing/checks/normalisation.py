"""Checks for `[normalisation]`: see `clt_plugins.contract.model.normalisation.Normalisation`."""

from __future__ import annotations

from typing import Any
from unittest import SkipTest

import torch
from safetensors.torch import load, save

from clt_plugins.contract.model.normalisation import Observes
from clt_plugins.data.affine import Affine, Folding
from clt_plugins.data.batch import Batch
from clt_plugins.errors import Faults
from clt_plugins.model.assemble import close
from clt_plugins.model.normalisation.fit import fit_to_batches, fit_to_statistics
from clt_plugins.model.normalisation.statistics import estimate
from clt_plugins.model.transcoder import CrossLayerTranscoder
from clt_plugins.testing.bench import D_MODEL, LAYERS, TOKENS, Bench
from clt_plugins.testing.checks.tensor_parallel import CHOICE
from clt_plugins.testing.processes.pool import on_ranks
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import complain, expect, location, same
from clt_plugins.testing.skewed import BATCHES, fitted, skewed_batch

KINDS = ("mean", "std", "rms", "norm")
"""The statistics that a normalisation may need."""
DATA_RANKS = 2
LARGE, OF_ONE_SIZE = 1e6, 100
"""How many times one side's activations are multiplied, and how much the other's normalised ones may grow by that: a
scale from few tokens, others each time, changes by some times."""
ROUNDING = 1e-6
"""Of float64, through matrices whose largest and smallest scale are 1e6 apart: the dimension that never varies."""


@check("normalisation", trial=True)
def there_and_back(bench: Bench) -> None:
    """`inputs` and `targets` give new, finite numbers of the same shape, for one token too; `restore` undoes `targets`;
    gradients pass through all three, and nothing is changed in place."""
    parts = fitted(bench)
    normaliser = parts.transcoder.normaliser
    for tokens in (TOKENS, 1):
        batch = skewed_batch(bench, 0).rows(slice(0, tokens))
        for side in ("inputs", "targets"):
            raw = getattr(batch, side)
            given = raw.clone()
            x = getattr(normaliser, side)(given)
            shape = [tokens, LAYERS, D_MODEL]
            expect(list(x.shape) == shape, f"{side} to give {shape}", str(list(x.shape)), f"`{side}`")
            finite = bool(torch.isfinite(x).all())
            look = f"`fit`: a dimension that never varies among the statistics is divided by 0; or `{side}`"
            expect(finite, f"finite normalised {side}", "NaN or infinity among them", look)
            look = f"`{side}`: a change in place of `raw`, which is the source's and is read by others"
            expect(torch.equal(given, raw), f"raw {side} as they were", "others", look)
            passes = getattr(normaliser, side)(raw.clone().requires_grad_()).requires_grad
            expect(passes, f"a gradient through {side}", "none", f"`{side}`: a `detach()` or `no_grad`")
        normalised = normaliser.targets(batch.targets).clone()
        given = normalised.clone()
        restored = normaliser.restore(given)
        look = "`restore`: a change in place of what it is given"
        expect(torch.equal(given, normalised), "normalised targets as they were", "others", look)
        passes = normaliser.restore(given.requires_grad_()).requires_grad
        expect(passes, "a gradient through restore", "none", "`restore`: a `detach()` or `no_grad`")
        look = "`restore` is the inverse of `targets`, not of `inputs`"
        same(restored, batch.targets, "restore(targets(x)) to be x", look, ROUNDING)


@check("normalisation", trial=True)
def units(bench: Bench) -> None:
    """`units()` is what `restore` does, and each token is restored by itself; it is the same in train and eval mode."""
    parts = fitted(bench)
    normaliser, batch = parts.transcoder.normaliser, skewed_batch(bench, 1)
    given = normaliser.units()
    expect(isinstance(given, Affine), "units() to give an Affine", type(given).__name__, "`units`")
    x = normaliser.targets(batch.targets)
    for mode in (True, False):
        parts.transcoder.train(mode)
        same(
            normaliser.restore(x), given.restore(x), "restore(x) = units().restore(x)", "`units` or `restore`", ROUNDING
        )
    error = normaliser.restore(x) - normaliser.restore(x.flip(0))
    look = "`units().scale`: raw units per normalised unit, not the other way round; losses and metrics use it"
    same(given.raw(x - x.flip(0)), error, "units().raw(a - b) = restore(a) - restore(b)", look, ROUNDING)
    one = torch.cat([normaliser.restore(token[None]) for token in x])
    same(one, normaliser.restore(x), "restore of each token by itself", "`restore`: it mixes tokens", ROUNDING)


@check("normalisation")
def fold(bench: Bench) -> None:
    """`fold()` is what `inputs`, `targets` and `restore` do, on random activations; or it is `Refused`, before training
    as well. Skipped where it refuses."""
    parts, planned = fitted(bench), bench.parts(device="meta").transcoder.normaliser
    normaliser, batch = parts.transcoder.normaliser, skewed_batch(bench, 2)
    refused = [_refused(module) for module in (normaliser, planned)]
    look = "`fold`: exporters ask before training, on the device meta, where no number can be read"
    expect(
        bool(refused[0]) == bool(refused[1]), f"the same on the device meta: {refused[0] or 'folded'}", refused[1], look
    )
    if refused[0]:
        raise SkipTest(f"it cannot be folded: {refused[0]}")
    folding = normaliser.fold()
    expect(isinstance(folding, Folding), "fold() to give a Folding", type(folding).__name__, "`fold`")
    look = "`fold`: raw = normalised · scale + shift; a matrix multiplies from the right, and `inverse` is its inverse"
    for side in ("inputs", "targets"):
        raw, affine = getattr(batch, side), getattr(folding, side)
        expected = getattr(normaliser, side)(raw)
        same(affine.normalise(raw), expected, f"fold().{side}.normalise(x) = {side}(x)", look, ROUNDING)
        same(affine.restore(expected), raw, f"fold().{side}.restore({side}(x)) = x", look, ROUNDING)
    shapes = [affine.diagonal for affine in (folding.inputs, folding.targets)]
    meta = planned.fold()
    expect(
        [affine.diagonal for affine in (meta.inputs, meta.targets)] == shapes,
        f"a diagonal, before training as after: {shapes}",
        str([affine.diagonal for affine in (meta.inputs, meta.targets)]),
        look,
    )


@check("normalisation")
def needed(bench: Bench) -> None:
    """`needs` names all statistics that `fit` reads; fitting twice gives the same; batches are not changed."""
    parts = bench.parts(transcoder={"dtype": "float64"})
    normaliser = parts.transcoder.normaliser
    needs = tuple(normaliser.needs)
    unknown = sorted(set(needs) - set(KINDS))
    expect(
        not unknown and not isinstance(normaliser.needs, str), f"`needs`, of {KINDS}", repr(normaliser.needs), "`needs`"
    )
    fits = []
    for _ in range(2):
        batches = [skewed_batch(bench, number) for number in range(BATCHES)]
        copies = [(batch.inputs.clone(), batch.targets.clone()) for batch in batches]
        observe = normaliser.observe if isinstance(normaliser, Observes) else None
        statistics = estimate(batches, LAYERS, D_MODEL, parts.context.parallel, observe)
        for batch, before in zip(batches, copies, strict=True):
            unchanged = all(map(torch.equal, (batch.inputs, batch.targets), before))
            expect(unchanged, "batches as they were", "others", "`observe`: a change in place")
        # The variance of the targets is the engine's own need.
        kept = {name: x for name, x in statistics.items() if name.split(".")[1] in needs or name == "targets.std"}
        try:
            fit_to_statistics(parts.transcoder, kept)
        except KeyError as error:
            complain(f"`fit` to read {needs or 'nothing'}, as `needs` says", f"it reads {error}", location(error))
        fits.append({name: x.clone() for name, x in parts.transcoder.statistics().items()})
    for name, first in fits[0].items():
        look = "`fit`: what was gathered, or set, the first time is still there"
        same(fits[1][name], first, f"the same {name} when fitted again", look)


@check("normalisation", needs=("there_and_back",))
def sides(bench: Bench) -> None:
    """Inputs are normalised by statistics of inputs, targets by those of targets: where one side alone is a million
    times as large, the other's normalised activations stay of their size.

    Of their size, not the same: a sample of tokens may be drawn by the numbers of both sides. A normalisation whose
    sides share a statistic on purpose fails here: list it in `expected_failures` and say so.
    """
    batch = skewed_batch(bench, 5)
    before = _sizes(fitted(bench).transcoder.normaliser, batch)
    for changed, side in (("targets", "inputs"), ("inputs", "targets")):
        for factor in (LARGE, 1 / LARGE):
            parts = fitted(bench, targets=factor) if changed == "targets" else fitted(bench, inputs=factor)
            after = _sizes(parts.transcoder.normaliser, batch)[side]
            for layer, (new, old) in enumerate(zip(after, before[side], strict=True)):
                expect(
                    old / OF_ONE_SIZE <= new <= old * OF_ONE_SIZE,
                    f"normalised {side} of layer {layer} of the size {old:.3g}, also where {changed} alone are "
                    f"{factor:g} times as large",
                    f"{new:.3g}: they are shifted or scaled by what is known of {changed}",
                    f'`fit`: `statistics["{side}.…"]`, and what `observe` got as `batch.{side}`, for {side}',
                )


def _sizes(normaliser: Any, batch: Batch) -> dict[str, list[float]]:
    """The root mean square of each layer's normalised activations, of each side."""
    found = {}
    for side in ("inputs", "targets"):
        x = getattr(normaliser, side)(getattr(batch, side))
        # What never varies may be 0 but for rounding.
        found[side] = (x.square().mean((0, 2)).sqrt() + 1e-3).tolist()
    return found


@check("normalisation")
def data_parallel(bench: Bench) -> None:
    """The statistics of two ranks that share the tokens are those of one process that sees all of them.

    Skipped where no choice `tensor` is installed for `[parallel]`.
    """
    if CHOICE not in bench.plugins.choices("parallel"):
        raise SkipTest(f"no choice {CHOICE!r} for [parallel] is installed")
    expected = {name: x.clone() for name, x in fitted(bench).transcoder.statistics().items()}
    look = (
        "`fit`: join what the ranks observed by `context.parallel.total(x, over='tokens')`, counts too; a mean of "
        "means is right only where all have as many tokens"
    )
    for rank, result in enumerate(on_ranks(bench, DATA_RANKS, fit_on_rank)):
        for name, value in load(result).items():
            what = f"{name} on data rank {rank} of {DATA_RANKS} as in one process"
            same(value, expected[name], what, look, ROUNDING)


def fit_on_rank(bench: Bench) -> bytes:
    """The statistics of two ranks, each of which sees a part of every batch."""
    parts = bench.parts(transcoder={"dtype": "float64"}, parallel={"name": CHOICE, "tensor": 1, "data": DATA_RANKS})
    # Parts of different sizes: tokens count, not ranks.
    part = slice(0, TOKENS // 4) if parts.context.parallel.data_rank == 0 else slice(TOKENS // 4, TOKENS)
    fit_to_batches(parts.transcoder, [skewed_batch(bench, number).rows(part) for number in range(BATCHES)])
    packed = save({name: x.clone() for name, x in parts.transcoder.statistics().items()})
    close(parts)
    return packed


@check("normalisation")
def save_load(bench: Bench) -> None:
    """A saved and loaded transcoder has the same statistics, bit for bit, and gives the same outputs."""
    parts = fitted(bench, dtype="float32")
    transcoder, batch = parts.transcoder.eval(), skewed_batch(bench, 3, torch.float32)
    transcoder.save(bench.folder / "saved")
    loaded = CrossLayerTranscoder.load(bench.folder / "saved", plugins=bench.plugins, kernels="torch")
    before, after = transcoder.statistics(), loaded.statistics()
    look = "what `fit` sets: only buffers are saved, and a loaded transcoder is not fitted"
    for name, value in before.items():
        same(after[name], value, f"{name} as it was saved", look)
    for side in ("inputs", "targets"):
        raw = getattr(batch, side)
        normalised = [getattr(one.normaliser, side)(raw) for one in (loaded, transcoder)]
        same(normalised[0], normalised[1], f"the same normalised {side} after loading", look)
    with torch.no_grad():
        same(loaded(batch.inputs), transcoder(batch.inputs), "the same outputs after loading", look)


@check("normalisation")
def precision(bench: Bench) -> None:
    """With bfloat16 weights, statistics and normalised activations are in at least float32, whatever a batch is in."""
    parts = fitted(bench, dtype="bfloat16")
    look = (
        '`__init__`: `torch.promote_types(context.dtype, torch.float32)`; and `raw.to(...)` in "inputs" and "targets"'
    )
    for name, value in parts.transcoder.statistics().items():
        wide = not value.is_floating_point() or value.dtype in (torch.float32, torch.float64)
        expect(wide, f"{name} in float32 or float64", str(value.dtype), look)
    batch = skewed_batch(bench, 4, torch.bfloat16)
    for side in ("inputs", "targets"):
        x = getattr(parts.transcoder.normaliser, side)(getattr(batch, side))
        expect(x.dtype == torch.float32, f"normalised {side} in float32", str(x.dtype), look)
    restored = parts.transcoder.normaliser.restore(x)
    expect(restored.dtype == torch.float32, "restored targets in float32", str(restored.dtype), look)


@check("normalisation")
def meta(bench: Bench) -> None:
    """On the device "meta" it builds without memory, with the buffers that it has on a CPU; it says what it gathers."""
    real, planned = (bench.parts(device=device).transcoder for device in ("cpu", "meta"))
    on_cpu, on_meta = (
        {name: (tuple(x.shape), x.dtype) for name, x in one.statistics().items()} for one in (real, planned)
    )
    look = "`__init__`: make every buffer with `device=context.device`, and read no numbers there"
    expect(on_meta == on_cpu, f"the same buffers on meta: {on_cpu}", str(on_meta), look)
    allocated = [name for name, x in planned.statistics().items() if x.device.type != "meta"]
    expect(not allocated, "buffers without memory", f"{', '.join(allocated)} on the CPU", look)
    if isinstance(planned.normaliser, Observes):
        size: Any = planned.normaliser.observed_bytes()
        expect(
            type(size) is int and size >= 0,
            "observed_bytes() to give a number of bytes",
            repr(size),
            "`observed_bytes`",
        )


def _refused(normaliser: Any) -> str:
    """Why `fold` refuses; "" if it does not."""
    try:
        normaliser.fold()
    except Faults as error:
        return str(error)
    return ""

"""Checks for `[[metrics]]`: see `clt_plugins.contract.training.metric.Metric`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any
from unittest import SkipTest

import torch
from safetensors.torch import load
from torch import Tensor

from clt_plugins.model.assemble import Parts, close
from clt_plugins.model.scores import score
from clt_plugins.testing.bench import FEATURES, LAYERS, TOKENS, Bench, idle_tokens
from clt_plugins.testing.checks.empty_pairs import with_places
from clt_plugins.testing.checks.resume import OWN
from clt_plugins.testing.checks.tensor_parallel import CHOICE, built_on_rank, cut, packed, refusal, weights_by_name
from clt_plugins.testing.processes.pool import on_ranks
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import expect, same
from clt_plugins.training import learned
from clt_plugins.training.metrics import of_pass, of_step, passes, step_of
from clt_plugins.training.objective import objective
from clt_plugins.training.run import run
from clt_plugins.training.saved.checkpoint import Progress

ROUNDING = 1e-5
"""Metrics may be float32."""
LAYOUTS = {"2 tensor ranks": {"tensor": 2}, "2 data ranks": {"tensor": 1, "data": 2}}


def measured(parts: Parts, bench: Bench, *, tokens: int = TOKENS) -> dict[str, Any]:
    """What the metric reports of a step and of a held-out pass of five batches, the last one smaller."""
    parallel = parts.context.parallel
    share = tokens // parallel.data_ranks
    batch = bench.batch(torch.float64).rows(slice(parallel.data_rank * share, (parallel.data_rank + 1) * share))
    idle = idle_tokens("cpu", parallel.shard(FEATURES))
    outcome = objective(parts.transcoder, parts.losses, batch, idle, 0.5)
    outcome.total.backward()
    parallel.reduce_gradients(list(learned.parameters(parts).values()))
    counts = parallel.total(outcome.features.counts(), over="tokens")
    norm = torch.tensor(2.0, dtype=torch.float64)
    step = step_of(parts, Progress(5, 80, idle), batch, outcome, counts, norm, 1e-3)
    before = {name: (x, x._version) for name, x in _tensors(step, parts).items()}
    found = of_step(parts.metrics, step, {})
    held_out = passes(parts.metrics)
    data = [bench.batch(torch.float64, seed=seed) for seed in range(10, 15)]
    data[-1] = data[-1].rows(slice(0, 3))
    scores = score(parts.transcoder, data, held_out)
    found |= of_pass(held_out, scores)
    changed = [name for name, (x, version) in before.items() if x._version != version]
    expect(not changed, "the step as it was: nothing of it is the metric's", f"{changed} changed in place", "`step`")
    return found


def _tensors(step: Any, parts: Parts) -> dict[str, Tensor]:
    names = ("targets", "reconstruction", "variance", "counts", "idle_tokens", "total")
    tensors = {name: getattr(step, name) for name in names}
    tensors |= {"batch.inputs": step.batch.inputs, "features.values": step.features.values}
    for weight in step.weights:
        tensors[weight.name] = weight.parameter
        if weight.parameter.grad is not None:
            tensors[f"{weight.name}.grad"] = weight.parameter.grad
    return tensors


@check("metrics", trial=True, basic=True)
def numbers(bench: Bench) -> None:
    """Numbers by name, finite, of at most two dimensions; also where features are dense, and for one token."""
    look = "what `step` and `result` return"
    for path, tokens in (("sparse", TOKENS), ("dense", TOKENS), ("sparse", 1)):
        parts = bench.parts(transcoder={"dtype": "float64", "path": path})
        found = measured(parts, bench, tokens=tokens)
        for name, value in found.items():
            expect(not name.startswith(OWN), f"another group than {', '.join(OWN)}", name, look)
            if isinstance(value, Tensor):
                shapes = [[LAYERS], [LAYERS, FEATURES]]
                got = str(list(value.shape))
                expect(list(value.shape) in shapes, f"{name!r} as a number, [L] or [L, F]: {shapes}", got, look)
            finite = bool(torch.isfinite(value).all()) if isinstance(value, Tensor) else math.isfinite(value)
            what = f"a finite {name!r} for {tokens} tokens on the {path} path"
            expect(finite, what, str(value), "divisions by what can be 0: a count, a variance, a norm")
            json.dumps(value.tolist() if isinstance(value, Tensor) else value)


@check("metrics", needs=("numbers",))
def forms(bench: Bench) -> None:
    """It reports the same of features in each form: dense, sparse, and sparse with empty pairs, as on a GPU."""
    dense = measured(with_places(bench, path="dense"), bench)
    look = (
        "`features.values` is [B, L, F], or [N] of the pairs alone, some of which may be empty: neither its mean nor "
        "its length means anything; add it up, and count by `features.counts()`, `l0()` and `active()`"
    )
    for what, fixed in (("sparse features", False), ("sparse features with empty pairs", True)):
        found = measured(with_places(bench, path="sparse", fixed=fixed), bench)
        names = f"the names of dense features, of {what} too: {sorted(dense)}"
        expect(found.keys() == dense.keys(), names, str(sorted(found)), look)
        for name, value in dense.items():
            number, got = (torch.as_tensor(x, dtype=torch.float64) for x in (value, found[name]))
            same(got, number, f"{name!r} of {what} as of dense ones", look, ROUNDING)


@check("metrics")
def no_change(bench: Bench) -> None:
    """A run ends with the same bits with the metric and without."""
    train = {"steps": 4, "log_every": 1, "eval_every": 2, "eval_tokens": 2 * TOKENS, "checkpoint_every": 4}
    changes: dict[str, Any] = {"train": {**train, "lr": 0.01, "statistics_tokens": 2 * TOKENS}}
    trained: list[dict[str, Tensor]] = []
    chosen: list[Any] = bench.recipe_data()["metrics"]
    for metrics in (chosen, []):
        recipe = bench.recipe(**changes, metrics=metrics)
        with torch.random.fork_rng():
            transcoder = run(recipe, out=bench.folder / f"run{len(trained)}", plugins=bench.plugins)
        trained.append({name: x.clone() for name, x in transcoder.tensors().items()})
    for name, value in trained[1].items():
        look = "`step`, `add`, `result`: changes in place, torch's own generator, train or eval mode"
        same(trained[0][name], value, f"{name} as in a run without the metric", look)


@check("metrics")
def ranks(bench: Bench) -> None:
    """On two tensor ranks and on two data ranks it reports what one process reports, on both ranks.

    It may refuse one of the two when it is built. Skipped where it refuses both, or no choice `tensor` is installed for
    `[parallel]`.
    """
    if CHOICE not in bench.plugins.choices("parallel"):
        raise SkipTest(f"no choice {CHOICE!r} for [parallel] is installed")
    refusals: list[str] = []
    changes: dict[str, Any] = {"transcoder": {"dtype": "float64", "path": "sparse"}}
    parts = bench.parts(**changes)
    weights = packed(weights_by_name(parts))
    expected = measured(parts, bench)
    for layout, split in LAYOUTS.items():
        changes["parallel"] = {"name": CHOICE, **split}
        results = on_ranks(bench, 2, measured_on_rank, changes, weights)
        if reason := refusal(results):
            refusals.append(reason)
            continue
        for rank, found in enumerate(results):
            look = (
                '`step` and `result`: sums over tokens need `parallel.total(x, over="tokens")`, sums over features '
                "`parallel.total(x)`; data ranks have seen other held-out batches, perhaps fewer"
            )
            what = f"on rank {rank} of {layout} the names of one process"
            expect(found.keys() == expected.keys(), f"{what}: {sorted(expected)}", str(sorted(found)), look)
            for name, value in expected.items():
                number = torch.as_tensor(value, dtype=torch.float64)
                got = torch.as_tensor(found[name], dtype=torch.float64)
                same(got, number, f"{name!r} on rank {rank} of {layout} as in one process", look, ROUNDING)
    if len(refusals) == len(LAYOUTS):
        raise SkipTest(f"it refuses several ranks: {refusals[0]}")


def measured_on_rank(bench: Bench, changes: dict[str, Any], weights: bytes) -> Mapping[str, Any] | str:
    """What the metric reports on one rank, with the parent's weights; why it refuses to be built."""
    parts = built_on_rank(bench, changes, stirred=False)
    if isinstance(parts, str):
        return parts
    axes, local = parts.transcoder.feature_axes(), weights_by_name(parts)
    for name, value in load(weights).items():
        local[name].copy_(cut(value, axes[name], parts.context.parallel.shard(FEATURES)))
    found = measured(parts, bench)
    close(parts)
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in found.items()}

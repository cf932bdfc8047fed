"""Whether results on this GPU are right: the kernels by their definition, a step beside the CPU's, two runs alike,
and no wait of the host in a step.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from clt_plugins import Layout
from clt_plugins.model.devices import make_kernels
from clt_plugins.registry.plugins import Plugins
from clt_plugins.testing.sparse_products import LAYOUTS, TOLERANCES, Problem, assert_conforms, random_mask
from tests.benchmarks.gpu.steps import Step, small_tables

RECIPES: dict[str, dict[str, Any]] = {
    "batchtopk, AuxK": {"activation": {"name": "batchtopk", "k": 24}, "losses": [{"name": "mse"}, {"name": "auxk"}]},
    "topk per layer, by norm": {"activation": {"name": "topk", "k": 4, "scope": "layer", "ranking": "norm"}},
    "a k of each layer, depth": {
        "activation": {"name": "batchtopk", "k": [9, 3, 8, 4]},
        "losses": [{"name": "mse"}, {"name": "depth"}],
    },
    "batchtopk, zscore": {"activation": {"name": "batchtopk", "k": 24, "ranking": "zscore"}},
    "relu, tanh": {"activation": {"name": "relu"}, "losses": [{"name": "mse"}, {"name": "tanh_sparsity"}]},
    "jumprelu, sparse": {"activation": {"name": "jumprelu"}, "transcoder": {"path": "sparse"}},
    "bf16 weights": {"transcoder": {"dtype": "bfloat16"}, "train": {"clip_norm": 1.0}},
}
"""Seven recipes whose steps differ."""

STEP_TOLERANCE = 1e-4
"""A step on a GPU beside a CPU's, in float32: the largest difference of the loss and of each gradient, as a share of
its largest number. Sums have another order; a few pairs of equal rank within that error may change places."""


def kernels(device: torch.device, plugins: Plugins, name: str) -> dict[str, Any]:
    """The kernels' three products against loops in float64, for every layout and type; and the selection."""
    chosen = make_kernels(name, device, plugins)
    done, failed = 0, []
    for tokens, layers, features, d_model, share in ((9, 4, 7, 13, 0.3), (40, 3, 40, 200, 0.2), (300, 2, 8, 768, 0.5)):
        mask = random_mask(tokens, layers, features, share)
        for layout_name, layout in LAYOUTS.items():
            for dtype, tolerances in TOLERANCES.items():
                for per_target in (False, True):
                    problem = Problem.random(layout(layers, features), mask, d_model, dtype, per_target=per_target)
                    try:
                        assert_conforms(chosen, on(problem, device), *tolerances)
                        done += 1
                    except AssertionError as error:
                        failed.append(f"{layout_name} {dtype} per_target={per_target}: {error}"[:300])
    return {"passed": done, "failed": failed}


def on(value: Any, device: torch.device) -> Any:
    """The same with all tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if attrs.has(type(value)) and not isinstance(value, Layout):
        fields = {field.name: on(getattr(value, field.name), device) for field in attrs.fields(type(value))}
        return type(value)(**fields)
    return value


def selection(device: torch.device, plugins: Plugins, name: str, *, small: bool = False) -> dict[str, Any]:
    """Top-k over layers against a stable sort in float64, with many equal ranks, NaN and -inf."""
    from clt_plugins import Top

    chosen = make_kernels(name, device, plugins)
    layers, tokens, features, k = (3, 16, 64, 8) if small else (6, 512, 4096, 96)
    failed = []
    for per in ("batch", "token"):
        for kind in ("normal", "ties", "odd"):
            numbers = torch.Generator().manual_seed(5)
            pre = torch.randn(layers, tokens, features, generator=numbers)
            if kind == "ties":
                pre = (pre * 4).round() / 4
            if kind == "odd":
                pre[torch.rand(pre.shape, generator=numbers) < 0.3] = -torch.inf
                pre[0, 0, :3] = torch.nan
            top = Top(k, tokens, layers, features, per=per, kernels=chosen)  # type: ignore[arg-type]
            for layer in range(layers):
                top.see(layer, pre[layer].to(device).clone())
            pairs, _ = top.finish()
            count = int(pairs.count) if pairs.count is not None else len(pairs.token)
            found = (pairs.token * (layers * features) + pairs.feature)[:count].sort().values.cpu()
            if not torch.equal(found, by_sorting(pre, k, per)):
                failed.append(f"per {per}, {kind}: {count} pairs, not those of a stable sort")
    return {"passed": 6 - len(failed), "failed": failed}


def by_sorting(pre: Tensor, k: int, per: str) -> Tensor:
    """The numbers token · L · F + feature of the best, by a stable sort in float64; of equal ones the lower id.

    Args:
        pre: [L, B, F].
    """
    layers, tokens, features = pre.shape
    clean = pre.double().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    number = torch.arange(tokens)[:, None] * layers * features + torch.arange(layers * features)
    if per == "batch":  # in the order of ids: layer, token, feature
        ids = number.view(tokens, layers, features).transpose(0, 1).reshape(1, -1)
        scores, k = clean.reshape(1, -1), k * tokens
    else:
        ids, scores = number, clean.transpose(0, 1).reshape(tokens, -1)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = scores.gather(1, order) > -torch.inf
    return ids.expand_as(scores).gather(1, order)[kept].sort().values


def steps(device: torch.device, plugins: Plugins) -> dict[str, Any]:
    """A step of each recipe beside the CPU's in float32; two runs of ten steps bit for bit; waits of the host."""
    out: dict[str, Any] = {}
    for name, changes in RECIPES.items():
        tables = small_tables(changes)
        exact = copy.deepcopy(tables)
        exact["transcoder"].pop("dtype", None)
        here, there = (Step(exact, plugins, where) for where in (device, torch.device("cpu")))
        worst = max(_difference(a, b) for a, b in zip(here.gradients(), there.gradients(), strict=True))
        runs = []
        for _ in range(2):
            run = Step(tables, plugins, device)
            run.take(2)
            with no_waiting(device) as waits:
                run.take(8)
            runs.append([p.detach().clone() for p in run.parts.transcoder.parameters()])
        out[name] = {
            "worst_difference_from_cpu": worst,
            "as_the_cpu": worst <= STEP_TOLERANCE,
            "two_runs_equal": all(torch.equal(a, b) for a, b in zip(*runs, strict=True)),
            "waits": waits,
        }
    return out


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


@contextmanager
def no_waiting(device: torch.device) -> Iterator[list[str]]:
    """Collects what makes the host wait for the GPU, by CUDA's own check; an empty list on a CPU."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += sorted({f"{w.filename}:{w.lineno}: {w.message}"[:300] for w in caught if "synchroniz" in str(w.message)})

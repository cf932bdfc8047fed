"""Where a step's time goes at three shapes, and its memory: by CUDA events around each piece, beside the predictions.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import attrs
import torch

from clt_plugins.registry.plugins import Plugins
from clt_plugins.training.plan.build import estimate
from tests.benchmarks.gpu.steps import Step, small_tables
from tests.benchmarks.gpu.timing import Clock

SEEN = 3
"""Steps whose pieces are measured, after as many that warm up."""


@attrs.frozen
class Shape:
    """A training step to measure."""

    tables: dict[str, Any]
    sizes: tuple[int, int]
    """L and D."""
    done: float = 0.9
    """The share of the steps that went before."""


def shapes() -> dict[str, Shape]:
    """Quickstart, GPT-2 at its largest and smallest k, and one rank's shard of eight at Llama 3.2 1B's width."""
    both = [{"name": "mse"}, {"name": "auxk"}]
    quickstart = {
        "transcoder": {"features": 1024},
        "activation": {"name": "batchtopk", "k": 96},
        "losses": both,
        "train": {"steps": 600, "batch_tokens": 1024, "dead_after_tokens": 10**9},
    }
    gpt2 = {
        "transcoder": {"features": 24_576, "dtype": "bfloat16"},
        "activation": {"name": "batchtopk", "k": 200},
        "losses": both,
        "train": {"steps": 24_000, "batch_tokens": 4096, "lr": 4e-4, "clip_norm": 1.0, "dead_after_tokens": 10**9},
    }
    shard = {
        "transcoder": {"features": 4096, "dtype": "bfloat16"},
        "activation": {"name": "batchtopk", "k": 32, "anneal_from": 1},
        "losses": both,
        "train": {"steps": 10_000, "batch_tokens": 8192, "lr": 1e-4, "clip_norm": 1.0, "dead_after_tokens": 10**9},
    }
    return {
        "S": Shape(small_tables(quickstart), (6, 128)),
        "G k 600": Shape(small_tables(gpt2), (12, 768), done=0.0),
        "G k 200": Shape(small_tables(gpt2), (12, 768)),
        "M/8": Shape(small_tables(shard), (16, 2048)),
    }


def tiny() -> dict[str, Shape]:
    """One shape for a CPU, to try the benchmark itself."""
    return {"tiny": Shape(small_tables({}), (4, 64))}


def measure(shape: Shape, plugins: Plugins, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a step and of its pieces (medians), tokens per second, and bytes at the peak beside `plan`'s."""
    rows_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    step = Step(shape.tables, plugins, device, sizes=shape.sizes, rows_dtype=rows_dtype, done=shape.done)
    step.take(SEEN)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = Clock(device)
    clock.mark()
    step.take(SEEN, clock.mark)
    whole = statistics.median(clock.between())
    tokens = step.recipe.train.batch_tokens
    out: dict[str, Any] = {"step_ms": whole, "tokens_per_s": 1e3 * tokens / whole, "pieces_ms": _pieces(step, device)}
    out["pieces_ms"]["the rest"] = whole - sum(out["pieces_ms"].values())
    planned = estimate(step.parts, step.recipe).total_bytes
    out["planned_bytes"] = planned
    if device.type == "cuda":
        source = sum(rows.nbytes for rows in step.parts.source.rows)  # type: ignore[attr-defined]
        out["peak_bytes"] = torch.cuda.max_memory_allocated(device) - source
        out["peak_over_plan"] = out["peak_bytes"] / planned
    return out


def _pieces(step: Step, device: torch.device) -> dict[str, float]:
    spans: dict[str, list[Clock]] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            clock = Clock(device)
            clock.mark()
            result = function(*args, **kwargs)
            clock.mark()
            spans.setdefault(name, []).append(clock)
            return result

        return call

    with _around(step, timed):
        step.take(SEEN)
    return {name: sum(clock.between()[0] for clock in clocks) / SEEN for name, clocks in spans.items()}


@contextmanager
def _around(step: Step, timed: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Put timers around selection, the encoder's products, the sparse products, the clip and the update."""
    from clt_plugins.model import encoder, selection
    from clt_plugins.training import loop

    kernels = step.parts.context.kernels
    patches: list[Any] = [
        mock.patch.object(encoder, "affine", timed("encoder product", encoder.affine)),
        mock.patch.object(selection.Top, "see", timed("selection", selection.Top.see)),
        mock.patch.object(selection.Top, "finish", timed("selection", selection.Top.finish)),
        mock.patch.object(loop, "gradient_norm", timed("norm and clip", loop.gradient_norm)),
        mock.patch.object(step.optimizer, "step", timed("optimizer", step.optimizer.step)),
    ]
    for name in ("decode", "grad_values", "grad_rows", "gradients"):
        if hasattr(kernels, name):
            patches.append(mock.patch.object(kernels, name, timed(name, getattr(kernels, name))))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()

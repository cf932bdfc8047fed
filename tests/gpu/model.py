"""Milliseconds of a training step on an H100, from counted bytes and launches: `python -m tests.gpu.model`.

    python -m tests.gpu.model             a table for each shape
    python -m tests.gpu.model "G k 200"   for one
    python -m tests.gpu.model --write     set the budgets to what is counted now

A model, not a measurement; see `ceilings` and `README.md`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import attrs

from clt_plugins.registry.plugins import Plugins, load_plugins
from tests.gpu import ceilings
from tests.gpu.kernels import Work, work_of
from tests.gpu.load import Load
from tests.gpu.shapes import Counted, counted, shapes
from tests.gpu.traffic import Traffic

BUDGETS = Path(__file__).with_name("budgets.json")


@attrs.define
class Piece:
    """A part of a step."""

    bytes: float = 0
    """Of the GPU's memory, read and written."""
    launches: int = 0
    seconds: float = 0
    unknown: set[str] = attrs.field(factory=set)
    """Triton kernels without a model: taken to touch each of their tensors once."""


def seconds(name: str, moved: Traffic, dtype: str) -> float:
    """How long an operation of torch takes on the device."""
    share = ceilings.SORT_SHARE if "sort" in name else ceilings.COPY_SHARE
    memory = moved.bytes / (ceilings.COPY * share)
    products = moved.flops / (ceilings.BF16 if dtype == "torch.bfloat16" else ceilings.FP32)
    if name.startswith("c10d."):
        memory = moved.written / (2 * ceilings.SUMMED if "allreduce" in name else ceilings.SHARED)
    if name.startswith("aten.topk"):
        memory = moved.read * ceilings.TOPK
    return max(memory, products, moved.launches * ceilings.LAUNCH)


def kernel_seconds(work: Work) -> float:
    """How long a Triton kernel takes: as long as what it needs most of."""
    return max(
        work.bytes / (ceilings.COPY * ceilings.COPY_SHARE),
        work.cached / ceilings.L2,
        work.instructions / (ceilings.ISSUE * ceilings.ISSUE_SHARE),
        ceilings.LAUNCH,
    )


def pieces(step: Counted) -> dict[str, Piece]:
    """The parts of a counted step, the longest first."""
    out: dict[str, Piece] = {}
    for name, part in step.count.parts.items():
        piece = out.setdefault(name, Piece())
        piece.bytes += part.bytes
        piece.launches += part.launches
        for operation, _, moved, dtype in part.operations:
            piece.seconds += seconds(operation, moved, dtype)
    load = attrs.evolve(Load.of(step.tokens, step.n_layers, step.n_features, step.pairs), empty=step.empty)
    for launch in step.count.launched:
        work, known = work_of(launch, load)
        name = launch.part if launch.part != "sparse products" else f"sparse products: {launch.kernel}"
        piece = out.setdefault(name, Piece())
        piece.bytes += work.bytes
        piece.launches += 1
        piece.seconds += kernel_seconds(work)
        if not known:
            piece.unknown.add(launch.kernel)
    return dict(sorted(out.items(), key=lambda pair: -pair[1].seconds))


def table(name: str, step: Counted) -> str:
    """The parts of a step for people."""
    found = pieces(step)
    lines = [f"{name}: peak {step.peak / 1e9:.1f} GB", f"  {'piece':40} {'GB':>8} {'launches':>9} {'ms':>8}"]
    for piece, one in found.items():
        note = f"  (not modelled: {', '.join(sorted(one.unknown))})" if one.unknown else ""
        lines.append(f"  {piece:40} {one.bytes / 1e9:8.2f} {one.launches:9} {one.seconds * 1e3:8.2f}{note}")
    total = [sum(getattr(one, key) for one in found.values()) for key in ("bytes", "launches", "seconds")]
    lines.append(f"  {'sum':40} {total[0] / 1e9:8.2f} {total[1]:9} {total[2] * 1e3:8.2f}")
    lines.append(f"  {'the host, if it starts each operation':67} {total[1] * ceilings.HOST * 1e3:8.2f}")
    return "\n".join(lines)


def as_budget(step: Counted) -> dict[str, object]:
    """What `budgets.json` holds of a step."""
    moved, launches = step.bytes(), step.launches()
    parts = {part: {"bytes": moved.get(part, 0), "launches": launches[part]} for part in sorted(launches)}
    total = sum(piece.seconds for piece in pieces(step).values())
    return {"peak": step.peak, "milliseconds": round(1e3 * total, 2), "parts": parts}


def main(arguments: list[str], plugins: Plugins) -> None:
    chosen = [one for one in arguments if not one.startswith("--")] or list(shapes())
    steps = {name: counted(shapes()[name], plugins) for name in chosen}
    print("\n\n".join(table(name, step) for name, step in steps.items()))
    if "--write" in arguments:
        budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
        budgets |= {name: as_budget(step) for name, step in steps.items()}
        BUDGETS.write_text(json.dumps(budgets, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:], load_plugins())

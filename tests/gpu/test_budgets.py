"""What a step moves, launches and holds at its peak stays within the budgets."""

from __future__ import annotations

import json
from functools import lru_cache

import attrs
import pytest

from clt_plugins.contract.reading.source import Outline
from clt_plugins.registry.plugins import load_plugins
from clt_plugins.training.plan.build import estimate
from clt_plugins.training.plan.machines import gpu_rates
from tests.gpu.model import BUDGETS
from tests.gpu.shapes import Counted, counted, shapes

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

ROOM = 1.02
"""Versions of torch differ a little in what they allocate."""

step_at = lru_cache(maxsize=8)(lambda name: counted(shapes()[name], load_plugins()))


def _step(name: str) -> Counted:
    return step_at(name)


@pytest.mark.parametrize("name", shapes())
def test_no_part_of_a_step_grows(name):
    """Where it should: `python -m tests.gpu.model --write`, and say why in the commit."""
    budget, step = json.loads(BUDGETS.read_text())[name], _step(name)
    moved, launches = step.bytes(), step.launches()
    grown = []
    for part, count in launches.items():
        allowed = budget["parts"].get(part, {"bytes": 0, "launches": 0})
        if moved.get(part, 0) > allowed["bytes"] * ROOM:
            grown.append(f"{part} moves {moved[part] / 1e9:.2f} GB, allowed are {allowed['bytes'] / 1e9:.2f}")
        if count > allowed["launches"]:
            grown.append(f"{part} makes {count} launches, allowed are {allowed['launches']}")
    if step.peak > budget["peak"] * ROOM:
        peak = f"the peak is {step.peak / 1e9:.2f} GB, allowed are {budget['peak'] / 1e9:.2f}"
        grown.append(f"{peak}: {step.count.peak_place}")
    assert not grown, "\n".join(grown)


@pytest.mark.parametrize("name", [name for name in shapes() if name != "G k 200"])
def test_a_plan_is_within_a_tenth_of_the_peak(name):
    # A plan has room for the first steps, in which k is largest, and for dead features.
    first = attrs.evolve(shapes()[name], done=0.0)
    step, sizes = counted(first, load_plugins(), all_dead=True), first.sizes
    outline = Outline(
        n_layers=sizes.n_layers,
        d_model=sizes.d_model,
        row_bytes=2 * sizes.n_layers * sizes.d_model * sizes.dtype.itemsize,
    )
    planned = estimate(step.parts, step.recipe, outline, gpu_rates("h100"))
    total = planned.total_bytes - planned.bytes.libraries
    assert step.peak / 1.1 < total < step.peak * 1.1, (planned.bytes, step.peak, step.count.peak_place)

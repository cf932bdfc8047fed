"""The recipes in `examples/`: all validate, and their transcoders build on the meta device at full size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from clt_plugins.contract.context import Context
from clt_plugins.contract.recipe import Recipe
from clt_plugins.model.assemble import Parts, build_transcoder
from clt_plugins.model.devices import make_kernels, make_parallel
from clt_plugins.recipe.read import read_recipe, read_sweep
from clt_plugins.registry.build import build
from clt_plugins.training.plan.build import estimate, plan
from tests.support.helpers import parts, plugins

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = {
    **dict.fromkeys(("quickstart", "jumprelu", "generate", "local", "remote"), (6, 128)),
    "gpt2": (12, 768),
    "pythia-70m-tied": (6, 512),
    "llama-3.2-1b": (16, 2048),
    "full": (6, 128),
    "sweep": (6, 128),
    "planted": (3, 64),
}


def recipes(name: str) -> list[Recipe]:
    """A recipe, or those of a sweep."""
    swept = read_sweep(EXAMPLES / f"{name}.toml", plugins=plugins())
    if swept is not None:
        return [member.recipe for member in swept.members]
    return [read_recipe(EXAMPLES / f"{name}.toml", plugins=plugins())]


def test_every_recipe_is_known_here():
    assert {path.stem for path in EXAMPLES.glob("*.toml")} == SIZES.keys()


@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_builds_at_full_size_without_memory(name):
    recipe = recipes(name)[-1]
    layers, d_model = SIZES[name]
    context = Context(
        recipe=recipe,
        seed=recipe.seed,
        device=torch.device("meta"),
        dtype=getattr(torch, recipe.transcoder.dtype),
        batch_tokens=recipe.train.batch_tokens,
        steps=recipe.train.steps,
        kernels=make_kernels("torch", torch.device("cpu"), plugins()),
        parallel=make_parallel("single", plugins()),
        n_layers=layers,
        d_model=d_model,
        n_features=recipe.transcoder.features,
    )
    transcoder = build_transcoder(context)
    assert all(p.is_meta for p in transcoder.parameters())
    losses = [build(loss, context) for loss in recipe.losses]
    planned = estimate(Parts(context, parts().source, transcoder, losses), recipe)
    encoder = layers * recipe.transcoder.features * (d_model + 1)
    targets = layers * (layers + 1) // 2 if recipe.tying.name == "untied" else layers
    assert planned.parameters >= encoder + targets * recipe.transcoder.features * d_model
    assert planned.total_bytes > 4 * transcoder.W_enc.numel() * transcoder.W_enc.element_size()


def test_the_shipped_model_is_small():
    files = [path for path in (EXAMPLES / "models/stdlib-gpt2").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000


def test_a_plan_predicts_the_largest_parts_exactly():
    built = parts()
    planned = estimate(built, built.context.recipe)
    assert planned.parameters == sum(p.numel() for p in built.transcoder.parameters())
    assert planned.bytes.parameters == 4 * planned.parameters == planned.bytes.optimizer / 2
    assert planned.flops.encoder == 2 * 16 * 3 * 6 * 10


@pytest.mark.parametrize("name", ["gpt2", "llama-3.2-1b", "pythia-70m-tied"])
def test_sizes_in_the_header_of_a_recipe_hold(name):
    """`# For a GPU with 48 GB: by `plan` it needs 30`."""
    header = (EXAMPLES / f"{name}.toml").read_text().split("name =")[0]
    (size, needed), *others = re.findall(r"GPUs? with (\d+) GB: by `plan` it needs (\d+)", header)
    assert not others
    layers, d_model = SIZES[name]
    recipe = read_recipe(EXAMPLES / f"{name}.toml", plugins=plugins())
    needs = plan(recipe, plugins(), n_layers=layers, d_model=d_model, gpu="h100")
    assert needs.total_bytes / 1e9 == pytest.approx(int(needed), abs=0.6) and needs.total_bytes < int(size) * 0.97e9

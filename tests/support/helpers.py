"""Small runs for tests: recipes as dictionaries, built exactly like a user's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from clt_plugins.contract.recipe import Recipe
from clt_plugins.data.batch import Batch
from clt_plugins.model.assemble import Parts, assemble
from clt_plugins.recipe.read import read_recipe
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry.plugins import Plugins, load_plugins

SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 0,
    "source": {"name": "synthetic", "layers": 3, "d_model": 6, "features": 24, "active": 2.0},
    "transcoder": {"features": 10, "device": "cpu"},
    "activation": {"name": "batchtopk", "k": 5},
    "tying": {"name": "untied"},
    "losses": [{"name": "mse"}],
    "loggers": [{"name": "jsonl"}],
    "train": {
        "steps": 12,
        "batch_tokens": 16,
        "statistics_tokens": 64,
        "lr": 1e-2,
        "log_every": 4,
        "eval_every": 6,
        "eval_tokens": 64,
        "checkpoint_every": 4,
        "keep_checkpoints": 10,
        "dead_after_tokens": 64,
    },
}
"""A run of less than a second."""

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "relu": {"name": "relu"},
    "jumprelu": {"name": "jumprelu", "threshold": 0.2, "bandwidth": 0.3},
    "topk": {"name": "topk", "k": 4},
    "topk-layer-norm": {"name": "topk", "k": 2, "scope": "layer", "ranking": "norm"},
    "topk-share": {"name": "topk", "k": 0.11},
    "batchtopk": {"name": "batchtopk", "k": 5},
    "batchtopk-norm": {"name": "batchtopk", "k": 5, "ranking": "norm"},
    "batchtopk-layer-zscore": {"name": "batchtopk", "k": 2, "scope": "layer", "ranking": "zscore"},
    "batchtopk-of-each-layer": {"name": "batchtopk", "k": [1, 3, 2]},
}
TYINGS: dict[str, dict[str, Any]] = {
    "untied": {"name": "untied"},
    "untied-skip": {"name": "untied", "skip": True},
    "per_source": {"name": "per_source"},
    "per_source-affine": {"name": "per_source", "feature_offset": True, "feature_scale": True, "skip": True},
    "per_target": {"name": "per_target"},
    "per_layer": {"name": "per_layer"},
    "per_target-affine": {"name": "per_target", "feature_offset": True, "feature_scale": True},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "plain": {"name": "plain"},
    "pre_bias": {"name": "plain", "pre_bias": True},
    "tied": {"name": "tied"},
    "tied-scaled": {"name": "tied", "normalise": True, "scale": True},
    "low_rank": {"name": "low_rank", "rank": 2},
}
ALL_LOSSES: list[dict[str, Any]] = [
    {"name": "mse"},
    {"name": "tanh_sparsity", "weight": 0.1, "weight_schedule": {"name": "constant", "warmup_steps": 0}},
    {"name": "auxk", "weight": 0.5, "k": 3},
]


@cache
def plugins() -> Plugins:
    return load_plugins(strict=True)


def tables(**changes: Any) -> dict[str, Any]:
    """SMALL with some tables changed: mappings are merged into a table, anything else replaces it.

    `convert` and `evaluate` (settings) and `exports` (formats, or settings of the stage) are stages, in this order.
    """
    out = copy.deepcopy(SMALL)
    stages = [{"name": name, **changes.pop(name)} for name in ("convert", "evaluate") if name in changes]
    stages += [
        {"name": "export", **(one if "format" in one else {"format": one})} for one in changes.pop("exports", [])
    ]
    if stages:
        out["stages"] = stages
    for name, value in changes.items():
        # A choice under another name has other settings: it replaces the table.
        if isinstance(value, Mapping) and "name" not in value and name in out:
            out[name].update(value)
        else:
            out[name] = value
    return out


def recipe(**changes: Any) -> Recipe:
    return read_recipe(tables(**changes), plugins=plugins())


def convert_config(**settings: Any) -> Any:
    """Settings of the stage `convert`."""
    return structure_choice(plugins(), "stages", {"name": "convert", **settings}).config


def parts(**changes: Any) -> Parts:
    return assemble(recipe(**changes))


def stir(module: torch.nn.Module, seed: int = 3, scale: float = 0.2) -> None:
    """Give every parameter some noise, so that none is at a special value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype) * scale)


def random_batch(tokens: int, layers: int, d_model: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(tokens, layers, d_model, generator=generator, dtype=torch.float64).to(dtype)

    return Batch(draw(), draw())


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A file's tensors, in memory of their own, so that the file can be written anew.

    `load_file` maps the file, and older releases of safetensors write a file in place.
    """
    return load(path.read_bytes())

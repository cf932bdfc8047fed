"""The recipes of the ablation: what each changes of the defaults with BatchTopK, and where it comes from.

A table with a `name` replaces the base's; another one is merged into it (`merged`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import attrs

from tests.benchmarks.quality import tables
from tests.benchmarks.quality.lot import Lot, result
from tests.benchmarks.quality.one import Job
from tests.benchmarks.quality.setups import Setup

BASE = "batchtopk"
"""The recipe that all others are compared with."""


@attrs.frozen
class Recipe:
    """A row of a table."""

    source: str
    """Where it comes from, in a line."""
    changes: Callable[[Setup], dict[str, Any]] = lambda setup: {}
    times: float = 1
    """How many times the setup's tokens it is trained on."""

    def tables(self, setup: Setup, seed: int) -> dict[str, Any]:
        """The whole recipe, but for the path of stored activations."""
        base = {**setup.tables(), "source": {"name": "local"}, "seed": seed}
        del base["train"]["steps"]
        recipe = merged(base, self.changes(setup))
        train = recipe["train"]
        train.setdefault("steps", round(setup.tokens * self.times) // train["batch_tokens"])
        train |= {"log_every": max(1, train["steps"] // 20), "checkpoint_every": 10**9}
        return recipe | {"train": {**train, "eval_every": 10**9, "eval_tokens": 1024}}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe's tables with changes."""
    out = copy.deepcopy(base)
    for key, value in changes.items():
        if isinstance(value, dict) and "name" not in value and isinstance(out.get(key), dict):
            out[key] = merged(out[key], value)
        else:
            out[key] = value
    return out


def _with(**tables: Any) -> Callable[[Setup], dict[str, Any]]:
    """Changes that are the same for all setups."""
    return lambda setup: tables


def _k(name: str, **more: Any) -> Callable[[Setup], dict[str, Any]]:
    """Another activation with the setup's k."""
    return lambda setup: {"activation": {"name": name, "k": setup.k, **more}}


def _losses(*losses: dict[str, Any]) -> Callable[[Setup], dict[str, Any]]:
    """The default losses, and others."""
    return _with(losses=[{"name": "mse"}, {"name": "auxk"}, *losses])


def _fitted(*callbacks: str) -> Callable[[Setup], dict[str, Any]]:
    """A decoder fitted to the tokens of training, besides other callbacks."""
    return lambda setup: {"callbacks": [*callbacks, {"name": "fit_decoder", "tokens": setup.tokens}]}


def _per_layer(setup: Setup) -> int:
    """k of each layer: the setup's, shared out evenly and rounded."""
    return round(setup.k / setup.n_layers)


def _steered(activation: str, *losses: str | dict[str, Any]) -> Callable[[Setup], dict[str, Any]]:
    """An activation with thresholds whose L0 is steered to the setup's k by the weight of a penalty."""
    return lambda setup: {
        "activation": {"name": activation, "target_l0": setup.k},
        "losses": ["mse", "auxk", *losses],
    }


def _ramp(setup: Setup) -> dict[str, Any]:
    """k for each layer, from half to one and a half times the mean: later layers get more."""
    mean, last = setup.k / setup.n_layers, setup.n_layers - 1
    counts = [round(mean * (0.5 + layer / last)) for layer in range(last)]
    return {"activation": {"name": "batchtopk", "k": [*counts, setup.k - sum(counts)]}}


def _from_model(*losses: dict[str, Any]) -> Callable[[Setup], dict[str, Any]]:
    """The same tokens, read from the model: for losses that run it."""
    return lambda setup: {
        **setup.stream(),
        "data_seed": 0,  # that of the stored activations
        "losses": [{"name": "mse"}, {"name": "auxk"}, *losses],
    }


def _equal_parameters(setup: Setup) -> dict[str, Any]:
    """Per-layer transcoders with as many rows of d_model numbers as the setup's cross-layer one."""
    layers = setup.n_layers
    rows = layers + layers * (layers + 1) // 2
    return {"tying": {"name": "per_layer"}, "transcoder": {"features": setup.features * rows // (2 * layers)}}


def _quadratic(setup: Setup) -> dict[str, Any]:
    penalty = {"name": "l0", "target": setup.k, "weight": 30.0, "frequency_weight": 1e-3, "weight_schedule": "ramp"}
    return {"activation": {"name": "jumprelu"}, "losses": ["mse", "auxk", penalty]}


RECIPES: dict[str, Recipe] = {
    BASE: Recipe("the defaults: Bussmann et al. 2024, arXiv 2412.06410"),
    # -- which features are active --
    "topk": Recipe("Gao et al. 2024, arXiv 2406.04093", _k("topk")),
    "batchtopk, k per layer": Recipe(
        "the same k in every layer",
        lambda setup: {"activation": {"name": "batchtopk", "k": _per_layer(setup), "scope": "layer"}},
    ),
    "batchtopk, ranked by decoder norm": Recipe("scores as Ameisen et al. 2025", _k("batchtopk", ranking="norm")),
    "groupmax": Recipe(
        "EleutherAI's sparsify",
        lambda setup: {"activation": {"name": "groupmax", "k": _per_layer(setup) * setup.n_layers}},
    ),
    "jumprelu, quadratic l0, frequency": Recipe("Gemma Scope 2", _quadratic),
    "jumprelu, l0 steered": Recipe("arXiv 2407.14435, with target_l0", _steered("jumprelu", "l0")),
    "jumprelu, tanh steered": Recipe(
        "Ameisen et al. 2025, with target_l0", _steered("jumprelu", {"name": "tanh_sparsity", "c": 4.0})
    ),
    "relu, tanh steered": Recipe("the same without thresholds", _steered("relu", "tanh_sparsity")),
    "batchtopk, more for later layers": Recipe("k from half to 1.5 times the mean", _ramp),
    # -- what is learned besides --
    "matryoshka": Recipe("Bussmann et al. 2025, arXiv 2503.17547", _losses({"name": "matryoshka"})),
    "hierarchical": Recipe("arXiv 2505.24473", _losses({"name": "hierarchical"})),
    "depth": Recipe("what features write to later layers costs", _losses({"name": "depth"})),
    "read from the model": Recipe("the base of the next one: the same tokens in another order", _from_model()),
    "kl in the last tenth": Recipe("arXiv 2503.17272", _from_model({"name": "kl", "start": 0.9})),
    # -- without a default --
    "no auxk": Recipe("the losses without AuxK", _with(losses=[{"name": "mse"}])),
    "no annealing": Recipe("k throughout", _k("batchtopk", anneal_from=1.0)),
    "no warm-up": Recipe("the highest rate from the first step", _with(schedule={"name": "linear", "warmup_steps": 0})),
    # -- the decoder --
    "per_source": Recipe("one decoder per source layer", _with(tying={"name": "per_source"})),
    "per_target": Recipe("one decoder per target layer", _with(tying={"name": "per_target"})),
    "per_layer, equal parameters": Recipe("per-layer transcoders", _equal_parameters),
    "skip": Recipe("Paulo et al. 2025, arXiv 2501.18823", _with(tying={"name": "untied", "skip": True})),
    # -- how it begins, and how it ends --
    "exemplar start": Recipe("features begin as training tokens", _with(callbacks=["exemplar_start"])),
    "exemplar start, skip": Recipe(
        "both", _with(callbacks=["exemplar_start"], tying={"name": "untied", "skip": True})
    ),
    "decoder fitted": Recipe("Engan et al. 1999", _fitted()),
    "exemplar start, decoder fitted": Recipe("both", _fitted("exemplar_start")),
    "exemplar start, decoder fitted, skip": Recipe(
        "all three", lambda setup: {**_fitted("exemplar_start")(setup), "tying": {"name": "untied", "skip": True}}
    ),
    "tied start": Recipe("Gao et al. 2024, arXiv 2406.04093", _with(callbacks=[{"name": "tied_start"}])),
    "active subspace": Recipe("Wang et al. 2025, arXiv 2508.16929", _with(callbacks=[{"name": "active_subspace"}])),
    "resample": Recipe("Bricken et al. 2023", _with(callbacks=[{"name": "resample", "every": 50}])),
    "average of weights": Recipe("Polyak & Juditsky 1992", _with(callbacks=[{"name": "ema", "decay": 0.99}])),
    # -- what it is trained on --
    "outliers dropped": Recipe(
        "ByteDance's trainer", _with(transforms=[{"name": "drop_outliers", "factor": 5.0, "held_out": False}])
    ),
    # -- the optimizer and the units --
    "whitening": Recipe("ZCA of inputs", _with(normalisation={"name": "whitening", "sides": "inputs"})),
}  # fmt: skip


@attrs.frozen
class Ablation:
    """Recipes at equal tokens, one seed of all before the next one."""

    lot: Lot
    setups: Sequence[Setup]
    seeds: Sequence[int]
    only: Collection[str]

    def jobs(self) -> list[Job]:
        return [
            self.lot.job(setup, name, seed, recipe.tables(setup, seed))
            for seed in self.seeds
            for setup in self.setups
            for name, recipe in RECIPES.items()
            if not self.only or name in self.only
        ]

    def write(self) -> Path:
        figures = ["nmse_report", "l0_report", "dead_fraction_report", "ce_recovered", "kl", "cpu_step_s"]
        rows, raw = [], []
        for setup in self.setups:
            found = {name: self._results(setup, name) for name in RECIPES}
            for name, runs in found.items():
                raw += runs
                if runs:
                    beside = "read from the model" if "kl" in name else BASE
                    over = tables.ratio(runs, found[beside])
                    cells = tables.cells(runs, figures)
                    rows.append([setup.about, name, RECIPES[name].source, str(len(runs)), cells[0], over, *cells[1:]])
        named = [tables.COLUMNS[name][0] for name in figures]
        columns = ["model", "recipe", "what it is", "seeds", named[0], "NMSE over the base's", *named[1:]]
        return tables.write("ablation", WHAT, COMMAND, columns, rows, raw)

    def _results(self, setup: Setup, name: str) -> list[dict[str, Any]]:
        jobs = [self.lot.job(setup, name, seed, RECIPES[name].tables(setup, seed)) for seed in self.seeds]
        return [figures for job in jobs if (figures := result(job)) is not None]


COMMAND = "python -m tests.benchmarks.quality ablation --folder FOLDER --model SmolLM2-135M.gguf --write"
WHAT = (
    "Recipes at equal tokens, each a change of the defaults with BatchTopK (the first row). Mean and half the range "
    "over seeds, on held-out documents by which nothing was chosen; a ratio is of runs with the same seed. Dead: "
    "never active on these documents (16,384 tokens). CE recovered and KL: all MLPs of the layers replaced at once, on "
    "4,077 tokens of them for the shipped model and 2,040 for SmolLM2."
)

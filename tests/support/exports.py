"""Transcoders to export, and exporting one as a recipe does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from clt_plugins import CrossLayerTranscoder, Faults
from clt_plugins.model.assemble import assemble
from clt_plugins.model.normalisation.fit import fit_to_batches
from clt_plugins.recipe.read import read_recipe
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry.build import build
from tests.support.helpers import parts, plugins, random_batch, stir, tables

L, D, F = 3, 6, 10
TYINGS: dict[str, dict[str, Any]] = {
    "untied": {"name": "untied"},
    "per_source": {"name": "per_source", "feature_scale": True},
    "per_target": {"name": "per_target", "feature_scale": True},
}
SHARED: dict[str, Any] = {"name": "per_target", "feature_offset": True, "feature_scale": True}
"""Offsets that differ between targets."""
RELU = {"name": "relu"}
JUMPRELU: dict[str, Any] = {"name": "jumprelu", "threshold": 0.2}
ACTIVATIONS = {"relu": RELU, "jumprelu": JUMPRELU}
METHODS = ("none", "mean_std", "rms", "sqrt_d_model")
MODEL = {"path": "some/model"}


def make(
    activation: dict[str, Any] = JUMPRELU,
    tying: dict[str, Any] = TYINGS["untied"],
    normalisation: str = "mean_std",
    **changes: Any,
) -> CrossLayerTranscoder:
    """A transcoder with every parameter stirred, and statistics of skewed data."""
    normaliser = {"name": normalisation}
    transcoder = parts(activation=activation, tying=tying, normalisation=normaliser, **changes).transcoder
    stir(transcoder)
    batch = random_batch(64, L, D, seed=5)
    skewed = type(batch)(batch.inputs * 3 + 1.5, batch.targets * torch.arange(1, D + 1) - 2)
    fit_to_batches(transcoder, [skewed])
    transcoder.described_model = dict(MODEL)
    return transcoder.eval()


def exporter(name: str, **settings: Any) -> Any:
    """An exporter, built as for a recipe's stage `export`."""
    chosen = structure_choice(plugins(), "exports", {"name": name, **settings})
    return build(chosen, parts().context)


def export(transcoder: CrossLayerTranscoder, name: str, folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    exporter(name, **settings).export(transcoder, folder)
    return folder


def load(folder: Path, **options: Any) -> CrossLayerTranscoder:
    return CrossLayerTranscoder.load(folder, plugins=plugins(), **options)


def inputs(tokens: int = 40) -> torch.Tensor:
    """Raw activations far from standard."""
    return random_batch(tokens, L, D, seed=8).inputs * 3 + 1.5


def close(computed: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (computed - expected).abs().max() <= tolerance * expected.abs().max()


def circuit_tracer_forward(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """What circuit-tracer computes with a folder, written from the description of its layout."""
    layers = len(list(folder.glob("W_enc_*.safetensors")))
    out = torch.zeros(len(x), layers, x.shape[2])
    for i in range(layers):
        encoder = {name: value.float() for name, value in load_file(folder / f"W_enc_{i}.safetensors").items()}
        rows = load_file(folder / f"W_dec_{i}.safetensors")[f"W_dec_{i}"].float()
        pre = x[:, i] @ encoder[f"W_enc_{i}"].T + encoder[f"b_enc_{i}"]
        threshold = encoder.get(f"threshold_{i}")
        acts = pre.relu() if threshold is None else pre * (pre > threshold)
        out[:, i:] += torch.einsum("bf,ftd->btd", acts, rows)
        out[:, i] += encoder[f"b_dec_{i}"]
    return out


def said_before_training(name: str, folder: Path, **changes: Any) -> list[str]:
    """What `validate` says of an export, checked to be what its `check` says of an untrained transcoder.

    A trained transcoder is then exported into the folder: offsets aside, in the same words or not at all.
    """
    faults: list[str] = []
    tables_of = {"model": MODEL, "activation": JUMPRELU, **changes}
    try:
        read_recipe(tables(**tables_of, exports=[{"name": name}]), plugins=plugins())
    except Faults as error:
        faults = [str(fault) for fault in error.faults]
    assert all(fault.startswith("recipe: stages[0].format: ") for fault in faults), faults
    faults = [fault.removeprefix("recipe: stages[0].format: ") for fault in faults]

    typed = read_recipe(tables(**tables_of), plugins=plugins())
    for device in ("cpu", "meta"):
        transcoder = assemble(typed, device=torch.device(device)).transcoder
        assert exporter(name).check(transcoder) == faults
    transcoder = assemble(typed).transcoder
    stir(transcoder)
    try:
        exporter(name).export(transcoder, folder)
        assert not faults
    except Faults as error:
        learned = "tying.feature_offset: differs between target layers, "
        refused = str(error)
        assert faults, f"only the export says: {refused}"
        assert refused.splitlines() == faults or refused.startswith(learned), refused
        assert not list(folder.iterdir()), "nothing is written where it refuses"
    return faults

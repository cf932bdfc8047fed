"""`transcoder.json`, and how a transcoder's files are written: a slice of the tensors by each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import torch

from clt_plugins.contract.spec import __version__
from clt_plugins.files.folders import atomic_folder
from clt_plugins.files.records import FORMAT, write_json
from clt_plugins.files.sliced import put_tensors
from clt_plugins.recipe.structure import plain

FILES = ("transcoder.json", "transcoder*.safetensors")
"""What the manifest of a transcoder's folder must list."""


def _is_dtype(_: Any, attribute: attrs.Attribute[Any], value: str) -> None:
    if not isinstance(getattr(torch, value, None), torch.dtype):
        raise ValueError(f"'{attribute.name}' must be a type of torch, such as float32: {value!r}")


@attrs.frozen(kw_only=True)
class Description:
    """`transcoder.json`: what a transcoder is, besides its tensors."""

    format: int = FORMAT
    """The version of the transcoder's files."""
    clt_plugins: str = __version__
    """The version of clt-plugins that wrote them."""
    n_layers: int = attrs.field(alias="layers")
    """L: transcribed layers of the language model."""
    d_model: int
    """D: the width of the language model."""
    n_features: int = attrs.field(alias="features")
    """F: features per layer."""
    dtype: str = attrs.field(validator=_is_dtype)
    """The type of the parameters, as torch names it."""
    normalisation: str | dict[str, Any]
    """The normalisation: its name and its settings, as [normalisation] of a recipe."""
    model: dict[str, Any]
    """The language model, as [model] of a recipe; empty if it is not known."""
    encoder: dict[str, Any] = attrs.field(factory=lambda: {"name": "plain"})
    """The encoder: its name and its settings, as [encoder] of a recipe; absent in old files, which have a plain one."""
    activation: dict[str, Any]
    """The activation: its name and its settings, as [activation] of a recipe."""
    tying: dict[str, Any]
    """The tying: its name and its settings, as [tying] of a recipe."""
    step: int | None = None
    """Training steps done; None if it is not known."""
    tokens: int | None = None
    """Tokens trained on; None if it is not known."""


def put_transcoder(transcoder: Any, folder: Path) -> None:
    """Write a transcoder's two files into a folder that `atomic_folder` yields."""
    parallel = transcoder.context.parallel
    put_tensors(folder, "transcoder", transcoder.tensors(), transcoder.feature_axes(), parallel, transcoder.n_features)
    if parallel.rank > 0:
        return
    description = Description(
        layers=transcoder.n_layers,
        d_model=transcoder.d_model,
        features=transcoder.n_features,
        dtype=str(transcoder.context.dtype).removeprefix("torch."),
        normalisation=plain(transcoder.choices["normalisation"]),
        model=transcoder.model_described(),
        encoder=plain(transcoder.choices["encoder"]),
        activation=plain(transcoder.choices["activation"]),
        tying=plain(transcoder.choices["tying"]),
        step=transcoder.step,
        tokens=transcoder.tokens,
    )
    write_json(folder / "transcoder.json", description)


def save_transcoder(transcoder: Any, folder: Path) -> None:
    """Write a transcoder as a folder, atomically; of several ranks, each writes its slices."""
    with atomic_folder(folder, transcoder.context.parallel) as partial:
        put_transcoder(transcoder, partial)

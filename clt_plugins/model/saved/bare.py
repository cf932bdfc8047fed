"""A transcoder as its files describe it, before it has numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from clt_plugins.errors import Refused
from clt_plugins.files.sliced import SlicedTensors
from clt_plugins.model.devices import bare_context, make_kernels, make_parallel
from clt_plugins.model.saved.description import Description
from clt_plugins.model.saved.tensors import check_tensors
from clt_plugins.recipe.structure import structure_choice

if TYPE_CHECKING:
    from clt_plugins.registry.plugins import Plugins

Make = Callable[..., Any]
"""The class of transcoder: this module stands below it, so it is handed in, and a transcoder is `Any` here."""

MOST_LAYERS = 10_000
"""Layers of a transcoder; language models have at most a few hundred."""


def check_sizes(description: Description, folder: Path) -> None:
    """Before anything is built, refuse sizes that no transcoder has: files may come from anybody.

    Raises:
        Refused: a size is not positive, or so large that all memory could not hold it.
    """
    n_layers, width, features = description.n_layers, description.d_model, description.n_features
    if min(n_layers, width, features) < 1 or n_layers > MOST_LAYERS or n_layers**2 * width * features >= 2**60:
        raise Refused(folder, f"no transcoder has {n_layers} layers, d_model {width} and {features} features")


def without_memory(
    make: Make,
    description: Description,
    origin: Path,
    device: str,
    plugins: Plugins,
    kernels: str,
    stored: SlicedTensors | None = None,
) -> Any:
    """A transcoder as `transcoder.json` describes it, on the device "meta" if that is possible.

    Args:
        stored: the tensors that it must have.
    """
    context = bare_context(
        torch.device("meta"),
        dtype=getattr(torch, description.dtype),
        kernels=make_kernels(kernels, torch.device(device), plugins),
        parallel=make_parallel("single", plugins),
        n_layers=description.n_layers,
        d_model=description.d_model,
        n_features=description.n_features,
    )
    parts = {
        part: structure_choice(plugins, part, getattr(description, part), str(origin))
        for part in ("encoder", "activation", "tying", "normalisation")
    }
    transcoder = make(context, **parts)
    if stored is not None:
        check_tensors(stored, transcoder)
    if any(inner._non_persistent_buffers_set for inner in transcoder.modules()):
        # No file has what is computed when it is built.
        context = attrs.evolve(context, device=torch.device(device))
        transcoder = make(context, **parts)
    transcoder.described_model = dict(description.model)
    transcoder.step, transcoder.tokens = description.step, description.tokens
    return transcoder

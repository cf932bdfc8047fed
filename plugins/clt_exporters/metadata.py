"""What each safetensors file says of itself, in its `__metadata__`."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from clt_exporters.hooks import portable
from clt_plugins import __version__, recipe_data

if TYPE_CHECKING:
    from clt_plugins import CrossLayerTranscoder


def metadata(
    format_name: str, transcoder: CrossLayerTranscoder, *, layer: int | None = None, side: str | None = None
) -> dict[str, str]:
    """The file's format, this package's version, the layer, "encoder", "decoder" or both, and what was trained.

    `recipe` is the SHA-256 of the transcoder's tables of its recipe (sizes, model, normalisation, encoder, activation,
    tying) and of its training steps: files of one transcoder have the same.
    """
    about: dict[str, Any] = {
        "layers": transcoder.n_layers,
        "d_model": transcoder.d_model,
        "features": transcoder.n_features,
        "model": portable(transcoder.model_described()),
        "steps": transcoder.step,
        "tokens": transcoder.tokens,
        **{table: recipe_data(chosen) for table, chosen in transcoder.choices.items()},
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    said = {"format": format_name, "clt_plugins": __version__, "recipe": digest}
    if layer is not None:
        said["layer"] = str(layer)
    if side is not None:
        said["side"] = side
    return said

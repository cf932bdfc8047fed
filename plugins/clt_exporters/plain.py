"""One file of plain matrices, for your own tools.

    a_s = x_s W_enc[s]^T + b_enc[s] where this is above threshold[s], else 0
    y_t = sum over s <= t of a_s W_dec.s[:, t - s] + b_dec[t] (+ x_t W_skip[t])

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_exporters import limits
from clt_exporters.folded import Folded
from clt_exporters.hooks import portable
from clt_exporters.metadata import metadata
from clt_exporters.reading.files import Weights, described
from clt_exporters.reading.layers import Layers
from clt_exporters.reading.on_disk import Rows
from clt_plugins import Imported, write_tensors

if TYPE_CHECKING:
    from clt_exporters import SafetensorsConfig
    from clt_plugins import CrossLayerTranscoder

FILE = "clt.safetensors"


class Safetensors:
    """Writes `clt.safetensors`, and its description `clt.json`; and reads them."""

    def __init__(self, config: SafetensorsConfig):
        self.config = config

    def check(self, transcoder: CrossLayerTranscoder) -> list[str]:
        """Complaints about an untrained transcoder."""
        return [str(fault) for fault in limits.plain("safetensors", limits.Subject.of(transcoder, trained=False))]

    def export(self, transcoder: CrossLayerTranscoder, folder: Path) -> None:
        """Write the two files. The complete decoder must fit in memory.

        Raises:
            Faults: the activation has no thresholds, or offsets differ between targets.
        """
        limits.refuse(limits.plain("safetensors", limits.Subject.of(transcoder, trained=True)))
        folded = Folded(transcoder)
        dtype = getattr(torch, self.config.dtype)
        stacked: dict[str, list[Tensor]] = {}
        tensors: dict[str, Tensor] = {}
        for i in range(transcoder.n_layers):
            layer = folded.layer(i)
            for name in ("W_enc", "b_enc", "b_dec", "threshold", "W_skip"):
                value = getattr(layer, name)
                if value is not None:
                    stacked.setdefault(name, []).append(value.to(dtype))
            tensors[f"W_dec.{i:02}"] = layer.W_dec.to(dtype)
        tensors.update({name: torch.stack(values) for name, values in stacked.items()})
        write_tensors(folder / FILE, tensors, self.config.dtype, metadata("clt", transcoder))
        about = {
            "layers": transcoder.n_layers,
            "d_model": transcoder.d_model,
            "features": transcoder.n_features,
            "model": portable(transcoder.model_described()),
        }
        (folder / "clt.json").write_text(json.dumps(about, indent=2) + "\n")

    def recognises(self, folder: Path) -> bool:
        """Whether both files are there."""
        return (folder / FILE).is_file() and (folder / "clt.json").is_file()

    def read(self, folder: Path) -> Imported:
        """Read the two files.

        Raises:
            Refused: a file or tensor is missing, damaged, or of another shape.
        """
        _, said = described(folder, "clt.json")
        file = Weights(folder / FILE)
        L, F, D = file.sizes("W_enc", "layers, features, d_model")
        shapes = {"W_enc": [L, F, D], "b_enc": [L, F], "b_dec": [L, D]}
        shapes |= {name: shape for name, shape in {"threshold": [L, F], "W_skip": [L, D, D]}.items() if name in file}
        shapes |= {f"W_dec.{s:02}": [F, L - s, D] for s in range(L)}
        for name, shape in shapes.items():
            file.get(name, shape)

        def of(name: str, layer: int) -> Tensor:
            return file.get(name, shapes[name])[layer]

        layers = Layers(
            folder=folder,
            n_layers=L,
            d_model=D,
            n_features=F,
            W_enc=lambda i: of("W_enc", i),
            b_enc=lambda i: of("b_enc", i),
            b_dec=lambda i: of("b_dec", i),
            threshold=(lambda i: of("threshold", i)) if "threshold" in shapes else None,
            W_skip=(lambda i: of("W_skip", i)) if "W_skip" in shapes else None,
            rows=lambda i: Rows([file.get(f"W_dec.{i:02}", [F, L - i, D])]),
        )
        model = said.get("model")
        activation = {"name": "jumprelu"} if "threshold" in shapes else {"name": "relu"}
        size = file.path.stat().st_size
        return layers.imported("plain safetensors file", activation, model if isinstance(model, dict) else {}, size)

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
from clt_plugins import write_tensors

if TYPE_CHECKING:
    from clt_exporters import SafetensorsConfig
    from clt_plugins import CrossLayerTranscoder


class Safetensors:
    """Writes `clt.safetensors`, and its description `clt.json`."""

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
        write_tensors(folder / "clt.safetensors", tensors, self.config.dtype)
        about = {
            "layers": transcoder.n_layers,
            "d_model": transcoder.d_model,
            "features": transcoder.n_features,
            "model": portable(transcoder.model_described()),
        }
        (folder / "clt.json").write_text(json.dumps(about, indent=2) + "\n")

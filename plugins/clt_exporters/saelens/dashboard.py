"""Folders that SAEDashboard opens with `use_clt`: a checkpoint of crosslayer-coding that it can always read.

SAEDashboard takes the decoder of a layer to itself, of untied checkpoints only, and its normalisation from
`norm_stats.json`. So decoders are expanded, and normalisation, scales and shared offsets folded into the weights. (The
format `crosslayer-coding` keeps them as they are, for that library itself.)

`dashboard.json` has the settings of `NeuronpediaRunnerConfig` for each layer.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clt_exporters import limits
from clt_exporters.folded import Folded
from clt_exporters.hooks import input_hook, lens_hook, model_name, output_hook
from clt_exporters.metadata import metadata
from clt_plugins import Refused, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from clt_exporters import SAEDashboardConfig
    from clt_plugins import CrossLayerTranscoder

WEIGHTS = "model.safetensors"
LEAST = torch.finfo(torch.float32).tiny
"""Stands for a threshold of 0, which has no logarithm: no number that is not 0 is between them."""


class SAEDashboard:
    """Writes the folder."""

    def __init__(self, config: SAEDashboardConfig):
        self.config = config

    def check(self, transcoder: CrossLayerTranscoder) -> list[str]:
        """Complaints about an untrained transcoder."""
        return [str(fault) for fault in limits.saedashboard(self.config, limits.Subject.of(transcoder, trained=False))]

    def export(self, transcoder: CrossLayerTranscoder, folder: Path) -> None:
        """Write the folder. The complete decoder must fit in memory.

        Raises:
            Faults: the activation has no thresholds, there is a skip path, offsets differ between targets, thresholds
                are below 0, the layers are not the first ones, or a name is not known.
        """
        limits.refuse(limits.saedashboard(self.config, limits.Subject.of(transcoder, trained=True)))
        folded = Folded(transcoder)
        if bool((folded.threshold < 0).any()):
            raise Refused(
                "tying.feature_offset",
                "gives features thresholds below 0, of which crosslayer-coding stores the logarithm: export saelens",
            )
        L, D, model = transcoder.n_layers, transcoder.d_model, transcoder.model_described()
        tensors: dict[str, Tensor] = {}
        thresholds: list[Tensor] = []
        for i in range(L):
            layer = folded.layer(i)
            tensors[f"encoder_module.encoders.{i}.weight"] = layer.W_enc
            tensors[f"encoder_module.encoders.{i}.bias_param"] = layer.b_enc
            for t in range(i, L):
                tensors[f"decoder_module.decoders.{i}->{t}.weight"] = layer.W_dec[:, t - i].T
                bias = layer.b_dec if t == i else torch.zeros(D)
                tensors[f"decoder_module.decoders.{i}->{t}.bias_param"] = bias
            if layer.threshold is not None:
                thresholds.append(layer.threshold.clamp(min=LEAST).log())
        if thresholds:
            tensors["theta_manager.log_threshold"] = torch.stack(thresholds)
        name = model_name(self.config.model_name, model)
        write_tensors(folder / WEIGHTS, tensors, "float32", metadata("saedashboard", transcoder))
        reads, writes = input_hook(self.config.input_hook, model), output_hook(self.config.output_hook, model)
        described = {
            "num_features": transcoder.n_features,
            "num_layers": L,
            "d_model": D,
            "model_name": name,
            "clt_dtype": "float32",
            "activation_fn": "jumprelu" if thresholds else "relu",
            "decoder_tying": "none",
            "normalization_method": "none",
            "tl_input_template": f"blocks.{{}}.{lens_hook(reads)}",
            "tl_output_template": f"blocks.{{}}.{writes}",
        }
        (folder / "cfg.json").write_text(json.dumps(described, indent=2) + "\n")
        runs = [
            {"use_clt": True, "clt_layer_idx": i, "clt_weights_filename": WEIGHTS, "clt_dtype": "float32"}
            for i in range(L)
        ]
        (folder / "dashboard.json").write_text(json.dumps({"model_id": name, "layers": runs}, indent=2) + "\n")

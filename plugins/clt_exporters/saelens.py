"""SAELens transcoders: a folder per layer with `cfg.json` and `sae_weights.safetensors`.

A cross-layer feature also writes to later layers, which a transcoder of one layer has no place for: each folder holds
the whole encoder of its layer, and the decoder rows to that layer alone. Good for dashboards, activations and searches;
for reconstructions of all layers together export another format.

Shapes: D d_model, F features per layer.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from clt_exporters import limits
from clt_exporters.folded import Folder
from clt_exporters.hooks import input_hook, layer_numbers, model_name, output_hook
from clt_exporters.tensors import write
from clt_plugins import Refused

if TYPE_CHECKING:
    from clt_exporters import SAELensConfig
    from clt_plugins import CrossLayerTranscoder

log = logging.getLogger("clt_plugins.exporters")


class SAELens:
    """Writes the folders `layer_00`, `layer_01`, ... of a transcoder, numbered as the language model's layers."""

    def __init__(self, config: SAELensConfig):
        self.config = config

    def check(self, transcoder: CrossLayerTranscoder) -> list[str]:
        """What the folders could not hold of a transcoder that is to be trained."""
        return limits.saelens(self.config, limits.Subject.of(transcoder, trained=False))

    def export(self, transcoder: CrossLayerTranscoder, folder: Path) -> None:
        """Write a folder per layer.

        Raises:
            ValueError: features selected by rank, offsets that differ between targets, thresholds below 0, no name of
                the language model, or an unknown hook.
        """
        limits.refuse(limits.saelens(self.config, limits.Subject.of(transcoder, trained=True)))
        folded = Folder(transcoder)
        model = transcoder.model_described()
        name = model_name(self.config.model_name, model)
        hooks = input_hook(self.config.input_hook, model), output_hook(self.config.output_hook, model)
        numbers = layer_numbers(transcoder.n_layers, model)
        for number, threshold in zip(numbers, folded.threshold, strict=True):
            if bool((threshold < 0).any()):
                raise Refused(
                    "tying.feature_offset",
                    f"gives features of layer {number} thresholds below 0, where SAELens cuts "
                    "features off: export another format",
                )
        for i, number in enumerate(numbers):
            layer = folded.layer(i)
            # SAELens wants the encoder as [D, F], and the skip as [out, in].
            tensors = {
                "W_enc": layer.W_enc.T,
                "b_enc": layer.b_enc,
                "W_dec": layer.W_dec[:, 0],
                "b_dec": layer.b_dec,
            }
            architecture = "transcoder"
            if layer.W_skip is not None:
                tensors["W_skip"] = layer.W_skip.T
                architecture = "skip_transcoder"
            if layer.threshold is not None:
                tensors["threshold"] = layer.threshold
                architecture = f"jumprelu_{architecture}"
            about = {
                "architecture": architecture,
                "d_in": transcoder.d_model,
                "d_sae": transcoder.n_features,
                "d_out": transcoder.d_model,
                "dtype": self.config.dtype,
                "device": "cpu",
                "apply_b_dec_to_input": False,
                "normalize_activations": "none",
                "reshape_activations": "none",
                "metadata": {
                    "model_name": name,
                    "hook_name": f"blocks.{number}.{hooks[0]}",
                    "hook_name_out": f"blocks.{number}.{hooks[1]}",
                },
            }
            place = folder / f"layer_{number:02}"
            place.mkdir()
            write(place / "sae_weights.safetensors", tensors, self.config.dtype)
            (place / "cfg.json").write_text(json.dumps(about, indent=2) + "\n")
        if transcoder.n_layers > 1:
            log.warning(
                "saelens: what features write to later layers than their own is left out: no place for it there"
            )

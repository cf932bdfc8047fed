"""SAELens transcoders: a folder per layer with `cfg.json` and `sae_weights.safetensors`.

A cross-layer feature also writes to later layers, which a transcoder of one layer cannot hold: each folder has the
complete encoder of its layer, and only those decoder rows that write to that layer. Use it for dashboards, activations
and searches. To reconstruct all layers, export another format.

Shapes: D d_model, F features per layer.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from clt_exporters import limits
from clt_exporters.folded import Folded, Layer
from clt_exporters.hooks import input_hook, layer_numbers, model_name, output_hook
from clt_exporters.metadata import metadata
from clt_exporters.saelens.read import is_saelens, read_saelens
from clt_plugins import Imported, Refused, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from clt_exporters import SAELensConfig
    from clt_plugins import CrossLayerTranscoder

log = logging.getLogger("clt_plugins.exporters")


class SAELens:
    """Writes a folder for each layer, numbered as in the language model: `layer_00`, ...; and reads them."""

    def __init__(self, config: SAELensConfig):
        self.config = config

    def check(self, transcoder: CrossLayerTranscoder) -> list[str]:
        """Complaints about an untrained transcoder."""
        return [str(fault) for fault in limits.saelens(self.config, limits.Subject.of(transcoder, trained=False))]

    def export(self, transcoder: CrossLayerTranscoder, folder: Path) -> None:
        """Write a folder for each layer.

        Raises:
            Faults: the activation has no thresholds, offsets differ between targets, thresholds are below 0, the name
                of the language model is missing, or a hook is not known.
        """
        limits.refuse(limits.saelens(self.config, limits.Subject.of(transcoder, trained=True)))
        folded = Folded(transcoder)
        model = transcoder.model_described()
        numbers = layer_numbers(transcoder.n_layers, model)
        for number, threshold in zip(numbers, folded.threshold, strict=True):
            if bool((threshold < 0).any()):
                raise Refused(
                    "tying.feature_offset",
                    f"gives features of layer {number} thresholds below 0, and SAELens cuts features off at 0: "
                    "export another format",
                )
        for i, number in enumerate(numbers):
            layer = folded.layer(i)
            layer_folder = folder / f"layer_{number:02}"
            layer_folder.mkdir()
            about = metadata("saelens", transcoder, layer=number)
            write_tensors(layer_folder / "sae_weights.safetensors", _tensors(layer), self.config.dtype, about)
            described = {
                "architecture": _architecture(layer),
                "d_in": transcoder.d_model,
                "d_sae": transcoder.n_features,
                "d_out": transcoder.d_model,
                "dtype": self.config.dtype,
                "device": "cpu",
                "apply_b_dec_to_input": False,
                "normalize_activations": "none",
                "reshape_activations": "none",
                "metadata": {
                    "model_name": model_name(self.config.model_name, model),
                    "hook_name": f"blocks.{number}.{input_hook(self.config.input_hook, model)}",
                    "hook_name_out": f"blocks.{number}.{output_hook(self.config.output_hook, model)}",
                },
            }
            (layer_folder / "cfg.json").write_text(json.dumps(described, indent=2) + "\n")
        if not limits.Subject.of(transcoder, trained=True).own_layer:
            log.warning("saelens: the format holds one layer: what features write to later layers is left out")

    def recognises(self, folder: Path) -> bool:
        """Whether the folder, or folders in it, have SAELens's files."""
        return is_saelens(folder)

    def read(self, folder: Path) -> Imported:
        """Read transcoders: see `read.read_saelens`."""
        return read_saelens(folder)


def _tensors(layer: Layer) -> dict[str, Tensor]:
    """A layer by SAELens's names and axes: the encoder is [D, F], the skip path [out, in]."""
    tensors = {"W_enc": layer.W_enc.T, "b_enc": layer.b_enc, "W_dec": layer.W_dec[:, 0], "b_dec": layer.b_dec}
    if layer.W_skip is not None:
        tensors["W_skip"] = layer.W_skip.T
    if layer.threshold is not None:
        tensors["threshold"] = layer.threshold
    return tensors


def _architecture(layer: Layer) -> str:
    jumprelu = "" if layer.threshold is None else "jumprelu_"
    skip = "" if layer.W_skip is None else "skip_"
    return f"{jumprelu}{skip}transcoder"

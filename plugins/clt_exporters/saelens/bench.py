"""Folders for SAEBench: each layer's features as one of its custom SAEs, with the Python file that makes it.

SAEBench wants `encode`, `decode`, `W_enc` [D, F], `W_dec` [F, D] with rows of norm 1, biases and `cfg`. So each feature
is scaled by the norm of what it writes to its own layer; what it writes to later layers is left out. SAEBench's `core`
compares reconstructions with the activations that were read: for a transcoder, which writes elsewhere, it means
nothing. Use the evaluations of features: sparse probing, absorption, SCR, TPP, RAVEL, autointerpretation.

Shapes: D d_model, F features per layer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from clt_exporters import limits
from clt_exporters.folded import Folded
from clt_exporters.hooks import input_hook, layer_numbers, lens_hook, model_name, output_hook
from clt_exporters.metadata import metadata
from clt_plugins import write_tensors

if TYPE_CHECKING:
    from clt_exporters import SAEBenchConfig
    from clt_plugins import CrossLayerTranscoder

ADAPTER = Path(__file__).with_name("saebench") / "sae_bench_adapter.py"
"""It stands in no package: it needs SAEBench, and is only copied."""


class SAEBench:
    """Writes `layer_00`, `layer_01`, ..., numbered as in the language model, and `sae_bench_adapter.py`."""

    def __init__(self, config: SAEBenchConfig):
        self.config = config

    def check(self, transcoder: CrossLayerTranscoder) -> list[str]:
        """Complaints about an untrained transcoder."""
        return [str(fault) for fault in limits.saebench(self.config, limits.Subject.of(transcoder, trained=False))]

    def export(self, transcoder: CrossLayerTranscoder, folder: Path) -> None:
        """Write the folders.

        Raises:
            Faults: the activation has no thresholds, there is a skip path, offsets differ between targets, or a name is
                not known.
        """
        limits.refuse(limits.saebench(self.config, limits.Subject.of(transcoder, trained=True)))
        folded = Folded(transcoder)
        model = transcoder.model_described()
        for i, number in enumerate(layer_numbers(transcoder.n_layers, model)):
            layer = folded.layer(i)
            rows = layer.W_dec[:, 0]
            norms = rows.norm(dim=1)
            norms = norms.where(norms > 0, 1.0)
            tensors = {
                "W_enc": (layer.W_enc * norms[:, None]).T,
                "b_enc": layer.b_enc * norms,
                "W_dec": rows / norms[:, None],
                "b_dec": layer.b_dec,
            }
            if layer.threshold is not None:
                tensors["threshold"] = layer.threshold * norms
            out = folder / f"layer_{number:02}"
            out.mkdir()
            write_tensors(out / "sae.safetensors", tensors, "float32", metadata("saebench", transcoder, layer=number))
            described = {
                "model_name": model_name(self.config.model_name, model),
                "hook_layer": number,
                "hook_name": f"blocks.{number}.{lens_hook(input_hook(self.config.input_hook, model))}",
                "hook_name_out": f"blocks.{number}.{output_hook(self.config.output_hook, model)}",
                "architecture": "relu" if layer.threshold is None else "jumprelu",
            }
            (out / "sae_bench.json").write_text(json.dumps(described, indent=2) + "\n")
        shutil.copyfile(ADAPTER, folder / "sae_bench_adapter.py")

"""circuit-tracer's folder of a cross-layer transcoder: two files per layer and a `config.yaml`.

| file | tensor | shape |
| --- | --- | --- |
| `W_enc_i.safetensors` | `W_enc_i`, `b_enc_i` | [F, D], [F] |
| | `b_dec_i`, the bias of target layer i | [D] |
| | `threshold_i`, if features are `x where x > threshold`; without it they are ReLU | [F] |
| `W_dec_i.safetensors` | `W_dec_i`, axis 1 the targets i, i + 1, ... | [F, L - i, D] |

The layout cannot hold a skip path: circuit-tracer neither writes nor reads one.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from clt_exporters import limits
from clt_exporters.circuit_tracer.described import described_set, read_description
from clt_exporters.folded import Folded
from clt_exporters.metadata import metadata
from clt_exporters.reading.files import Weights, consecutive, described
from clt_exporters.reading.layers import Layers
from clt_exporters.reading.on_disk import Rows
from clt_plugins import Imported, Refused, write_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from clt_exporters import CircuitTracerConfig
    from clt_plugins import CrossLayerTranscoder

ENCODERS = "W_enc_{}.safetensors"


class CircuitTracer:
    """Writes and reads the folder."""

    def __init__(self, config: CircuitTracerConfig):
        self.config = config

    def check(self, transcoder: CrossLayerTranscoder) -> list[str]:
        """Complaints about an untrained transcoder."""
        subject = limits.Subject.of(transcoder, trained=False)
        return [str(fault) for fault in limits.circuit_tracer(self.config, subject)]

    def export(self, transcoder: CrossLayerTranscoder, folder: Path) -> None:
        """Write the folder.

        Raises:
            Faults: there is a skip path, the activation has no thresholds, offsets differ between targets, the name of
                the language model is missing, a hook is not known, or the layers are not the first ones.
        """
        limits.refuse(limits.circuit_tracer(self.config, limits.Subject.of(transcoder, trained=True)))
        folded = Folded(transcoder)
        for i in range(transcoder.n_layers):
            layer = folded.layer(i)
            encoder = {f"W_enc_{i}": layer.W_enc, f"b_enc_{i}": layer.b_enc, f"b_dec_{i}": layer.b_dec}
            if layer.threshold is not None:
                encoder[f"threshold_{i}"] = layer.threshold
            sides: dict[str, Mapping[str, Tensor]] = {"enc": encoder, "dec": {f"W_dec_{i}": layer.W_dec}}
            for side, tensors in sides.items():
                about = metadata("circuit-tracer", transcoder, layer=i, side={"enc": "encoder", "dec": "decoder"}[side])
                write_tensors(folder / f"W_{side}_{i}.safetensors", tensors, self.config.dtype, about)
        described = described_set("cross_layer_transcoder", self.config, transcoder.model_described())
        (folder / "config.yaml").write_text(yaml.safe_dump(described, sort_keys=False))

    def recognises(self, folder: Path) -> bool:
        """Whether the folder has the first layer's encoder under circuit-tracer's name, and no TopK."""
        return (folder / ENCODERS.format(0)).is_file() and not is_topk(folder)

    def read(self, folder: Path) -> Imported:
        """Read the folder.

        Raises:
            Refused: a file or tensor is missing, damaged, or of another shape.
        """
        model, hooks = read_description(folder, "cross_layer_transcoder")
        layers, decoder_bytes = read_layers(folder)
        has_thresholds = layers.threshold is not None
        return layers.imported(
            f"circuit-tracer folder, {'with' if has_thresholds else 'without'} thresholds",
            {"name": "jumprelu"} if has_thresholds else {"name": "relu"},
            model,
            decoder_bytes,
            hooks=hooks,
        )


def is_topk(folder: Path) -> bool:
    """Whether a folder of circuit-tracer's files is one of ByteDance, which circuit-tracer would read as ReLU."""
    if (folder / "W_dec_norm.safetensors").is_file():
        return True
    try:
        return "k" in described(folder, "config.json")[1]
    except Refused:
        return False  # reading the folder will name the damage


def read_layers(folder: Path) -> tuple[Layers, int]:
    """The layers of a folder, all shapes checked, and the bytes of its decoder.

    Raises:
        Refused: a file or tensor is missing, or of another shape than the first layer's.
    """
    encoders = [Weights(path) for path in consecutive(folder, ENCODERS)]
    n_layers = len(encoders)
    paths = [folder / f"W_dec_{i}.safetensors" for i in range(n_layers)]
    for path in paths:
        if not path.is_file():
            raise Refused(path, f"missing: the folder has {n_layers} files W_enc_*.safetensors")
    decoders = [Weights(path) for path in paths]
    F, D = encoders[0].sizes("W_enc_0", "features, d_model")
    has_thresholds = "threshold_0" in encoders[0]
    expected = {"W_enc": [F, D], "b_enc": [F], "b_dec": [D], "threshold": [F]}

    def of(name: str, i: int) -> Tensor:
        return encoders[i].get(f"{name}_{i}", expected[name])

    def rows(i: int) -> Rows:
        return Rows([decoders[i].get(f"W_dec_{i}", [F, n_layers - i, D])])

    # Some trainers write no biases: then no layer has one.
    has = {name: any(f"{name}_{i}" in encoders[i] for i in range(n_layers)) for name in expected}
    for i in range(n_layers):
        rows(i)
        for name in expected:
            if has[name] if name != "threshold" else has_thresholds:
                of(name, i)
    layers = Layers(
        folder=folder,
        n_layers=n_layers,
        d_model=D,
        n_features=F,
        W_enc=lambda i: of("W_enc", i),
        b_enc=(lambda i: of("b_enc", i)) if has["b_enc"] else None,
        b_dec=(lambda i: of("b_dec", i)) if has["b_dec"] else None,
        threshold=(lambda i: of("threshold", i)) if has_thresholds else None,
        rows=rows,
    )
    return layers, sum(path.stat().st_size for path in paths)

"""Transcoder sets of circuit-tracer: a transcoder for each MLP (PLT), whose features write to their own layer only.

| file | tensor | shape |
| --- | --- | --- |
| `layer_i.safetensors` | `W_enc`, `W_dec` | [F, D], [F, D] |
| | `b_enc`, `b_dec` | [F], [D] |
| | `activation_function.threshold`, if features are `x where x > threshold` | [F], or one number |
| | `W_skip`, if there is a skip path, applied as W_skip x | [D, D] |
| | `k`, of TopK | [] |
| `config.yaml` | `model_kind: transcoder_set`, the hooks, `activation: topk` or `relu`, `k` | |

circuit-tracer's TopK keeps the k largest pre-activations also where they are below 0; here those become 0.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from clt_exporters import limits
from clt_exporters.circuit_tracer.described import NAMES, described_set, read_description
from clt_exporters.folded import Folded
from clt_exporters.metadata import metadata
from clt_exporters.reading.files import Weights, consecutive, described, whole
from clt_exporters.reading.layers import Layers
from clt_exporters.reading.on_disk import Rows
from clt_plugins import Imported, Refused, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from clt_exporters import TranscoderSetConfig
    from clt_plugins import CrossLayerTranscoder

LAYERS = "layer_{}.safetensors"
THRESHOLD = "activation_function.threshold"


class TranscoderSet:
    """Writes and reads the folder."""

    def __init__(self, config: TranscoderSetConfig):
        self.config = config

    def check(self, transcoder: CrossLayerTranscoder) -> list[str]:
        """Complaints about an untrained transcoder."""
        subject = limits.Subject.of(transcoder, trained=False)
        return [str(fault) for fault in limits.transcoder_set(self.config, subject)]

    def export(self, transcoder: CrossLayerTranscoder, folder: Path) -> None:
        """Write the folder.

        Raises:
            Faults: features write to later layers, the activation has no thresholds, the name of the language model is
                missing, a hook is not known, or the layers are not the first ones.
        """
        limits.refuse(limits.transcoder_set(self.config, limits.Subject.of(transcoder, trained=True)))
        folded = Folded(transcoder)
        has_thresholds = not folded.is_relu
        for i in range(transcoder.n_layers):
            layer = folded.layer(i)
            tensors = {"W_enc": layer.W_enc, "W_dec": layer.W_dec[:, 0], "b_enc": layer.b_enc, "b_dec": layer.b_dec}
            if layer.threshold is not None:
                tensors[THRESHOLD] = layer.threshold
            if layer.W_skip is not None:
                tensors["W_skip"] = layer.W_skip.T
            about = metadata("transcoder-set", transcoder, layer=i)
            write_tensors(folder / LAYERS.format(i), tensors, self.config.dtype, about)
        said = described_set("transcoder_set", self.config, transcoder.model_described())
        if not has_thresholds:
            said["activation"] = "relu"
        (folder / "config.yaml").write_text(yaml.safe_dump(said, sort_keys=False))

    def recognises(self, folder: Path) -> bool:
        """Whether the folder has the first layer's file."""
        return (folder / LAYERS.format(0)).is_file()

    def read(self, folder: Path) -> Imported:
        """Read the folder.

        Raises:
            Refused: a file or tensor is missing, damaged, or of another shape.
        """
        model, hooks = read_description(folder, "transcoder_set")
        files = [Weights(path) for path in consecutive(folder, LAYERS)]
        F, D = files[0].sizes("W_enc", "features, d_model")
        activation = _activation(folder, files)
        shapes = {"W_enc": [F, D], "W_dec": [F, D], "b_enc": [F], "b_dec": [D], "W_skip": [D, D]}
        if "W_skip" not in files[0]:
            del shapes["W_skip"]
        for file in files:
            for name, shape in shapes.items():
                file.get(name, shape)

        def threshold(i: int) -> Tensor:
            shape = files[i].shapes.get(THRESHOLD)
            alone = shape in ([], [1])  # one number for all features
            return files[i].get(THRESHOLD, shape if alone and shape is not None else [F]).expand(F)

        if activation["name"] == "jumprelu":
            for i in range(len(files)):
                threshold(i)
        layers = Layers(
            folder=folder,
            n_layers=len(files),
            d_model=D,
            n_features=F,
            W_enc=lambda i: files[i].get("W_enc", [F, D]),
            b_enc=lambda i: files[i].get("b_enc", [F]),
            b_dec=lambda i: files[i].get("b_dec", [D]),
            threshold=threshold if activation["name"] == "jumprelu" else None,
            W_skip=(lambda i: files[i].get("W_skip", [D, D]).T) if "W_skip" in shapes else None,
            rows=lambda i: Rows([files[i].get("W_dec", [F, D])[:, None]]),
            own_layer=True,
        )
        kind = f"transcoder set of circuit-tracer, {activation['name']}"
        return layers.imported(kind, activation, model, sum(file.path.stat().st_size for file in files), hooks=hooks)


def _activation(folder: Path, files: list[Weights]) -> dict[str, Any]:
    """The table `[activation]`.

    Raises:
        Refused: it is not known, or k is missing.
    """
    path, said = described(folder, *NAMES)
    stated = said.get("activation")
    stored = {int(file.get("k", [])) for file in files if "k" in file}
    if stated == "topk" or (stated is None and stored):
        if len(stored) > 1:
            raise Refused(folder, f"k differs between layers, {sorted(stored)}: only one k for all can be loaded")
        k = said.get("k", next(iter(stored), None))
        return {"name": "topk", "k": whole(k, path, "k"), "scope": "layer", "ranking": "raw"}
    if stated == "relu":
        return {"name": "relu"}
    if stated not in (None, "jumprelu", "jump_relu"):
        raise Refused(path, f"unknown activation {stated!r}: it can be relu, jumprelu or topk")
    with_thresholds = [THRESHOLD in file for file in files]
    if any(with_thresholds) != all(with_thresholds):
        raise Refused(folder, f"some layers have {THRESHOLD!r}, and others have not")
    return {"name": "jumprelu"} if all(with_thresholds) else {"name": "relu"}

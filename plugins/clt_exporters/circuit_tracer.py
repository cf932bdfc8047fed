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

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from clt_exporters import limits
from clt_exporters.folded import Folded
from clt_exporters.hooks import input_hook, model_name, output_hook
from clt_exporters.on_disk import Mapped
from clt_plugins import Context, Imported, Refused, read_tensor, tensor_shapes, write_tensors

if TYPE_CHECKING:
    from clt_exporters import CircuitTracerConfig
    from clt_plugins import CrossLayerTranscoder, Tying


DESCRIPTIONS: dict[str, Callable[[str], Any]] = {"config.yaml": yaml.safe_load, "config.json": json.loads}
"""The files that may describe a folder, and how to read each; some trainers write JSON."""


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
        model = transcoder.model_described()
        described = {
            "model_kind": "cross_layer_transcoder",
            "model_name": model_name(self.config.model_name, model),
            "feature_input_hook": input_hook(self.config.input_hook, model),
            "feature_output_hook": output_hook(self.config.output_hook, model),
        }
        if self.config.scan is not None:
            described["scan"] = self.config.scan
        for i in range(transcoder.n_layers):
            layer = folded.layer(i)
            encoder = {f"W_enc_{i}": layer.W_enc, f"b_enc_{i}": layer.b_enc, f"b_dec_{i}": layer.b_dec}
            if layer.threshold is not None:
                encoder[f"threshold_{i}"] = layer.threshold
            write_tensors(folder / f"W_enc_{i}.safetensors", encoder, self.config.dtype)
            write_tensors(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": layer.W_dec}, self.config.dtype)
        (folder / "config.yaml").write_text(yaml.safe_dump(described, sort_keys=False))

    def recognises(self, folder: Path) -> bool:
        """Whether the folder has the first layer's encoder under circuit-tracer's name."""
        return (folder / "W_enc_0.safetensors").is_file()

    def read(self, folder: Path) -> Imported:
        """Read the folder.

        Raises:
            Refused: a file or tensor is missing, damaged, or of another shape.
        """
        n_layers = len(list(folder.glob("W_enc_*.safetensors")))
        shapes = _shapes(folder, n_layers)
        n_features, d_model = shapes["W_enc_0"]
        has_thresholds = "threshold_0" in shapes
        tensors = _Tensors(folder, n_layers, shapes)
        return Imported(
            kind=f"circuit-tracer folder, {'with' if has_thresholds else 'without'} thresholds",
            n_layers=n_layers,
            d_model=d_model,
            n_features=n_features,
            activation={"name": "jumprelu"} if has_thresholds else {"name": "relu"},
            tying={"name": "untied"},
            model=_model(folder),
            tensor=tensors.get,
            decoder_bytes=sum(path.stat().st_size for path in folder.glob("W_dec_*.safetensors")),
            decoder=tensors.mapped,
        )


def _shapes(folder: Path, n_layers: int) -> dict[str, list[int]]:
    """The shapes of all tensors, checked.

    Raises:
        Refused: a file or tensor is missing, or of another shape than the first layer's.
    """
    shapes: dict[str, list[int]] = {}
    for i in range(n_layers):
        for stem in (f"W_enc_{i}", f"W_dec_{i}"):
            path = folder / f"{stem}.safetensors"
            if not path.is_file():
                raise Refused(path, f"missing: the folder has {n_layers} files W_enc_*.safetensors")
            shapes.update(tensor_shapes(path))
    if len(shapes.get("W_enc_0", ())) != 2:
        raise Refused(folder, f"'W_enc_0' must be [features, d_model], got {shapes.get('W_enc_0')}")
    n_features, d_model = shapes["W_enc_0"]
    for i in range(n_layers):
        expected = {f"W_enc_{i}": [n_features, d_model], f"W_dec_{i}": [n_features, n_layers - i, d_model]}
        if "threshold_0" in shapes:
            expected[f"threshold_{i}"] = [n_features]
        for name, shape in expected.items():
            if shapes.get(name) != shape:
                raise Refused(folder, f"tensor {name!r} is {shapes.get(name)}, expected {shape}")
    return shapes


class _Tensors:
    """The folder's tensors by the engine's names."""

    def __init__(self, folder: Path, n_layers: int, shapes: Mapping[str, list[int]]):
        self.folder, self.n_layers, self.shapes = folder, n_layers, shapes

    def get(self, name: str) -> Tensor | None:
        """One tensor; None for a statistic, since the folder computes on raw activations."""
        if name.startswith("normaliser."):
            return None
        if name.startswith("W_dec."):
            return self.decoder(int(name.removeprefix("W_dec.")))
        if name == "log_threshold":
            return self._threshold().log()
        return self._stack(name)

    def decoder(self, layer: int) -> Tensor:
        """[F, L - layer, D], mapped."""
        return read_tensor(self.folder / f"W_dec_{layer}.safetensors", f"W_dec_{layer}")

    def mapped(self, context: Context) -> Tying:
        """The decoder, left on disk."""
        weights = [self.decoder(layer) for layer in range(self.n_layers)]
        return Mapped(context, weights, self._stack("b_dec"))

    def _threshold(self) -> Tensor:
        threshold = self._stack("threshold")
        if bool((threshold < 0).any()):
            layer, feature = (threshold < 0).nonzero()[0].tolist()
            raise Refused(
                self.folder,
                f"threshold_{layer}[{feature}] is {float(threshold[layer, feature]):g}: thresholds below zero cannot "
                "be loaded",
            )
        return threshold

    def _stack(self, name: str) -> Tensor:
        """[L, ...] in float32; a missing bias is 0 (some trainers write none)."""
        n_features, d_model = self.shapes["W_enc_0"]
        sizes = {"b_enc": n_features, "b_dec": d_model}
        parts = []
        for i in range(self.n_layers):
            if f"{name}_{i}" in self.shapes or name not in sizes:
                parts.append(read_tensor(self.folder / f"W_enc_{i}.safetensors", f"{name}_{i}").float())
            else:
                parts.append(torch.zeros(sizes[name]))
        return torch.stack(parts)


def _model(folder: Path) -> dict[str, Any]:
    """The language model, as in `[model]`, that the folder's description names; empty without a description."""
    path = next((folder / name for name in DESCRIPTIONS if (folder / name).is_file()), None)
    if path is None:
        return {}
    try:
        described = DESCRIPTIONS[path.name](path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        kind = path.suffix.removeprefix(".").upper()
        raise Refused(path, f"not a readable {kind} file: {' '.join(str(error).split())}") from error
    if not isinstance(described, dict):
        raise Refused(path, f"expected a table, got {type(described).__name__}")
    if described.get("model_kind", "cross_layer_transcoder") != "cross_layer_transcoder":
        raise Refused(path, f"a {described['model_kind']!r}, not a cross_layer_transcoder")
    return {"path": described["model_name"]} if "model_name" in described else {}

"""circuit-tracer's folder of a cross-layer transcoder: two files per layer and a `config.yaml`.

| file | tensor | shape |
| --- | --- | --- |
| `W_enc_i.safetensors` | `W_enc_i`, `b_enc_i` | [F, D], [F] |
| | `b_dec_i`, the bias of target layer i | [D] |
| | `threshold_i`, where features are `x where x > threshold`; else ReLU | [F] |
| `W_dec_i.safetensors` | `W_dec_i`, axis 1 the targets i, i + 1, ... | [F, L - i, D] |

The layout has no place for a skip path: circuit-tracer neither writes nor reads one.

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
from clt_exporters.folded import Folder
from clt_exporters.hooks import input_hook, model_name, output_hook
from clt_exporters.on_disk import Mapped
from clt_exporters.tensors import read, shapes, write
from clt_plugins import Context, Imported, Refused

if TYPE_CHECKING:
    from clt_exporters import CircuitTracerConfig
    from clt_plugins import CrossLayerTranscoder


READERS: dict[str, Callable[[str], Any]] = {"config.yaml": yaml.safe_load, "config.json": json.loads}
"""Of what is said about a folder, by the file's name."""


class CircuitTracer:
    """Writes and reads the folder."""

    def __init__(self, config: CircuitTracerConfig):
        self.config = config

    def check(self, transcoder: CrossLayerTranscoder) -> list[str]:
        """What the folder could not hold of a transcoder that is to be trained."""
        return limits.circuit_tracer(self.config, limits.Subject.of(transcoder, trained=False))

    def export(self, transcoder: CrossLayerTranscoder, folder: Path) -> None:
        """Write the folder.

        Raises:
            ValueError: a skip path, features selected by rank, offsets that differ between targets, no name of the
                language model, an unknown hook, or layers that are not the first ones.
        """
        limits.refuse(limits.circuit_tracer(self.config, limits.Subject.of(transcoder, trained=True)))
        folded = Folder(transcoder)
        model = transcoder.model_described()
        about = {
            "model_kind": "cross_layer_transcoder",
            "model_name": model_name(self.config.model_name, model),
            "feature_input_hook": input_hook(self.config.input_hook, model),
            "feature_output_hook": output_hook(self.config.output_hook, model),
        }
        if self.config.scan is not None:
            about["scan"] = self.config.scan
        for i in range(transcoder.n_layers):
            layer = folded.layer(i)
            encoder = {f"W_enc_{i}": layer.W_enc, f"b_enc_{i}": layer.b_enc, f"b_dec_{i}": layer.b_dec}
            if layer.threshold is not None:
                encoder[f"threshold_{i}"] = layer.threshold
            write(folder / f"W_enc_{i}.safetensors", encoder, self.config.dtype)
            write(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": layer.W_dec}, self.config.dtype)
        (folder / "config.yaml").write_text(yaml.safe_dump(about, sort_keys=False))

    def recognises(self, folder: Path) -> bool:
        return (folder / "W_enc_0.safetensors").is_file()

    def read(self, folder: Path) -> Imported:
        """Read the folder.

        Raises:
            ValueError: a file or tensor is missing, damaged, or of another shape.
        """
        layers = len(list(folder.glob("W_enc_*.safetensors")))
        found: dict[str, list[int]] = {}
        for i in range(layers):
            for part in (f"W_enc_{i}", f"W_dec_{i}"):
                path = folder / f"{part}.safetensors"
                if not path.is_file():
                    raise Refused(path, f"missing: the folder has {layers} files W_enc_*.safetensors")
                found.update(shapes(path))
        if len(found.get("W_enc_0", ())) != 2:
            raise Refused(folder, f"'W_enc_0' must be [features, d_model], got {found.get('W_enc_0')}")
        features, width = found["W_enc_0"]
        jumps = "threshold_0" in found
        for i in range(layers):
            expected = {f"W_enc_{i}": [features, width], f"W_dec_{i}": [features, layers - i, width]}
            if jumps:
                expected[f"threshold_{i}"] = [features]
            for name, shape in expected.items():
                if found.get(name) != shape:
                    raise Refused(folder, f"tensor {name!r} is {found.get(name)}, expected {shape}")
        weights = _Tensors(folder, layers, found)
        kind = f"circuit-tracer folder, {'with' if jumps else 'without'} thresholds"
        return Imported(
            kind=kind,
            n_layers=layers,
            d_model=width,
            n_features=features,
            activation={"name": "jumprelu"} if jumps else {"name": "relu"},
            tying={"name": "untied"},
            model=_model(folder),
            tensor=weights.get,
            decoder_bytes=sum(path.stat().st_size for path in folder.glob("W_dec_*.safetensors")),
            decoder=weights.mapped,
        )


class _Tensors:
    """The folder's tensors by our names."""

    def __init__(self, folder: Path, layers: int, shapes: Mapping[str, list[int]]):
        self.folder, self.n_layers, self.shapes = folder, layers, shapes

    def get(self, name: str) -> Tensor | None:
        if name.startswith("normaliser."):
            return None
        if name.startswith("W_dec."):
            return self.decoder(int(name.removeprefix("W_dec.")))
        if name == "log_threshold":
            return self._threshold().log()
        return self._stack(name)

    def decoder(self, layer: int) -> Tensor:
        """[F, L - layer, D], mapped."""
        return read(self.folder / f"W_dec_{layer}.safetensors", f"W_dec_{layer}")

    def mapped(self, context: Context) -> Any:
        """The decoder, left on disk."""
        weights = [self.decoder(layer) for layer in range(self.n_layers)]
        return Mapped(context, weights, self._stack("b_dec"))

    def _threshold(self) -> Tensor:
        threshold = self._stack("threshold")
        if bool((threshold < 0).any()):
            layer, feature = (threshold < 0).nonzero()[0].tolist()
            raise Refused(
                self.folder,
                f"threshold_{layer}[{feature}] is {float(threshold[layer, feature]):g}: features below "
                "zero cannot be held here",
            )
        return threshold

    def _stack(self, name: str) -> Tensor:
        """[L, ...] in float32; a bias that is not there is 0 (some trainers write none)."""
        features, width = self.shapes["W_enc_0"]
        absent = {"b_enc": [features], "b_dec": [width]}
        parts = []
        for i in range(self.n_layers):
            if f"{name}_{i}" in self.shapes or name not in absent:
                parts.append(read(self.folder / f"W_enc_{i}.safetensors", f"{name}_{i}").float())
            else:
                parts.append(torch.zeros(absent[name]))
        return torch.stack(parts)


def _model(folder: Path) -> dict[str, Any]:
    """What `config.yaml`, or `config.json` as some trainers write it, says of the language model, if there is one."""
    path = next((folder / name for name in READERS if (folder / name).is_file()), None)
    if path is None:
        return {}
    try:
        about = READERS[path.name](path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        kind = path.suffix.removeprefix(".").upper()
        raise Refused(path, f"not a readable {kind} file: {' '.join(str(error).split())}") from error
    if not isinstance(about, dict):
        raise Refused(path, f"expected a table, got {type(about).__name__}")
    if about.get("model_kind", "cross_layer_transcoder") != "cross_layer_transcoder":
        raise Refused(path, f"a {about['model_kind']!r}, not a cross_layer_transcoder")
    return {"path": about["model_name"]} if "model_name" in about else {}

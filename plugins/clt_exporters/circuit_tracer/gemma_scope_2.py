"""Gemma Scope 2's files of transcoders, of which circuit-tracer reads the cross-layer ones with their skip path.

A safetensors file for each layer; the last number in its name, or in that of its folder, is the layer's.

| tensor | shape, cross-layer | shape, one layer |
| --- | --- | --- |
| `w_enc` | [D, F] | [D, F] |
| `b_enc`, `threshold` | [F] | [F] |
| `w_dec`: all layers as targets, of which those before the layer are not read | [F, L, D] | [F, D] |
| `b_dec`, of the layer as a target | [D] | [D] |
| `affine_skip_connection`, if there is a skip path, applied as x S | [D, D] | [D, D] |

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from clt_exporters import limits
from clt_exporters.circuit_tracer.described import described_set
from clt_exporters.folded import Folded
from clt_exporters.metadata import metadata
from clt_exporters.reading.files import Weights, described, numbered, text
from clt_exporters.reading.layers import Layers
from clt_exporters.reading.on_disk import Rows
from clt_plugins import Imported, Refused, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from clt_exporters import GemmaScope2Config
    from clt_plugins import CrossLayerTranscoder

LAYERS = "params_layer_{}.safetensors"
SKIP = "affine_skip_connection"
FOLDERS = "layer_{}"
"""Transcoders of one layer are published in folders of their own, with a file `params.safetensors`."""


class GemmaScope2:
    """Writes and reads the files."""

    def __init__(self, config: GemmaScope2Config):
        self.config = config

    def check(self, transcoder: CrossLayerTranscoder) -> list[str]:
        """Complaints about an untrained transcoder."""
        subject = limits.Subject.of(transcoder, trained=False)
        return [str(fault) for fault in limits.gemma_scope_2(self.config, subject)]

    def export(self, transcoder: CrossLayerTranscoder, folder: Path) -> None:
        """Write the files, `config.json` and, for circuit-tracer, `config.yaml`. ReLU becomes a threshold of 0.

        Raises:
            Faults: the activation has no thresholds, offsets differ between targets, the name of the language model is
                missing, a hook is not known, or the layers are not the first ones.
        """
        limits.refuse(limits.gemma_scope_2(self.config, limits.Subject.of(transcoder, trained=True)))
        folded = Folded(transcoder)
        L = transcoder.n_layers
        for i in range(L):
            layer = folded.layer(i)
            rows = layer.W_dec.new_zeros(len(layer.b_enc), L, transcoder.d_model)
            rows[:, i:] = layer.W_dec
            tensors = {
                "w_enc": layer.W_enc.T,
                "b_enc": layer.b_enc,
                "threshold": torch.zeros_like(layer.b_enc) if layer.threshold is None else layer.threshold,
                "w_dec": rows,
                "b_dec": layer.b_dec,
            }
            if layer.W_skip is not None:
                tensors[SKIP] = layer.W_skip
            about = metadata("gemma-scope-2", transcoder, layer=i)
            write_tensors(folder / LAYERS.format(i), tensors, self.config.dtype, about)
        said = described_set("cross_layer_transcoder", self.config, transcoder.model_described())
        own = {
            "architecture": "jump_relu",
            "model_name": said["model_name"],
            "affine_connection": SKIP in tensors,
        }
        (folder / "config.json").write_text(json.dumps({**own, "type": "clt"}, indent=2) + "\n")
        # Of its own list circuit-tracer 0.4.1 reads all but the last, so that the last file stands in it twice.
        files = [LAYERS.format(i) for i in (*range(L), L - 1)]
        (folder / "config.yaml").write_text(yaml.safe_dump({**said, "transcoders": files}, sort_keys=False))

    def recognises(self, folder: Path) -> bool:
        """Whether the first file of a layer has the encoder under Gemma Scope's name."""
        try:
            files = _files(folder)
            return bool(files) and "w_enc" in Weights(files[0])
        except Refused:
            return False

    def read(self, folder: Path) -> Imported:
        """Read the files.

        Raises:
            Refused: a file or tensor is missing, damaged, or of another shape.
        """
        files = [Weights(path) for path in _files(folder)]
        D, F = files[0].sizes("w_enc", "d_model, features")
        L = len(files)
        own_layer = len(files[0].shapes.get("w_dec", [])) == 2
        shapes = {
            "w_enc": [D, F],
            "b_enc": [F],
            "threshold": [F],
            "w_dec": [F, D] if own_layer else [F, L, D],
            "b_dec": [D],
        }
        if SKIP in files[0]:
            shapes[SKIP] = [D, D]
        for file in files:
            for name, shape in shapes.items():
                file.get(name, shape)

        def of(name: str, i: int) -> Tensor:
            return files[i].get(name, shapes[name])

        layers = Layers(
            folder=folder,
            n_layers=L,
            d_model=D,
            n_features=F,
            W_enc=lambda i: of("w_enc", i).T,
            b_enc=lambda i: of("b_enc", i),
            b_dec=lambda i: of("b_dec", i),
            threshold=lambda i: of("threshold", i),
            W_skip=(lambda i: of(SKIP, i)) if SKIP in shapes else None,
            rows=(lambda i: Rows([of("w_dec", i)[:, None]]))
            if own_layer
            else (lambda i: Rows([of("w_dec", i)[:, i:]])),
            own_layer=own_layer,
        )
        model, hooks = _described(folder)
        numbers = [int(re.findall(r"\d+", str(file.path.relative_to(folder)))[0]) for file in files]
        if own_layer and numbers != list(range(L)):  # a cross-layer transcoder has all of them: `w_dec` has L targets
            model["layers"] = numbers
        kind = f"Gemma Scope 2 {'transcoders of one layer each' if own_layer else 'cross-layer transcoder'}"
        size = sum(file.path.stat().st_size for file in files)
        return layers.imported(kind, {"name": "jumprelu"}, model, size, hooks=hooks)


def _files(folder: Path) -> list[Path]:
    """The layers' files, in order.

    Raises:
        Refused: two are of one layer.
    """
    files = numbered(folder, LAYERS) or numbered(folder, "layer_{}.safetensors")
    if files:
        return files
    inner = [path / "params.safetensors" for path in numbered(folder, FOLDERS)]
    return [path for path in inner if path.is_file()]


def _described(folder: Path) -> tuple[dict[str, Any], dict[str, str | None]]:
    """The language model, as in `[model]`, and the hooks, from `config.yaml` or Gemma Scope's own `config.json`."""
    _, said = described(folder, "config.yaml", "config.json")
    name = text(said.get("model_name"))
    hooks = {"input": text(said.get("feature_input_hook")), "output": text(said.get("feature_output_hook"))}
    return ({} if name is None else {"path": name}), hooks

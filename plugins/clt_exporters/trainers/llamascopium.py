"""Checkpoints of llamascopium (OpenMOSS): `config.json` and `sae_weights.safetensors` or `.pt`.

| tensor of a cross-layer transcoder (`sae_type` "clt") | shape |
| --- | --- |
| `W_E`, `b_E` | [L, D, F], [L, F] |
| `W_D.t`, of target layer t from all layers up to it | [t + 1, F, D] |
| `b_D.t` | [D] |
| `activation_function.log_jumprelu_threshold`, of jumprelu | [L, F] |
| `dataset_average_activation_norm.HOOK`, where `norm_activation` is "dataset-wise" | [] |

With `sparsity_include_decoder_norm` features are compared by their value times ‖decoder‖. `layertopk` keeps `top_k`
features of all layers together, `topk` of each layer. (llamascopium 2.0, `models/clt.py`.)

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt_exporters.reading.files import Weights, described, whole
from clt_exporters.reading.layers import Layers
from clt_exporters.reading.on_disk import Rows
from clt_exporters.reading.pickled import Pickled
from clt_plugins import Imported, Refused

NAMES = ("sae_weights.safetensors", "sae_weights.pt", "checkpoints/final.safetensors", "checkpoints/final.pt")
"""Where its own loader looks for the weights, in this order."""
TOPK = {
    "topk": ("topk", "layer"),
    "layertopk": ("topk", "global"),
    "batchtopk": ("batchtopk", "layer"),
    "batchlayertopk": ("batchtopk", "global"),
}
"""`act_fn` -> the activation and its scope."""
THRESHOLD = "activation_function.log_jumprelu_threshold"


class Llamascopium:
    """Reads the checkpoint."""

    def recognises(self, folder: Path) -> bool:
        """Whether weights are there under its names, and a configuration that says what they are."""
        if not any((folder / name).exists() for name in (*NAMES, "sae_weights.dcp")):
            return False
        try:
            return "sae_type" in described(folder, "config.json")[1]
        except Refused:
            return False

    def read(self, folder: Path) -> Imported:
        """Read the checkpoint.

        Raises:
            Refused: a file or tensor is missing, damaged or of another shape; or it normalises each token, or is no
                cross-layer transcoder.
        """
        path, said = described(folder, "config.json")
        if said["sae_type"] != "clt":
            raise Refused(path, f"a {said['sae_type']!r}: of llamascopium's only cross-layer transcoders can be loaded")
        file = _weights(folder)
        L, D, F = file.sizes("W_E", "layers, d_model, features")
        file.get("b_E", [L, F])
        for target in range(L):
            file.get(f"W_D.{target}", [target + 1, F, D])
            file.get(f"b_D.{target}", [D])

        def rows(source: int) -> Rows:
            pieces = [file.get(f"W_D.{t}", [t + 1, F, D])[source][:, None] for t in range(source, L)]
            return Rows(pieces)

        by_norm = said.get("sparsity_include_decoder_norm", True)
        hooks = _hooks(said, path, L)
        scales = _scales(said, path, file, hooks, D)
        layers = Layers(
            folder=folder,
            n_layers=L,
            d_model=D,
            n_features=F,
            W_enc=lambda i: file.get("W_E", [L, D, F])[i].T,
            b_enc=lambda i: file.get("b_E", [L, F])[i],
            b_dec=lambda i: file.get(f"b_D.{i}", [D]),
            threshold=_threshold(file, rows, by_norm, L, F) if said.get("act_fn") == "jumprelu" else None,
            rows=rows,
            input_scale=scales.get("input"),
            target_scale=scales.get("output"),
        )
        names = {side: _within_block(of_layers) for side, of_layers in hooks.items()}
        kind = f"checkpoint of llamascopium, {said.get('act_fn')}"
        return layers.imported(kind, _activation(said, path, by_norm), {}, file.path.stat().st_size, hooks=names)


def _weights(folder: Path) -> Weights | Pickled:
    """The file of the weights.

    Raises:
        Refused: there is none that can be read.
    """
    path = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    if path is None:
        raise Refused(folder, "its weights are a distributed checkpoint (.dcp): save them as .safetensors to load them")
    return Weights(path) if path.suffix == ".safetensors" else Pickled(path, "sae")


def _activation(said: Mapping[str, Any], path: Path, by_norm: bool) -> dict[str, Any]:
    """The table `[activation]`."""
    name = said.get("act_fn", "relu")
    if name in ("relu", "jumprelu"):
        return {"name": name}
    if name not in TOPK:
        raise Refused(path, f"unknown act_fn {name!r}")
    ours, scope = TOPK[name]
    k = whole(said.get("top_k"), path, "top_k")
    return {"name": ours, "k": k, "scope": scope, "ranking": "norm" if by_norm else "raw"}


def _threshold(
    file: Weights | Pickled, rows: Callable[[int], Rows], by_norm: bool, L: int, F: int
) -> Callable[[int], Tensor]:
    """Thresholds of pre-activations, [F] of a layer: those of pre-activation x norm are divided by the norm."""

    def of_layer(layer: int) -> Tensor:
        threshold = file.get(THRESHOLD, [L, F])[layer].float().exp()
        if not by_norm:
            return threshold
        squares = sum(part.float().square().sum((1, 2)) for part in rows(layer).parts)
        assert isinstance(squares, Tensor)
        # A feature that writes nothing is never above its threshold; how high that is makes no difference then.
        return threshold / squares.sqrt().clamp(min=torch.finfo(torch.float32).tiny)

    file.get(THRESHOLD, [L, F])
    return of_layer


def _hooks(said: Mapping[str, Any], path: Path, n_layers: int) -> dict[str, list[str]]:
    """The names of the hooks of all layers, by side."""
    hooks = {"input": said.get("hook_points_in"), "output": said.get("hook_points_out")}
    for side, names in hooks.items():
        if not isinstance(names, list) or len(names) != n_layers or not all(isinstance(n, str) for n in names):
            key = {"input": "hook_points_in", "output": "hook_points_out"}[side]
            raise Refused(path, f"{key} must be {n_layers} names, one for each layer")
    return hooks  # type: ignore[return-value]


def _scales(
    said: Mapping[str, Any], path: Path, file: Weights | Pickled, hooks: Mapping[str, list[str]], d_model: int
) -> dict[str, Tensor]:
    """What inputs and outputs are divided by, by side, so that their mean norm is sqrt(D).

    Raises:
        Refused: they differ from token to token, or are missing.
    """
    method = said.get("norm_activation", "dataset-wise")
    if method == "inference":  # folded into the weights
        return {}
    if method != "dataset-wise":
        raise Refused(path, f"norm_activation is {method!r}: only 'dataset-wise' and 'inference' can be loaded")
    scales = {}
    for side, names in hooks.items():
        norms = torch.stack([file.get(f"dataset_average_activation_norm.{name}", []).float() for name in names])
        if not bool(((norms > 0) & norms.isfinite()).all()):
            raise Refused(file.path, f"dataset_average_activation_norm must be above 0, got {norms.tolist()}")
        scales[side] = norms / d_model**0.5
    return scales


def _within_block(names: list[str]) -> str | None:
    """ "hook_resid_mid" of "blocks.0.hook_resid_mid", ...; None where the layers differ, or are not 0, 1, ..."""
    matches = [re.fullmatch(rf"blocks\.{i}\.(.+)", name) for i, name in enumerate(names)]
    inner = {match[1] if match is not None else None for match in matches}
    return inner.pop() if len(inner) == 1 else None

"""Reading checkpoints of crosslayer-coding: untied and tied, single, or merged from tensor-parallel ranks.

A checkpoint is a safetensors file with a `cfg.json` beside it or in the folder above; `norm_stats.json`, which that
library leaves with its activation data set, is needed beside it where activations are normalised by their statistics.

Merged ranks may have padded the features to a multiple of their number, and repeat the thresholds rank by rank: what
is beyond `num_features` is cut off.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from clt_exporters.tensors import read, shapes
from clt_plugins import Imported, Refused

EPSILON = 1e-6
OLD_METHODS = {
    "auto": "mean_std",
    "estimated_mean_std": "mean_std",
    "auto_sqrt_d_model": "sqrt_d_model",
    "estimated_mean_std_sqrt_d_model": "sqrt_d_model",
}
WEIGHTS = ("model.safetensors", "clt_checkpoint_latest.safetensors", "clt.safetensors")


@attrs.frozen
class Files:
    """Where a checkpoint's parts are."""

    weights: Path
    config: Path
    statistics: Path | None


def reference_files(place: Path) -> Files | None:
    """The parts of a checkpoint at a folder or file; None if it is none."""
    folder = place.parent if place.suffix == ".safetensors" else place
    config = next((path for path in (folder / "cfg.json", folder.parent / "cfg.json") if path.is_file()), None)
    if config is None:
        return None
    if place.suffix == ".safetensors":
        weights: Path | None = place if place.is_file() else None
    else:
        numbered = sorted(folder.glob("clt_checkpoint_*.safetensors"))
        known = [folder / name for name in WEIGHTS if (folder / name).is_file()] or numbered[-1:]
        weights = known[0] if known else None
    try:
        about = json.loads(config.read_text())
    except (OSError, ValueError):
        return None
    if weights is None or not isinstance(about, dict) or not {"num_features", "num_layers", "d_model"} <= about.keys():
        return None
    beside = (folder / "norm_stats.json", config.parent / "norm_stats.json")
    return Files(weights, config, next((path for path in beside if path.is_file()), None))


def read_reference(place: Path) -> Imported:
    """Read a checkpoint.

    Raises:
        ValueError: it is incomplete, needs statistics that are not there, or skips between layers.
    """
    files = reference_files(place)
    assert files is not None, "recognised before"
    about = json.loads(files.config.read_text())
    checkpoint = Checkpoint(files, about)
    tying, settings = checkpoint.tying()
    return Imported(
        kind=f"crosslayer-coding checkpoint, {about.get('activation_fn', 'jumprelu')}, decoder {tying}",
        n_layers=about["num_layers"],
        d_model=about["d_model"],
        n_features=about["num_features"],
        activation=_activation(about, files.config),
        tying={"name": tying, **settings},
        model={"path": about["model_name"]} if about.get("model_name") else {},
        tensor=checkpoint.get,
    )


def _activation(about: Mapping[str, Any], config: Path) -> dict[str, Any]:
    name = about.get("activation_fn", "jumprelu")
    if name in ("relu", "jumprelu"):
        return {"name": name}
    if name not in ("topk", "batchtopk"):
        raise Refused(config, f"unknown activation_fn {name!r}")
    k = about.get(f"{name}_k")
    if k is None:
        raise Refused(config, f"{name}_k is missing")
    if about.get("topk_mode", "global") == "per_layer":
        return {"name": name, "k": k, "scope": "layer", "ranking": "raw"}
    return {"name": name, "k": k, "scope": "global", "ranking": "zscore"}


class Checkpoint:
    """The tensors by our names."""

    def __init__(self, files: Files, about: Mapping[str, Any]):
        self.files, self.about = files, about
        self.n_layers, self.n_features, self.width = about["num_layers"], about["num_features"], about["d_model"]
        self.shapes = shapes(files.weights)
        self.untied = about.get("decoder_tying", "none") == "none"
        method = about.get("normalization_method", "none")
        self.method = OLD_METHODS.get(method, method)
        if about.get("sqrt_d_model_normalize"):
            self.method = "sqrt_d_model"
        self.statistics = self._statistics()

    def tying(self) -> tuple[str, dict[str, Any]]:
        """The name of the tying, and its settings."""
        skip = bool(self.about.get("skip_connection", False))
        if self.untied:
            return "untied", {"skip": skip}
        return self.about["decoder_tying"], {
            "feature_offset": bool(self.about.get("enable_feature_offset", False)),
            "feature_scale": bool(self.about.get("enable_feature_scale", False)),
            "skip": skip,
        }

    def get(self, name: str) -> Tensor | None:
        """A tensor by our name.

        Raises:
            ValueError: what it is made of is missing or of another shape.
        """
        L, F, D = self.n_layers, self.n_features, self.width
        each = range(L)
        if name.startswith("normaliser."):
            return self._normaliser(name.removeprefix("normaliser."))
        if name == "W_enc":
            return torch.stack([self._read(f"encoder_module.encoders.{i}.weight", [F, D]) for i in each])
        if name == "b_enc":
            return torch.stack([self._read(f"encoder_module.encoders.{i}.bias_param", [F]) for i in each])
        if name == "log_threshold":
            return self._read("theta_manager.log_threshold", [L, F])
        if name.startswith("W_dec."):
            source = int(name.removeprefix("W_dec."))
            pairs = [f"decoder_module.decoders.{source}->{target}.weight" for target in range(source, L)]
            return torch.stack([self._read(pair, [D, F]).T for pair in pairs], 1)
        if name == "W_dec":
            return torch.stack([self._read(f"decoder_module.decoders.{i}.weight", [D, F]).T for i in each])
        if name in ("feature_offset", "feature_scale"):
            return torch.stack([self._read(self._moved(f"{name}.{i}"), [F]) for i in each])
        if name == "W_skip":
            return torch.stack([self._skip(target) for target in each])
        assert name == "b_dec", name
        return torch.stack([self._bias(target) for target in each])

    def _moved(self, name: str) -> str:
        """Older checkpoints keep offsets and scales with the encoder."""
        new, old = f"decoder_module.{name}", f"encoder_module.{name}"
        return old if old in self.shapes and new not in self.shapes else new

    def _bias(self, target: int) -> Tensor:
        if self.untied:
            names = [f"{source}->{target}" for source in range(target + 1)]
        elif self.about["decoder_tying"] == "per_source":
            names = [str(source) for source in range(target + 1)]
        else:
            names = [str(target)]
        parts = [self._read(f"decoder_module.decoders.{each}.bias_param", [self.width]).double() for each in names]
        return torch.stack(parts).sum(0).float()

    def _skip(self, target: int) -> Tensor:
        shape = [self.width, self.width]
        if not self.untied:
            return self._read(f"decoder_module.skip_weights.{target}", shape).T
        for source in range(target):
            if bool(self._read(f"decoder_module.skip_weights.{source}->{target}", shape).any()):
                raise Refused(
                    self.files.weights,
                    f"skips from layer {source} to layer {target}: only a layer's own input can be skipped from here",
                )
        return self._read(f"decoder_module.skip_weights.{target}->{target}", shape).T

    def _read(self, name: str, expected: list[int]) -> Tensor:
        found = self.shapes.get(name)
        if found is None:
            raise Refused(self.files.weights, f"lacks tensor {name!r}")
        padded = len(found) == len(expected) and all(
            has == wants or (wants == self.n_features and has > wants)
            for has, wants in zip(found, expected, strict=True)
        )
        if not padded:
            raise Refused(self.files.weights, f"tensor {name!r} is {found}, expected {expected}")
        return read(self.files.weights, name)[tuple(slice(size) for size in expected)].float()

    def _statistics(self) -> dict[str, Tensor]:
        if self.method in ("none", "sqrt_d_model"):
            return {}
        if self.method != "mean_std":
            raise Refused(self.files.config, f"unknown normalization_method {self.method!r}")
        if self.files.statistics is None:
            raise Refused(
                self.files.config,
                "normalization_method is mean_std, but there is no norm_stats.json beside it: "
                "copy it from the activation data set that it was trained on",
            )
        table = json.loads(self.files.statistics.read_text())
        found = {}
        for side in ("inputs", "targets"):
            for kind in ("mean", "std"):
                try:
                    rows = [table[str(layer)][side][kind] for layer in range(self.n_layers)]
                    found[f"{side}.{kind}"] = torch.tensor(rows, dtype=torch.float64).view(self.n_layers, self.width)
                except (KeyError, TypeError, ValueError, RuntimeError) as error:
                    raise Refused(
                        self.files.statistics, f"{side}.{kind} is not there for {self.n_layers} layers of {self.width}"
                    ) from error
        return found

    def _normaliser(self, name: str) -> Tensor | None:
        shape = self.n_layers, self.width
        if self.method == "sqrt_d_model" and name.endswith("_scale"):
            return torch.full(shape, self.width**-0.5)
        if self.method != "mean_std":
            return None
        if name == "target_variance":
            return self.statistics["targets.std"].square().mean(1)
        side, kind = name.split("_")
        if kind == "shift":
            return self.statistics[f"{side}s.mean"]
        return self.statistics[f"{side}s.std"] + EPSILON

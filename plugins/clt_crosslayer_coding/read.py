"""Reading checkpoints of crosslayer-coding: untied and tied, of one process, or merged from tensor-parallel ranks.

A checkpoint is a safetensors file with a `cfg.json` beside it or in the folder above. If activations are normalised
by statistics, `norm_stats.json` is needed too; the library leaves it with the activation data set.

Merged ranks may have padded the features to a multiple of the number of ranks, and may repeat the thresholds once per
rank: what is beyond `num_features` is cut off.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from clt_crosslayer_coding.statistics import EPSILON, read_statistics
from clt_plugins import Imported, Refused, load_json, read_tensor, tensor_shapes

OLD_METHODS = {
    "auto": "mean_std",
    "estimated_mean_std": "mean_std",
    "auto_sqrt_d_model": "sqrt_d_model",
    "estimated_mean_std_sqrt_d_model": "sqrt_d_model",
}
"""Names of normalisations in older checkpoints."""
WEIGHTS = ("model.safetensors", "clt_checkpoint_latest.safetensors", "clt.safetensors")
"""Files that are preferred to numbered checkpoints."""
SIZES = ("num_features", "num_layers", "d_model")


@attrs.frozen
class Files:
    """The files of a checkpoint."""

    weights: Path
    config: Path
    statistics: Path | None


def find_files(path: Path) -> Files | None:
    """The files of a checkpoint; None if there is none.

    Args:
        path: a folder or a safetensors file.
    """
    folder = path.parent if path.suffix == ".safetensors" else path
    folders = (folder, folder.parent)
    config = next((each / "cfg.json" for each in folders if (each / "cfg.json").is_file()), None)
    weights = _weights(folder) if folder == path else path
    if config is None or weights is None or not weights.is_file():
        return None
    try:
        settings = load_json(config)
    except Refused:
        return None
    if not isinstance(settings, dict) or not settings.keys() >= set(SIZES):
        return None
    beside = (folder / "norm_stats.json", config.parent / "norm_stats.json")
    return Files(weights, config, next((each for each in beside if each.is_file()), None))


def _weights(folder: Path) -> Path | None:
    """The weights in a folder: by name, else of the numbered checkpoints the one of the last step."""
    named = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    numbered = sorted(folder.glob("clt_checkpoint_*.safetensors"), key=_step)
    return named[0] if named else numbered[-1] if numbered else None


def _step(checkpoint: Path) -> int:
    """The step of `clt_checkpoint_STEP.safetensors`; -1 of another name."""
    step = checkpoint.stem.removeprefix("clt_checkpoint_")
    return int(step) if step.isdecimal() else -1


def read_checkpoint(path: Path) -> Imported:
    """Read a checkpoint.

    Raises:
        Refused: it is incomplete, its statistics are missing, or it has skip paths between layers.
    """
    files = find_files(path)
    assert files is not None, "`recognises` comes first"
    settings = load_json(files.config)
    for name in SIZES:
        if type(settings[name]) is not int or settings[name] < 1:
            raise Refused(files.config, f"{name} must be a whole number above 0, got {settings[name]!r}")
    checkpoint = Checkpoint(files, settings)
    checkpoint.check_sizes()
    tying = checkpoint.tying()
    return Imported(
        kind=f"crosslayer-coding checkpoint, {settings.get('activation_fn', 'jumprelu')}, decoder {tying['name']}",
        n_layers=settings["num_layers"],
        d_model=settings["d_model"],
        n_features=settings["num_features"],
        activation=_activation(settings, files.config),
        tying=tying,
        model={"path": settings["model_name"]} if settings.get("model_name") else {},
        tensor=checkpoint.get,
    )


def _activation(settings: Mapping[str, Any], config: Path) -> dict[str, Any]:
    """The table `[activation]`."""
    name = settings.get("activation_fn", "jumprelu")
    if name in ("relu", "jumprelu"):
        return {"name": name}
    if name not in ("topk", "batchtopk"):
        raise Refused(config, f"unknown activation_fn {name!r}")
    k = settings.get(f"{name}_k")
    if k is None:
        raise Refused(config, f"{name}_k is missing")
    if settings.get("topk_mode", "global") == "per_layer":
        return {"name": name, "k": k, "scope": "layer", "ranking": "raw"}
    return {"name": name, "k": k, "scope": "global", "ranking": "zscore"}


class Checkpoint:
    """A checkpoint's tensors by the engine's names.

    Raises:
        Refused: the statistics are missing, or the normalisation is unknown.
    """

    def __init__(self, files: Files, settings: Mapping[str, Any]):
        self.files, self.settings = files, settings
        self.n_layers, self.n_features = settings["num_layers"], settings["num_features"]
        self.d_model = settings["d_model"]
        self.shapes = tensor_shapes(files.weights)
        self.tied = settings.get("decoder_tying", "none")
        method = settings.get("normalization_method", "none")
        self.method = OLD_METHODS.get(method, method)
        if settings.get("sqrt_d_model_normalize"):
            self.method = "sqrt_d_model"
        self.statistics = self._statistics()

    def check_sizes(self) -> None:
        """Refuse sizes that the weights do not have, before anything is allocated for them."""
        L, F, D = self.n_layers, self.n_features, self.d_model
        if len(self.shapes) < L:
            raise Refused(self.files.config, f"num_layers is {L}, and the weights are {len(self.shapes)} tensors")
        name = "encoder_module.encoders.0.weight"
        shape = self.shapes.get(name)
        if shape is not None and (len(shape) != 2 or shape[0] < F or shape[1] != D):
            raise Refused(
                self.files.config, f"num_features and d_model are {F} and {D}, but tensor {name!r} is {shape}"
            )

    def tying(self) -> dict[str, Any]:
        """The table `[tying]`."""
        skip = bool(self.settings.get("skip_connection", False))
        if self.tied == "none":
            return {"name": "untied", "skip": skip}
        return {
            "name": self.tied,
            "feature_offset": bool(self.settings.get("enable_feature_offset", False)),
            "feature_scale": bool(self.settings.get("enable_feature_scale", False)),
            "skip": skip,
        }

    def get(self, name: str) -> Tensor | None:
        """A tensor by the engine's name; None for a statistic that the normalisation does not have.

        Raises:
            Refused: a tensor that it is made of is missing or of another shape.
        """
        L, F, D = self.n_layers, self.n_features, self.d_model
        layers = range(L)
        if name.startswith("normaliser."):
            return self._normaliser(name.removeprefix("normaliser."))
        if name == "W_enc":
            return torch.stack([self._read(f"encoder_module.encoders.{i}.weight", [F, D]) for i in layers])
        if name == "b_enc":
            return torch.stack([self._read(f"encoder_module.encoders.{i}.bias_param", [F]) for i in layers])
        if name == "log_threshold":
            return self._read("theta_manager.log_threshold", [L, F])
        if name.startswith("W_dec."):
            source = int(name.removeprefix("W_dec."))
            pairs = [f"decoder_module.decoders.{source}->{target}.weight" for target in range(source, L)]
            return torch.stack([self._read(pair, [D, F]).T for pair in pairs], 1)
        if name == "W_dec":
            return torch.stack([self._read(f"decoder_module.decoders.{i}.weight", [D, F]).T for i in layers])
        if name in ("feature_offset", "feature_scale"):
            return torch.stack([self._read(self._module_of(f"{name}.{i}"), [F]) for i in layers])
        if name == "W_skip":
            return torch.stack([self._skip(target) for target in layers])
        assert name == "b_dec", name
        return torch.stack([self._bias(target) for target in layers])

    def _module_of(self, name: str) -> str:
        """The full name of an offset or scale: older checkpoints keep them with the encoder."""
        new, old = f"decoder_module.{name}", f"encoder_module.{name}"
        return old if old in self.shapes and new not in self.shapes else new

    def _bias(self, target: int) -> Tensor:
        """The sum of all biases that a target layer gets."""
        names = {
            "none": [f"{source}->{target}" for source in range(target + 1)],
            "per_source": [str(source) for source in range(target + 1)],
        }.get(self.tied, [str(target)])
        parts = [self._read(f"decoder_module.decoders.{name}.bias_param", [self.d_model]).double() for name in names]
        return torch.stack(parts).sum(0).float()

    def _skip(self, target: int) -> Tensor:
        """The skip path of a target layer."""
        shape = [self.d_model, self.d_model]
        if self.tied != "none":
            return self._read(f"decoder_module.skip_weights.{target}", shape).T
        for source in range(target):
            if bool(self._read(f"decoder_module.skip_weights.{source}->{target}", shape).any()):
                raise Refused(
                    self.files.weights,
                    f"has a skip path from layer {source} to layer {target}: only skip paths within a layer can be "
                    "loaded",
                )
        return self._read(f"decoder_module.skip_weights.{target}->{target}", shape).T

    def _read(self, name: str, expected: list[int]) -> Tensor:
        """A tensor in float32, with padded features cut off."""
        shape = self.shapes.get(name)
        if shape is None:
            raise Refused(self.files.weights, f"lacks tensor {name!r}")
        fits = len(shape) == len(expected) and all(
            size == wanted or (wanted == self.n_features and size > wanted)
            for size, wanted in zip(shape, expected, strict=True)
        )
        if not fits:
            raise Refused(self.files.weights, f"tensor {name!r} is {shape}, expected {expected}")
        return read_tensor(self.files.weights, name)[tuple(slice(size) for size in expected)].float()

    def _statistics(self) -> dict[str, Tensor]:
        if self.method in ("none", "sqrt_d_model"):
            return {}
        if self.method != "mean_std":
            raise Refused(self.files.config, f"unknown normalization_method {self.method!r}")
        if self.files.statistics is None:
            raise Refused(
                self.files.config,
                "normalization_method is mean_std, but there is no norm_stats.json beside it: "
                "copy it from the activation data set of the training",
            )
        return read_statistics(self.files.statistics, self.n_layers, self.d_model)

    def _normaliser(self, name: str) -> Tensor | None:
        """A statistic of the normaliser, such as `input_scale`."""
        if self.method == "sqrt_d_model" and name.endswith("_scale"):
            return torch.full((self.n_layers, self.d_model), self.d_model**-0.5)
        if self.method != "mean_std":
            return None
        if name == "target_variance":
            return self.statistics["targets.std"].square().mean(1)
        side, kind = name.split("_")
        return self.statistics[f"{side}s.mean"] if kind == "shift" else self.statistics[f"{side}s.std"] + EPSILON

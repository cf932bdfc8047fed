"""Checkpoints of the library crosslayer-coding (decode-clt), written as SAEDashboard reads them, and read back.

| tensor | shape |
| --- | --- |
| `encoder_module.encoders.L.weight`, `.bias_param` | [F, D], [F] |
| `decoder_module.decoders.S->T.weight`, `.bias_param` (untied); `.L.` (tied) | [D, F], [D] |
| `decoder_module.feature_offset.T`, `feature_scale.T` (tied) | [F] |
| `decoder_module.skip_weights.S->T` (untied), `.T` (tied) | [D, D], applied as x S^T |
| `theta_manager.log_threshold` (jumprelu) | [L, F] |

Every untied pair of layers, and every tied source layer, has a bias of its own there; what counts is their sum for a
target. Weights stand in normalised units; statistics are in `norm_stats.json`.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_exporters import limits
from clt_exporters.hooks import input_hook, model_name, output_hook
from clt_exporters.reference import read_reference, reference_files
from clt_exporters.tensors import write
from clt_plugins import Imported

if TYPE_CHECKING:
    from clt_exporters import CrosslayerCodingConfig
    from clt_plugins import CrossLayerTranscoder

EPSILON = 1e-6
"""What that library adds to standard deviations."""


class CrosslayerCoding:
    """Writes and reads the checkpoint."""

    def __init__(self, config: CrosslayerCodingConfig):
        self.config = config

    def check(self, transcoder: CrossLayerTranscoder) -> list[str]:
        """What the library could not compute of a transcoder that is to be trained."""
        return limits.crosslayer_coding(self.config, limits.Subject.of(transcoder, trained=False))

    def export(self, transcoder: CrossLayerTranscoder, folder: Path) -> None:
        """Write `model.safetensors`, `cfg.json` and, where activations are normalised, `norm_stats.json`.

        Raises:
            ValueError: an activation that the library lacks, or would compute differently; no name of the language
                model, or an unknown hook.
        """
        limits.refuse(limits.crosslayer_coding(self.config, limits.Subject.of(transcoder, trained=True)))
        about: dict[str, Any] = {
            "num_features": transcoder.n_features,
            "num_layers": transcoder.n_layers,
            "d_model": transcoder.d_model,
            "model_name": model_name(self.config.model_name, transcoder.model_described()),
            "clt_dtype": "float32",
            **self._templates(transcoder.model_described()),
            **_activation(transcoder),
        }
        tensors = {name: value.detach().cpu() for name, value in transcoder.tensors().items()}
        out: dict[str, Tensor] = {}
        for i in range(transcoder.n_layers):
            out[f"encoder_module.encoders.{i}.weight"] = tensors["W_enc"][i]
            out[f"encoder_module.encoders.{i}.bias_param"] = tensors["b_enc"][i]
        if about["activation_fn"] == "jumprelu":
            activation: Any = transcoder.activation
            out["theta_manager.log_threshold"] = activation.threshold().detach().cpu().log()
        decoder, tying = _decoder(transcoder, tensors)
        method, statistics = _statistics(tensors, transcoder.normalisation)
        about.update(tying, normalization_method=method)
        write(folder / "model.safetensors", {**out, **decoder}, "float32")
        (folder / "cfg.json").write_text(json.dumps(about, indent=2) + "\n")
        if statistics:
            (folder / "norm_stats.json").write_text(json.dumps(statistics) + "\n")

    def _templates(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Where activations come from, in both ways of naming."""
        tl_input = self.config.tl_input_template or f"blocks.{{}}.{input_hook(None, model)}"
        return {
            "mlp_input_template": model.get("inputs"),
            "mlp_output_template": model.get("outputs"),
            "tl_input_template": tl_input,
            "tl_output_template": f"blocks.{{}}.{output_hook(None, model)}",
        }

    def recognises(self, folder: Path) -> bool:
        return reference_files(folder) is not None

    def read(self, folder: Path) -> Imported:
        """Read a checkpoint: see `reference.read_reference`."""
        return read_reference(folder)


def _activation(transcoder: CrossLayerTranscoder) -> dict[str, Any]:
    """The settings of the activation."""
    name = transcoder.choices["activation"].name
    activation: Any = transcoder.activation
    return {"activation_fn": name, **({f"{name}_k": activation.k} if name in limits.BY_RANK else {})}


def _decoder(
    transcoder: CrossLayerTranscoder, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The decoder's tensors, and its settings."""
    layers, width = transcoder.n_layers, transcoder.d_model
    tied = transcoder.choices["tying"].name
    skip = "W_skip" in tensors
    about = {
        "decoder_tying": tied if tied in ("per_source", "per_target") else "none",
        "enable_feature_offset": "feature_offset" in tensors,
        "enable_feature_scale": "feature_scale" in tensors,
        "skip_connection": skip,
    }
    bias = tensors["b_dec"].float()
    out: dict[str, Tensor] = {}
    if about["decoder_tying"] == "none":
        for source in range(layers):
            rows = transcoder.tying.expand(source).cpu()
            for target in range(source, layers):
                pair = f"{source}->{target}"
                # One bias per target is enough; the dashboard reads that of the layer's own decoder.
                out[f"decoder_module.decoders.{pair}.weight"] = rows[:, target - source].T
                out[f"decoder_module.decoders.{pair}.bias_param"] = bias[target] * (source == target)
                if skip:
                    own = tensors["W_skip"][target].T if source == target else torch.zeros(width, width)
                    out[f"decoder_module.skip_weights.{pair}"] = own
        return out, about
    # There, target t of a decoder per source gets the biases of all sources up to t.
    if tied == "per_source":
        bias = bias.double().diff(dim=0, prepend=torch.zeros(1, width, dtype=torch.float64))
    for layer in range(layers):
        out[f"decoder_module.decoders.{layer}.weight"] = tensors["W_dec"][layer].T
        out[f"decoder_module.decoders.{layer}.bias_param"] = bias[layer]
        for name in ("feature_offset", "feature_scale"):
            if name in tensors:
                out[f"decoder_module.{name}.{layer}"] = tensors[name][layer]
        if skip:
            out[f"decoder_module.skip_weights.{layer}"] = tensors["W_skip"][layer].T
    return out, about


def _statistics(tensors: Mapping[str, Tensor], normalisation: str) -> tuple[str, dict[str, Any]]:
    """The normalisation in that library's terms; one scale per layer is a standard deviation about 0."""
    if normalisation in ("none", "sqrt_d_model"):
        return normalisation, {}
    layers = tensors["normaliser.input_shift"].shape[0]
    return "mean_std", {
        str(layer): {
            side: {
                "mean": tensors[f"normaliser.{name}_shift"][layer].tolist(),
                "std": (tensors[f"normaliser.{name}_scale"][layer].double() - EPSILON).tolist(),
            }
            for side, name in (("inputs", "input"), ("targets", "target"))
        }
        for layer in range(layers)
    }

"""Checkpoints of the library crosslayer-coding (decode-clt), written as SAEDashboard reads them.

| tensor | shape |
| --- | --- |
| `encoder_module.encoders.L.weight`, `.bias_param` | [F, D], [F] |
| `decoder_module.decoders.S->T.weight`, `.bias_param` (untied); `.L.` (tied) | [D, F], [D] |
| `decoder_module.feature_offset.T`, `feature_scale.T` (tied) | [F] |
| `decoder_module.skip_weights.S->T` (untied), `.T` (tied) | [D, D], applied as x S^T |
| `theta_manager.log_threshold` (jumprelu) | [L, F] |

There, every untied pair of layers and every tied source layer has its own bias; the outputs depend only on their sum
for each target. Weights are in normalised units; the statistics are in `norm_stats.json`.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_crosslayer_coding import limits
from clt_crosslayer_coding.read import find_files, read_checkpoint
from clt_crosslayer_coding.statistics import write_statistics
from clt_plugins import Faults, Folding, Imported, Thresholded, write_tensors

if TYPE_CHECKING:
    from clt_crosslayer_coding import ExportConfig
    from clt_plugins import CrossLayerTranscoder


class CrosslayerCoding:
    """Writes and reads the checkpoint."""

    def __init__(self, config: ExportConfig):
        self.config = config

    def check(self, transcoder: CrossLayerTranscoder) -> list[str]:
        """Complaints about an untrained transcoder."""
        return [str(fault) for fault in limits.of_transcoder(self.config, transcoder)]

    def export(self, transcoder: CrossLayerTranscoder, folder: Path) -> None:
        """Write `model.safetensors`, `cfg.json` and, if activations are normalised, `norm_stats.json`.

        Raises:
            Faults: the library lacks the activation or would compute it differently, the name of the language model is
                missing, or a hook is not known.
        """
        if faults := limits.of_transcoder(self.config, transcoder):
            raise Faults(faults)
        tensors = {name: value.detach().cpu() for name, value in transcoder.tensors().items()}
        folding = transcoder.normaliser.fold()
        method = _method(folding)
        config = {
            "num_features": transcoder.n_features,
            "num_layers": transcoder.n_layers,
            "d_model": transcoder.d_model,
            "model_name": limits.model_name(self.config, transcoder.model_described()),
            "clt_dtype": "float32",
            **self._templates(transcoder.model_described()),
            **_activation(transcoder),
            **_tying(transcoder, tensors),
            "normalization_method": method,
        }
        decoder = _untied if config["decoder_tying"] == "none" else _tied
        out = {**_encoder(transcoder), **decoder(transcoder, tensors)}
        write_tensors(folder / "model.safetensors", out, "float32")
        (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n")
        if method == "mean_std":
            # One scale per layer ("rms", "sqrt_d_model") is a standard deviation about 0, the same for every dimension.
            sides = {"inputs": folding.inputs, "targets": folding.targets}
            write_statistics(
                folder / "norm_stats.json",
                {name: side.shift.cpu() for name, side in sides.items()},
                {name: side.scale.cpu() for name, side in sides.items()},
            )

    def _templates(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Where activations come from, by the names of Hugging Face and of TransformerLens."""
        return {
            "mlp_input_template": model.get("inputs"),
            "mlp_output_template": model.get("outputs"),
            "tl_input_template": self.config.tl_input_template or f"blocks.{{}}.{limits.hook('input', model)}",
            "tl_output_template": f"blocks.{{}}.{limits.hook('output', model)}",
        }

    def recognises(self, folder: Path) -> bool:
        """Whether weights and a `cfg.json` of that library are there."""
        return find_files(folder) is not None

    def read(self, folder: Path) -> Imported:
        """Read a checkpoint: see `read.read_checkpoint`."""
        return read_checkpoint(folder)


def _method(folding: Folding) -> str:
    """The library's name of the normalisation. Its "sqrt_d_model" multiplies by sqrt(D), whatever the activations."""
    sides = folding.inputs, folding.targets
    if any(bool(side.shift.any()) for side in sides):
        return "mean_std"
    fixed = {"none": 1.0, "sqrt_d_model": folding.inputs.shift.shape[1] ** -0.5}
    for method, scale in fixed.items():
        if all(bool((side.scale == torch.tensor(scale).to(side.scale)).all()) for side in sides):
            return method
    return "mean_std"


def _activation(transcoder: CrossLayerTranscoder) -> dict[str, Any]:
    """The activation's settings."""
    name = transcoder.choices["activation"].name
    activation: Any = transcoder.activation
    return {"activation_fn": name, **({f"{name}_k": activation.k[0]} if name in limits.TOPK else {})}


def _tying(transcoder: CrossLayerTranscoder, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The decoder's settings."""
    name = transcoder.choices["tying"].name
    return {
        "decoder_tying": name if name in ("per_source", "per_target") else "none",
        "enable_feature_offset": "feature_offset" in tensors,
        "enable_feature_scale": "feature_scale" in tensors,
        "skip_connection": "W_skip" in tensors,
    }


def _encoder(transcoder: CrossLayerTranscoder) -> dict[str, Tensor]:
    """The encoder's tensors, and the thresholds of JumpReLU."""
    out: dict[str, Tensor] = {}
    for layer in range(transcoder.n_layers):
        weight, bias = transcoder.encoder.expand(layer, transcoder.tying)
        out[f"encoder_module.encoders.{layer}.weight"] = weight.cpu()
        out[f"encoder_module.encoders.{layer}.bias_param"] = bias.cpu()
    if transcoder.choices["activation"].name == "jumprelu":
        assert isinstance(transcoder.activation, Thresholded)
        out["theta_manager.log_threshold"] = transcoder.activation.threshold().detach().cpu().log()
    return out


def _untied(transcoder: CrossLayerTranscoder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a decoder with a matrix for each pair of layers."""
    bias = tensors["b_dec"].float()
    out: dict[str, Tensor] = {}
    for source in range(transcoder.n_layers):
        rows = transcoder.tying.expand(source).cpu()
        for target in range(source, transcoder.n_layers):
            pair = f"{source}->{target}"
            # One bias per target is enough; the dashboard reads that of the layer's own decoder.
            out[f"decoder_module.decoders.{pair}.weight"] = rows[:, target - source].T
            out[f"decoder_module.decoders.{pair}.bias_param"] = bias[target] * (source == target)
            if "W_skip" in tensors:
                skip = tensors["W_skip"][target].T
                out[f"decoder_module.skip_weights.{pair}"] = skip if source == target else torch.zeros_like(skip)
    return out


def _tied(transcoder: CrossLayerTranscoder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a decoder with a matrix for each layer."""
    bias = tensors["b_dec"].float()
    if transcoder.choices["tying"].name == "per_source":
        # There, a target gets the biases of all sources up to it: each source gets what its target adds.
        bias = bias.double().diff(dim=0, prepend=torch.zeros(1, transcoder.d_model, dtype=torch.float64))
    out: dict[str, Tensor] = {}
    for layer in range(transcoder.n_layers):
        out[f"decoder_module.decoders.{layer}.weight"] = tensors["W_dec"][layer].T
        out[f"decoder_module.decoders.{layer}.bias_param"] = bias[layer]
        for name in ("feature_offset", "feature_scale"):
            if name in tensors:
                out[f"decoder_module.{name}.{layer}"] = tensors[name][layer]
        if "W_skip" in tensors:
            out[f"decoder_module.skip_weights.{layer}"] = tensors["W_skip"][layer].T
    return out

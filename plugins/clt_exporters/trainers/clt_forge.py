"""Checkpoints of CLT-Forge: `clt_cfg.json` and `clt_weights.safetensors`, or a file `rankR_...` of each rank.

| tensor | shape |
| --- | --- |
| `W_enc`, `b_enc`, `log_threshold` | [L, D, F], [L, F], [L, F] |
| `W_dec`, `b_dec`: pairs of layers, by source, then by target | [L (L + 1) / 2, F, D], [L (L + 1) / 2, D] |
| the same of transcoders without cross-layer decoders | [L, F, D], [L, D] |
| `estimated_norm_scaling_factor_in`, `_out`: what activations are multiplied by | [L] |

Every pair has a bias; the outputs depend only on their sum for each target. (LLM-Interp/CLT-Forge, `clt.py`.)

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clt_exporters.reading.files import Weights, consecutive, described, text
from clt_exporters.reading.layers import Layers
from clt_exporters.reading.on_disk import Rows
from clt_plugins import Imported, Refused

CONFIG, WEIGHTS, SHARDS = "clt_cfg.json", "clt_weights.safetensors", "rank{}_clt_weights.safetensors"

SIDES = "in", "out"


class CLTForge:
    """Reads the checkpoint."""

    def recognises(self, folder: Path) -> bool:
        """Whether the configuration is there, under its name."""
        return (folder / CONFIG).is_file()

    def read(self, folder: Path) -> Imported:
        """Read the checkpoint.

        Raises:
            Refused: a file or tensor is missing, damaged, or of another shape.
        """
        _, said = described(folder, CONFIG)
        paths = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else consecutive(folder, SHARDS)
        if not paths:
            raise Refused(folder / WEIGHTS, "missing, and there is no file of a rank")
        files = [Weights(path) for path in paths]
        L, D, local = files[0].sizes("W_enc", "layers, d_model, features")
        F = local * len(files)  # ranks have equal shares
        if said.get("d_latent", F) != F:
            stated = f"d_latent is {said['d_latent']}, and the {len(files)} files have {F} features"
            raise Refused(folder / CONFIG, stated)
        n_pairs = L * (L + 1) // 2
        # With one layer both forms are the same.
        own_layer = said.get("cross_layer_decoders") is False
        n_decoders = L if own_layer else n_pairs
        for file in files:
            for name, shape in {
                "W_enc": [L, D, local],
                "b_enc": [L, local],
                "log_threshold": [L, local],
                "W_dec": [n_decoders, local, D],
                "b_dec": [n_decoders, D],
            }.items():
                file.get(name, shape)
        bias = files[0].get("b_dec", [n_decoders, D]).double()
        # All ranks have the same of these.
        scales = [{side: _scale(file, f"estimated_norm_scaling_factor_{side}", L) for side in SIDES} for file in files]

        def joined(name: str, shape: list[int], layer: int, axis: int) -> Tensor:
            return torch.cat([file.get(name, shape)[layer] for file in files], axis)

        def rows(layer: int) -> Rows:
            first = layer if own_layer else layer * L - layer * (layer - 1) // 2
            targets = 1 if own_layer else L - layer
            shards = [file.get("W_dec", [n_decoders, local, D])[first : first + targets] for file in files]
            shards = [shard.transpose(0, 1) for shard in shards]  # [F of the rank, targets, D]
            # Of several ranks the features lie in several files, and are joined in memory.
            return Rows([shards[0] if len(shards) == 1 else torch.cat(shards)])

        def b_dec(target: int) -> Tensor:
            if own_layer:
                return bias[target]
            return torch.stack([bias[s * L - s * (s - 1) // 2 + target - s] for s in range(target + 1)]).sum(0)

        layers = Layers(
            folder=folder,
            n_layers=L,
            d_model=D,
            n_features=F,
            W_enc=lambda i: joined("W_enc", [L, D, local], i, 1).T,
            b_enc=lambda i: joined("b_enc", [L, local], i, 0),
            b_dec=b_dec,
            threshold=lambda i: joined("log_threshold", [L, local], i, 0).float().exp(),
            rows=rows,
            own_layer=own_layer,
            input_scale=1 / scales[0]["in"],
            target_scale=1 / scales[0]["out"],
        )
        model = text(said.get("model_name"))
        size = sum(path.stat().st_size for path in paths)
        kind = f"checkpoint of CLT-Forge{f' of {len(files)} ranks' if len(files) > 1 else ''}"
        hooks = {"input": "ln2.hook_normalized", "output": "hook_mlp_out"}
        return layers.imported(kind, {"name": "jumprelu"}, {} if model is None else {"path": model}, size, hooks=hooks)


def _scale(file: Weights, name: str, n_layers: int) -> Tensor:
    """Factors that are above 0, [L]; 1 where there are none.

    Raises:
        Refused: one is not.
    """
    if name not in file:
        return torch.ones(n_layers)
    factor = file.get(name, [n_layers]).float()
    if not bool(((factor > 0) & factor.isfinite()).all()):
        raise Refused(file.path, f"{name} must be above 0 and finite, got {factor.tolist()}")
    return factor

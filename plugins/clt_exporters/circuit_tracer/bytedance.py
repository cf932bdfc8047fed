"""Folders of ByteDance's cross-layer transcoders: circuit-tracer's files, but TopK and no biases.

| file | tensor | shape |
| --- | --- | --- |
| `W_enc_i.safetensors` | `W_enc_i` | [F, D] |
| `W_dec_i.safetensors` | `W_dec_i`, axis 1 the targets i, i + 1, ... | [F, L - i, D] |
| | `W_dec_norm_i` | [F] |
| `W_dec_norm.safetensors` | `W_dec_norm`, norms of all rows of a feature together | [L, F] |
| `config.json` | `k`: of each token the L k features with the largest activation x norm are kept | |

circuit-tracer itself would read such a folder without the TopK, as ReLU. (Card of ByteDance-Seed/Cross-Layer-TopK-CLT.)

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from pathlib import Path

import attrs

from clt_exporters.circuit_tracer.clt import ENCODERS, is_topk, read_layers
from clt_exporters.reading.files import Weights, described, text, whole
from clt_plugins import Imported, Refused

NORMS = "W_dec_norm.safetensors"
SAMPLE = 64
"""Features of a layer whose stored norms are compared with their rows."""


class ByteDance:
    """Reads the folder."""

    def recognises(self, folder: Path) -> bool:
        """Whether there are encoders under circuit-tracer's name, and norms to rank by or a k."""
        return (folder / ENCODERS.format(0)).is_file() and is_topk(folder)

    def read(self, folder: Path) -> Imported:
        """Read the folder.

        Raises:
            Refused: a file or tensor is missing, damaged or of another shape; k is missing; or the norms are not those
                of the rows, so that other features would be selected.
        """
        path, said = described(folder, "config.json")
        k = whole(said.get("k"), path, "k")
        layers, decoder_bytes = read_layers(folder)
        norms = Weights(folder / NORMS).get("W_dec_norm", [layers.n_layers, layers.n_features]).float()
        for layer in range(layers.n_layers):
            rows = layers.rows(layer).take(slice(SAMPLE)).float().flatten(1).norm(dim=1)
            if bool(((rows - norms[layer, :SAMPLE]).abs() > 0.01 * rows + 1e-6).any()):
                raise Refused(
                    folder / NORMS,
                    f"W_dec_norm of layer {layer} is not the norm of the decoder's rows: other features would be "
                    "selected",
                )
        name = next((text(said.get(key)) for key in ("model_name", "base_model", "model") if text(said.get(key))), None)
        return attrs.evolve(layers, norms=norms).imported(
            "ByteDance folder, TopK",
            {"name": "topk", "k": k * layers.n_layers, "scope": "global", "ranking": "norm"},
            {} if name is None else {"path": name},
            decoder_bytes,
            hooks={"input": "hook_resid_mid", "output": "hook_mlp_out"},
        )

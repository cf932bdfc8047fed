"""Load an export with the library crosslayer-coding itself, and compare its outputs on raw activations with ours.

The library's own activation store reads `norm_stats.json`; it standardises the inputs and restores the outputs.
Runs in an environment with decode-clt; imports nothing of this repository. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from clt.config.clt_config import CLTConfig
from clt.models.clt import CrossLayerTranscoder
from clt.training.data.manifest_activation_store import ManifestActivationStore
from safetensors.torch import load_file


def main(folder: Path, expected: Path) -> None:
    ours = load_file(expected)
    config = CLTConfig.from_json(str(folder / "cfg.json"))
    model = CrossLayerTranscoder(config, process_group=None, device=torch.device("cpu"))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    layers = range(config.num_layers)
    # Only as much of a store as reading the statistics needs.
    store = SimpleNamespace(
        normalization_method=config.normalization_method,
        norm_stats_data=json.loads((folder / "norm_stats.json").read_text()),
        layer_indices=list(layers),
        device=torch.device("cpu"),
        apply_normalization=True,
    )
    ManifestActivationStore._prep_norm(store)
    assert store.apply_normalization, "the library does not use the statistics"
    with torch.no_grad():
        out = model({i: (ours["inputs"][:, i] - store.mean_in[i]) / store.std_in[i] for i in layers})
    decoded = torch.stack([out[i] * store.std_tg[i] + store.mean_tg[i] for i in layers], 1)
    expected_out = ours["decoded"]
    print(json.dumps({"decoded": float((decoded - expected_out).abs().max() / expected_out.abs().max())}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

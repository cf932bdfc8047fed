"""Load an export with the real crosslayer-coding library and compare its outputs with ours, raw in and raw out.

Inputs are standardised, and outputs taken back, by what the library's activation stores make of `norm_stats.json`.
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
    # As much of a store as its reading of the statistics needs.
    store = SimpleNamespace(
        normalization_method=config.normalization_method,
        norm_stats_data=json.loads((folder / "norm_stats.json").read_text()),
        layer_indices=list(layers),
        device=torch.device("cpu"),
        apply_normalization=True,
    )
    ManifestActivationStore._prep_norm(store)
    assert store.apply_normalization, "the library does not take the statistics"
    with torch.no_grad():
        out = model({i: (ours["inputs"][:, i] - store.mean_in[i]) / store.std_in[i] for i in layers})
    found = torch.stack([out[i] * store.std_tg[i] + store.mean_tg[i] for i in layers], 1)
    wanted = ours["decoded"]
    print(json.dumps({"decoded": float((found - wanted).abs().max() / wanted.abs().max())}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

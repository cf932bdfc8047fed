"""Load the folders of an export with the adapter beside them, as custom SAEs of SAEBench, and compare with ours.

Runs in an environment with SAEBench; imports nothing of this repository. Prints one line of JSON.

    python sae_bench_check.py FOLDER inputs-and-outputs.safetensors [CHECKOUT]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def main(folder: Path, expected: Path, checkout: Path) -> None:
    sys.path[:0] = [str(folder), str(checkout)]
    from sae_bench.custom_saes.base_sae import BaseSAE
    from sae_bench_adapter import load

    ours = load_file(expected)
    differences: dict[str, list[float]] = {"features": [], "decoded": []}
    for layer, path in enumerate(sorted(folder.glob("layer_*"))):
        sae = load(path)
        assert isinstance(sae, BaseSAE) and sae.check_decoder_norms() and sae.cfg.hook_layer == layer
        with torch.no_grad():
            features = sae.encode(ours["inputs"][:, layer])
            decoded = sae.decode(features)
        # Each feature is scaled so that its row has norm 1: which are active stays the same.
        differences["features"].append(float(((features != 0) != (ours["features"][:, layer] != 0)).sum()))
        own = ours["own_decoded"][:, layer]
        differences["decoded"].append(float((decoded - own).abs().max() / own.abs().max()))
    print(json.dumps(differences), flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

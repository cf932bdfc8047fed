"""Load the folders of an export with SAELens itself, and compare encodings and reconstructions with ours.

Runs in an environment with sae-lens; imports nothing of this repository. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from sae_lens.saes.sae import SAE
from safetensors.torch import load_file


def main(folder: Path, expected: Path) -> None:
    ours = load_file(expected)
    differences: dict[str, list[float]] = {"features": [], "decoded": []}
    architectures = []
    for layer, layer_folder in enumerate(sorted(folder.glob("layer_*"))):
        sae = SAE.load_from_disk(layer_folder)
        x = ours["inputs"][:, layer]
        with torch.no_grad():
            features = sae.encode(x)
            decoded = sae(x)  # with the skip path, where there is one
        architectures.append(sae.cfg.architecture())
        for name, value in (("features", features), ("decoded", decoded)):
            ours_of_layer = ours["features" if name == "features" else "own_decoded"][:, layer]
            differences[name].append(float((value - ours_of_layer).abs().max() / ours_of_layer.abs().max()))
    print(json.dumps({**differences, "architectures": architectures}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

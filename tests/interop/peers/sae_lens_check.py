"""Load the folders of an export with the real SAELens and compare encodings and reconstructions with ours.

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
    found: dict[str, list[float]] = {"features": [], "decoded": []}
    architectures = []
    for layer, place in enumerate(sorted(folder.glob("layer_*"))):
        sae = SAE.load_from_disk(place)
        x = ours["inputs"][:, layer]
        with torch.no_grad():
            features = sae.encode(x)
            decoded = sae.decode(features)
        architectures.append(sae.cfg.architecture())
        for name, value in (("features", features), ("decoded", decoded)):
            wanted = ours["features" if name == "features" else "own_decoded"][:, layer]
            found[name].append(float((value - wanted).abs().max() / wanted.abs().max()))
    print(json.dumps({**found, "architectures": architectures}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

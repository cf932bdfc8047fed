"""Load an export with the real crosslayer-coding library and compare its outputs with ours, in normalised units.

Runs in an environment with decode-clt; imports nothing of this repository. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from clt.config.clt_config import CLTConfig
from clt.models.clt import CrossLayerTranscoder
from safetensors.torch import load_file


def main(folder: Path, expected: Path) -> None:
    ours = load_file(expected)
    config = CLTConfig.from_json(str(folder / "cfg.json"))
    model = CrossLayerTranscoder(config, process_group=None, device=torch.device("cpu"))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    layers = range(config.num_layers)
    with torch.no_grad():
        out = model({layer: ours["normalised_inputs"][:, layer] for layer in layers})
    found = torch.stack([out[layer] for layer in layers], 1)
    wanted = ours["normalised_decoded"]
    print(json.dumps({"decoded": float((found - wanted).abs().max() / wanted.abs().max())}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

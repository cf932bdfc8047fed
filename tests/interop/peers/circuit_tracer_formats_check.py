"""Load a transcoder set, or files as Gemma Scope 2 has them, with circuit-tracer itself, and compare its numbers with
ours.

Runs in an environment with circuit-tracer; imports nothing of this repository. Prints one line of JSON.

    python circuit_tracer_formats_check.py FOLDER inputs-and-outputs.safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import yaml
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub, load_transcoders
from safetensors.torch import load_file


def main(folder: Path, expected: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    if "transcoders" in config:
        # As of a repository with this name, whose files have been downloaded.
        config |= {"repo_id": "user/gemma-scope-2-mine", "scan": "mine"}
        config["transcoders"] = [str(folder / name) for name in config["transcoders"]]
        transcoder = load_transcoders(config, torch.device("cpu"), torch.float32, lazy_decoder=False)
    else:
        # For an absolute path nothing is downloaded.
        transcoder, _ = load_transcoder_from_hub(str(folder.resolve()), torch.device("cpu"), torch.float32)
    ours = load_file(expected)
    x = ours["inputs"].transpose(0, 1)
    with torch.no_grad():
        features = transcoder.encode(x)
        sparse = features.to_sparse() if "transcoders" in config else features
        decoded = transcoder.decode(sparse, x)
    computed = {"features": features, "decoded": decoded}
    differences = {
        name: float((value.transpose(0, 1) - ours[name]).abs().max() / ours[name].abs().max())
        for name, value in computed.items()
    }
    skip = transcoder.skip_connection
    print(json.dumps({**differences, "kind": type(transcoder).__name__, "skip": bool(skip)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

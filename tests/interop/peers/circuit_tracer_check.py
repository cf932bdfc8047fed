"""Load a folder with circuit-tracer itself, compare its numbers with ours, and trace a prompt with one of its backends.

Runs in an environment with circuit-tracer; of this repository it uses `tracer.py`, the file that the stage `circuits`
runs there. Prints one line of JSON.

    python circuit_tracer_check.py FOLDER --expected inputs-and-outputs.safetensors --model MODEL --backend nnsight
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "plugins" / "clt_circuits"))
import tracer


def compare(folder: Path, expected: Path) -> dict[str, Any]:
    """Encode and decode raw inputs with all of its loaders that read the folder; the largest differences, relative to
    the largest value."""
    from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

    loaded = {"traced": tracer.load_transcoder(str(folder), "/checked", "cpu")}
    if (folder / "W_enc_0.safetensors").is_file():
        # For an absolute path nothing is downloaded.
        for name, lazy in (("lazy", True), ("eager", False)):
            options = {"device": torch.device("cpu"), "dtype": torch.float32, "lazy_decoder": lazy}
            loaded[name], _ = load_transcoder_from_hub(str(folder.resolve()), **options)
    result: dict[str, Any] = {}
    ours = load_file(expected)
    x = ours["inputs"].transpose(0, 1)
    with torch.no_grad():
        for name, one in loaded.items():
            features = one.encode(x)
            decoded = one.decode(features.to_sparse() if hasattr(one, "W_dec") else features, x).transpose(0, 1)
            result[f"{name}_features"] = difference(features.transpose(0, 1), ours["features"])
            result[f"{name}_decoded"] = difference(decoded, ours["decoded"])
    result["l0"] = float((features > 0).sum() / x.shape[1])
    return result


def difference(computed: torch.Tensor, expected: torch.Tensor) -> float:
    return float((computed - expected).abs().max() / expected.abs().max())


def graph(folder: Path, model: Path, backend: str, prompt: str, out: Path | None) -> dict[str, Any]:
    """What `tracer.trace` says of a prompt, and how far logits and features are from those of the plain model."""
    from transformers import AutoModelForCausalLM

    clt = tracer.load_transcoder(str(folder), "/checked", "cpu")
    replacement = tracer.load_model(str(model), clt, backend, "cpu")
    tokens = tracer.tokens_of(replacement, prompt)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    read: list[torch.Tensor] = []
    mlps = hf.transformer.h if hasattr(hf, "transformer") else hf.model.layers
    hooks = [layer.mlp.register_forward_pre_hook(lambda _, args: read.append(args[0][0])) for layer in mlps]
    with torch.no_grad():
        truth = hf(tokens[None]).logits[0]
        logits, features = replacement.get_activations(tokens)
        expected = clt.encode(torch.stack(read))
        expected[:, 0] = 0  # circuit-tracer gives the first position none
    for hook in hooks:
        hook.remove()
    request = {
        "max_logits": 3,
        "logit_probability": 0.95,
        "max_features": 256,
        "batch_size": 64,
        "node_threshold": 0.8,
        "edge_threshold": 0.98,
        "graphs": None if out is None else str(out),
        "scan": "/checked",
    }
    result = tracer.trace(replacement, prompt, "checked", request)
    result["logits_differ"] = difference(logits[0].log_softmax(-1), truth.log_softmax(-1))
    result["features_differ"] = difference(features.to_dense(), expected)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--expected", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--backend", default="transformerlens")
    parser.add_argument("--prompt", default="def test_copy(self):\n        self.assertEqual(")
    parser.add_argument("--out", type=Path, help="a folder to write the graph to")
    options = parser.parse_args()
    result: dict[str, Any] = tracer.installed()
    if options.expected:
        result.update(compare(options.folder, options.expected))
    if options.model:
        result["graph"] = graph(options.folder, options.model, options.backend, options.prompt, options.out)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

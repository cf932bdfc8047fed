"""Load a folder with circuit-tracer itself, compare its numbers with ours, and make an attribution graph.

Runs in an environment with circuit-tracer; imports nothing of this repository. Prints one line of JSON.

    python circuit_tracer_graph.py FOLDER --expected inputs-and-outputs.safetensors --model MODEL --prompt TEXT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def compare(folder: Path, expected: Path) -> dict[str, Any]:
    """Encode and decode raw inputs with both of its loaders; the largest differences, relative to the largest value."""
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
    from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

    result: dict[str, Any] = {}
    # For an absolute path nothing is downloaded.
    by_name, config = load_transcoder_from_hub(str(folder.resolve()), device=torch.device("cpu"), dtype=torch.float32)
    by_path = load_clt(
        str(folder),
        feature_input_hook=config["feature_input_hook"],
        feature_output_hook=config["feature_output_hook"],
        device=torch.device("cpu"),
        dtype=torch.float32,
        lazy_decoder=False,
    )
    ours = load_file(expected)
    x = ours["inputs"].transpose(0, 1)
    with torch.no_grad():
        for name, clt in (("lazy", by_name), ("eager", by_path)):
            features = clt.encode(x)
            decoded = clt.decode(features.to_sparse()).transpose(0, 1)
            result[f"{name}_features"] = difference(features.transpose(0, 1), ours["features"])
            result[f"{name}_decoded"] = difference(decoded, ours["decoded"])
    result["l0"] = float((features > 0).sum() / x.shape[1])
    return result


def difference(computed: torch.Tensor, expected: torch.Tensor) -> float:
    return float((computed - expected).abs().max() / expected.abs().max())


def graph(folder: Path, model: Path, prompt: str, out: Path | None) -> dict[str, Any]:
    """An attribution graph of a prompt, and its scores."""
    from circuit_tracer import attribute
    from circuit_tracer.graph import compute_graph_scores
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import AutoTokenizer, GPT2LMHeadModel

    clt, _ = load_transcoder_from_hub(str(folder.resolve()), device=torch.device("cpu"), dtype=torch.float32)
    hf = GPT2LMHeadModel.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = HookedTransformerConfig(
        n_layers=hf.config.n_layer,
        d_model=hf.config.n_embd,
        n_ctx=hf.config.n_positions,
        d_head=hf.config.n_embd // hf.config.n_head,
        n_heads=hf.config.n_head,
        d_vocab=hf.config.vocab_size,
        act_fn={"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "relu": "relu"}[hf.config.activation_function],
        eps=hf.config.layer_norm_epsilon,
        normalization_type="LN",
        original_architecture="GPT2LMHeadModel",
        device="cpu",
        default_prepend_bos=False,
    )
    replacement = TransformerLensReplacementModel(config, tokenizer=tokenizer)
    replacement.load_and_process_state_dict(
        convert_gpt2_weights(hf, config), fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    replacement._configure_replacement_model(clt)
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"][0]
    # circuit-tracer puts a special token first, but not if its id is 0, as with this tokenizer.
    tokens = torch.cat([torch.tensor([tokenizer.bos_token_id]), tokens])
    with torch.no_grad():
        truth = hf(tokens[None]).logits[0]
        logits = replacement(tokens[None])[0]
    attributed = attribute(tokens, replacement, max_n_logits=3, batch_size=64, max_feature_nodes=256)
    replacement_score, completeness = compute_graph_scores(attributed)
    if out is not None:
        attributed.to_pt(str(out))
    top = [str(token) for token in attributed.logit_targets] if hasattr(attributed, "logit_targets") else []
    return {
        "tokens": len(tokens),
        "logits_differ": difference(logits.log_softmax(-1), truth.log_softmax(-1)),
        "active_features": len(attributed.active_features),
        "edges": int((attributed.adjacency_matrix != 0).sum()),
        "replacement_score": float(replacement_score),
        "completeness_score": float(completeness),
        "targets": top,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--expected", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompt", default="def test_copy(self):\n        self.assertEqual(")
    parser.add_argument("--out", type=Path, help="a .pt file to write the graph to")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    if options.expected:
        result.update(compare(options.folder, options.expected))
    if options.model:
        result["graph"] = graph(options.folder, options.model, options.prompt, options.out)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

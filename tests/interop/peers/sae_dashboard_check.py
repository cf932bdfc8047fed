"""Open a folder with SAEDashboard itself, as its runner does with `use_clt`, and compare features with ours; with a
language model, make the dashboards of some features.

Runs in an environment with sae-dashboard; imports nothing of this repository. Prints one line of JSON.

    python sae_dashboard_check.py FOLDER inputs-and-outputs.safetensors [MODEL]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from clt.config.clt_config import CLTConfig
from clt.models.clt import CrossLayerTranscoder
from sae_dashboard.clt_layer_wrapper import CLTLayerWrapper
from safetensors.torch import load_file


def opened(folder: Path, layer: int) -> Any:
    """A layer, as `NeuronpediaRunner` opens it."""
    clt = CrossLayerTranscoder(CLTConfig.from_json(folder / "cfg.json"), process_group=None, device=torch.device("cpu"))
    clt.load_state_dict(load_file(folder / "model.safetensors"))
    return CLTLayerWrapper(clt, layer, clt_model_dir_path=str(folder))


def language_model(folder: Path) -> Any:
    """A GPT-2 of any size, in TransformerLens."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(folder)
    config = HookedTransformerConfig(
        n_layers=hf.config.n_layer,
        d_model=hf.config.n_embd,
        n_heads=hf.config.n_head,
        d_head=hf.config.n_embd // hf.config.n_head,
        n_ctx=hf.config.n_positions,
        d_vocab=hf.config.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=hf.config.layer_norm_epsilon,
        device="cpu",
    )
    model = HookedTransformer(config, tokenizer=AutoTokenizer.from_pretrained(folder), default_padding_side="right")
    weights = convert_gpt2_weights(hf, config)
    model.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model


def dashboards(folder: Path, model: Path, layer: int) -> dict[str, Any]:
    """What SAEDashboard makes of some text, for the features that are most often active."""
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner

    sae, lens = opened(folder, layer), language_model(model)
    text = "def test_copy(self):\n    x = [1, 2, 3]\n    self.assertEqual(copy.copy(x), x)\n" * 40
    tokens = lens.tokenizer(text, return_tensors="pt")["input_ids"][0]
    rows = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    _, cache = lens.run_with_cache(rows, names_filter=[sae.cfg.hook_name])
    acts = sae.encode(cache[sae.cfg.hook_name].flatten(0, 1))
    chosen = acts.sum(0).topk(4).indices.tolist()
    config = SaeVisConfig(
        hook_point=sae.cfg.hook_name,
        features=chosen,
        minibatch_size_features=4,
        minibatch_size_tokens=8,
        device="cpu",
        dtype="float32",
    )
    with torch.no_grad():
        data = SaeVisRunner(config).run(encoder=sae, model=lens, tokens=rows)
    bars = {f: len(one.acts_histogram_data.bar_heights) for f, one in data.feature_data_dict.items()}
    shares = {f: float((acts[:, f] > 0).float().mean()) for f in chosen}
    return {"dashboards": len(data.feature_data_dict), "bars": bars, "active": shares}


def main(folder: Path, expected: Path, model: Path | None = None) -> None:
    ours = load_file(expected)
    settings = json.loads((folder / "dashboard.json").read_text())
    differences = []
    for one in settings["layers"]:
        layer = one["clt_layer_idx"]
        sae = opened(folder, layer)
        with torch.no_grad():
            features = sae.encode(ours["inputs"][:, layer])
        ours_of_layer = ours["features"][:, layer]
        differences.append(float((features - ours_of_layer).abs().max() / ours_of_layer.abs().max()))
    result = {"features": differences, "hook": sae.cfg.hook_name}
    if model is not None:
        result |= dashboards(folder, model, len(settings["layers"]) - 1)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

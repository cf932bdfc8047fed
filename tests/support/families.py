"""Tiny random models of every causal class of transformers, and what their MLPs add, by plain torch.

`python -m tests.support.families` tries them all and writes tests/plugins/stream/families.json and families.md.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from clt_plugins import Refused

FOLDER = Path(__file__).resolve().parents[1] / "plugins" / "stream"
JSON, TABLE = FOLDER / "families.json", FOLDER / "families.md"

TOKENS = 9, 3, 1, 4, 1, 5, 2, 6

SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ["hidden_size", "n_embd", "d_model", "dim", "embedding_size", "input_embedding_size", "emb_dim"], 32
    ),
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff"], 48
    ),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 24),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"], 3),
    **dict.fromkeys(["num_decoder_layers", "num_encoder_layers"], 3),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "multi_query_group_num", "kv_n_heads"], 4),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], 128),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"], 64),
    **dict.fromkeys(["head_dim", "attention_head_dim", "dim_head", "d_kv", "global_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank", "q_lora_rank", "rotary_dim"], 8),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"], 0),
    **dict.fromkeys(["mamba_d_state", "mamba_d_conv", "state_size", "ssm_state_size"], 4),
    **dict.fromkeys(["mamba_expand", "expand"], 2),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim", "n_mamba_heads"], 8),
    **dict.fromkeys(["sliding_window", "attention_window_size", "local_window_size"], 8),
    "first_k_dense_replace": 1,
}
"""Values of the settings that a config has."""

LARGEST = 8_000_000
"""Parameters of a tiny model."""

LAYERS = [key for key in SIZES if "layer" in key and SIZES[key] == 3]

SPECIAL: dict[str, dict[str, Any]] = {
    "granite": {"residual_multiplier": 0.22},
    "granitemoe": {"residual_multiplier": 0.22},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        "layer_types": ["full_attention"] * 3,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gemma4_text": {"per_layer_config": {1: {"head_dim": 16}, 2: {"head_dim": 16}}},
    "gemma4_unified_text": {"per_layer_config": {1: {"head_dim": 16}, 2: {"head_dim": 16}}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"intermediate_size": 48, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "zero_expert_num": 2},
    "mimo_v2_flash": {"head_dim": 48, "v_head_dim": 48, "swa_head_dim": 48, "swa_v_head_dim": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {
        "pronunciation_vocab_size": 128,
        "shape_vocab_size": 128,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
    "bailing_hybrid": {"head_dim": 16, "qk_rope_head_dim": 16},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"]},
}
"""More settings, by model type."""

MIXING = re.compile(
    r"attn|attention|self_?att|norm|(^|\.)ln|layer_?norm|mamba|mixer|ssm|mlstm|(^|\.)conv|rotary|temporal|recurrent|rglru|time_mix"
)
"""Parameters of a layer whose names say that they are no part of a feed-forward branch. All others are set to zero."""


@attrs.frozen
class Verdict:
    """What became of one class."""

    model_type: str
    name: str
    """Of the class."""
    outcome: str
    """"right", "wrong", "refused" or "not built"."""
    detail: str
    """Sites of the first layer, the refusal, or the error."""
    error: float | None = None
    """The largest of |what the layer's output changes by - target| / |target|, over layers."""


def tiny_config(model_type: str) -> Any:
    """A config of three narrow layers; a test of a family that this version of transformers lacks is skipped."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    cls = CONFIG_MAPPING[model_type]
    with contextlib.redirect_stdout(io.StringIO()):
        default = cls()
    return cls(**{**_small(default.to_dict()), **SPECIAL.get(model_type, {})})


def _outcome(found: Verdict) -> str:
    error = "" if found.error is None else f"{found.error:.0e}"
    detail = found.detail.replace("|", "\\|")
    return f"| {found.model_type} | {found.name} | {found.outcome} | {error} | {detail} |"


def table(verdicts: list[Verdict]) -> str:
    """The markdown table of all verdicts."""
    counts = {kind: sum(one.outcome == kind for one in verdicts) for kind in ("right", "refused", "wrong", "not built")}
    lines = [
        "# Every causal class of transformers",
        "",
        f"Tiny random models, transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}, "
        f"float32 on a CPU: "
        + ", ".join(f"{count} {kind}" for kind, count in counts.items())
        + f", of {len(verdicts)}.",
        "",
        "*Right*: with all feed-forward weights of a layer at zero, its output changes by exactly the target; *error* "
        "is the largest |change - target| / |target| of the layers. *Refused*: with this message. *Not built*: no tiny "
        "config of it could be made, so it was not tried. Made by `python -m tests.support.families`.",
        "",
        "| type | class | outcome | error | sites of the first layer, or why not |",
        "| --- | --- | --- | --- | --- |",
        *map(_outcome, verdicts),
    ]
    return "\n".join(lines) + "\n"


def _small(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config that must change, sub-configs included."""
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and key.endswith("_config"):
            small[key] = {**value, **_small(value)}
        elif key in SIZES and value is not None and not isinstance(value, (list, dict)):
            small[key] = SIZES[key]
        elif isinstance(value, (list, tuple)) and len(value) in {settings.get(name) for name in LAYERS}:
            kinds = list(dict.fromkeys(value)) if isinstance(value[0], str) else list(value)
            small[key] = (kinds * 3)[:3]
        elif key == "per_layer_config":
            small[key] = {}
    return small


def tiny_model(model_type: str, config: Any = None) -> Any:
    """A random model in eval mode, all of whose weights matter: no parameter is left at zero."""
    torch.manual_seed(0)
    config = config or tiny_config(model_type)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters: its config is not tiny")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            elif "A_log" not in name and "dt_bias" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@torch.no_grad()
def error_of(model: Any, pairs: list[tuple[Any, Any]], mixing: re.Pattern[str] = MIXING) -> float:
    """The largest |change of the layer's output - target| / |target| when all its feed-forward weights are zero.

    Args:
        pairs: (what is read, what is predicted) of each layer, in the order of the layers.
        mixing: names of parameters that are no part of a feed-forward branch.
    """
    ids = torch.tensor([TOKENS, TOKENS[::-1]])
    worst = 0.0
    for _, written in pairs:
        match = re.match(r"(.*?\.\d+)\.", written.path)
        assert match is not None
        layer = model.get_submodule(match[1])
        seen: dict[str, list[Tensor]] = {"target": [], "out": []}
        site = model.get_submodule(written.path)

        def target(_: Any, args: Any, output: Any, seen: Any = seen) -> None:
            seen["target"].append((output[0] if isinstance(output, tuple) else output).clone())

        def out(_: Any, args: Any, output: Any, seen: Any = seen) -> None:
            seen["out"].append((output[0] if isinstance(output, tuple) else output).clone())

        handles = [site.register_forward_hook(target), layer.register_forward_hook(out)]
        model(ids, use_cache=False)
        zeroed = [(weight, weight.clone()) for name, weight in layer.named_parameters() if not mixing.search(name)]
        try:
            for weight, _copy in zeroed:
                weight.zero_()
            model(ids, use_cache=False)
        finally:
            for weight, copy in zeroed:
                weight.copy_(copy)
            for handle in handles:
                handle.remove()
        before, after = seen["out"]
        change = before - after
        claimed = seen["target"][0].reshape(change.shape) * written.scale
        worst = max(worst, float((change - claimed).norm() / claimed.norm()))
    return worst


def examine(model_type: str) -> Verdict:
    """Try one class."""
    from clt_stream.sites import find_sites
    from clt_stream.taps import find_order

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    name = name if isinstance(name, str) else name[0]
    try:
        model = tiny_model(model_type)
    except Exception as error:
        return Verdict(model_type, name, "not built", f"{type(error).__name__}: {error}".splitlines()[0][:200])
    try:
        pairs = find_sites(model, None, None, None)
        find_order(model, pairs)
    except Refused as refused:
        return Verdict(model_type, name, "refused", str(refused), _error_of_the_rest(model, model_type, str(refused)))
    error = error_of(model, pairs)
    sites = " → ".join(re.sub(r"\.\d+\.", ".{}.", str(site), count=1) for site in pairs[0])
    return Verdict(model_type, name, "right" if error < 1e-4 else "wrong", sites, error)


def _error_of_the_rest(model: Any, model_type: str, refusal: str) -> float | None:
    """The error in the layers that a refusal names as the remedy, if it names some."""
    from clt_stream.sites import find_sites

    remedy = re.search(r"model\.layers = (\[[\d, ]+\])$", refusal)
    if remedy is None:
        return None
    mixing = re.compile("norm") if model_type == "nemotron_h" else MIXING  # `mixer` is the name of all its layers
    return error_of(model, find_sites(model, None, None, json.loads(remedy[1])), mixing)


def try_all(types: list[str]) -> list[Verdict]:
    """Try classes one after the other; the memory of each is released before the next."""
    verdicts = []
    for model_type in types:
        verdicts.append(examine(model_type))
        print(verdicts[-1].outcome, model_type, verdicts[-1].error, flush=True)
        gc.collect()
    return verdicts


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    verdicts = try_all(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    JSON.write_text(json.dumps([attrs.asdict(verdict) for verdict in verdicts], indent=1) + "\n")
    TABLE.write_text(table(verdicts))


if __name__ == "__main__":
    main()

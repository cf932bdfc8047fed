"""Miniatures of the formats in which other trainers store transcoders, made from the formats' descriptions, with what
each computes.

None of this uses the code that is tested: files are written tensor by tensor, and features and outputs computed by the
tools' formulas.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.format_truth import MODEL, D, F, K, L, Truth, across, encoder, jump, numbers, pairs, pre_of, top


def saelens(folder: Path) -> Truth:
    (W, b, θ), bias, skip, rows = encoder(), numbers(L, D, seed=94), numbers(L, D, D, seed=93), pairs()
    for i in range(L):
        inner = folder / f"sae_{'cba'[i]}"  # layers are told by their hooks, not by their names
        inner.mkdir()
        tensors = {"W_enc": W[i].T.contiguous(), "b_enc": b[i], "W_dec": rows[i, i], "b_dec": bias[i]}
        save_file(tensors | {"threshold": θ[i], "W_skip": skip[i]}, inner / "sae_weights.safetensors")
        about = {
            "model_name": MODEL,
            "hook_name": f"blocks.{i}.mlp.hook_in",
            "hook_name_out": f"blocks.{i}.hook_mlp_out",
        }
        said = {"architecture": "jumprelu_skip_transcoder", "d_in": D, "d_out": D, "d_sae": F, "metadata": about}
        said |= {"normalize_activations": "none", "apply_b_dec_to_input": False, "reshape_activations": "none"}
        (inner / "cfg.json").write_text(json.dumps(said))
    features = lambda x: jump(pre_of(x, W, b), θ)  # noqa: E731
    own = {(i, i): rows[i, i] for i in range(L)}
    outputs = lambda x: across(features(x), own, bias) + torch.einsum("bld,led->ble", x, skip)  # noqa: E731
    return Truth(features, outputs, "saelens", "per_layer", hooks=("mlp.hook_in", "hook_mlp_out"), skip=True)


def clt_forge(folder: Path, *, ranks: int = 1, crossing: bool = True) -> Truth:
    (W, b, θ), rows = encoder(), pairs()
    order = [(s, t) for s in range(L) for t in range(s, L)] if crossing else [(i, i) for i in range(L)]
    biases = numbers(len(order), D, seed=92)
    factors = {side: numbers(L, seed=seed).abs() + 0.5 for side, seed in (("in", 91), ("out", 90))}
    share = F // ranks
    for rank in range(ranks):
        cut = slice(rank * share, (rank + 1) * share)
        tensors = {
            "W_enc": W.transpose(1, 2)[:, :, cut],
            "b_enc": b[:, cut],
            "W_dec": torch.stack([rows[pair] for pair in order])[:, cut],
            "b_dec": biases,
            "log_threshold": θ.log()[:, cut],
            "feature_count": torch.zeros(L, share, dtype=torch.int64),
            **{f"estimated_norm_scaling_factor_{side}": factor for side, factor in factors.items()},
        }
        name = "clt_weights.safetensors" if ranks == 1 else f"rank{rank}_clt_weights.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    said = {"d_in": D, "d_latent": F, "n_layers": L, "model_name": MODEL, "cross_layer_decoders": crossing}
    (folder / "clt_cfg.json").write_text(json.dumps({**said, "feature_sharding": ranks > 1}))
    bias = torch.zeros(L, D)
    for (_, t), one in zip(order, biases, strict=True):
        bias[t] += one
    features = lambda x: jump(pre_of(x * factors["in"][:, None], W, b), θ)  # noqa: E731
    chosen = {pair: rows[pair] for pair in order}
    outputs = lambda x: across(features(x), chosen, bias) / factors["out"][:, None]  # noqa: E731
    tying = "untied" if crossing else "per_layer"
    return Truth(features, outputs, "clt-forge", tying, hooks=("ln2.hook_normalized", "hook_mlp_out"))


def llamascopium(folder: Path, *, act_fn: str = "layertopk", by_norm: bool = True, pickled: bool = False) -> Truth:
    (W, b, θ), rows, bias = encoder(), pairs(), numbers(L, D, seed=89)
    hooks = {
        side: [f"blocks.{i}.{name}" for i in range(L)] for side, name in (("in", "ln2.x"), ("out", "hook_mlp_out"))
    }
    norms = {side: numbers(L, seed=seed).abs() + 1 for side, seed in (("in", 88), ("out", 87))}
    tensors = {"W_E": W.transpose(1, 2).contiguous(), "b_E": b}
    for t in range(L):
        tensors[f"W_D.{t}"] = torch.stack([rows[s, t] for s in range(t + 1)])
        tensors[f"b_D.{t}"] = bias[t]
    for side, names in hooks.items():
        for i, name in enumerate(names):
            tensors[f"dataset_average_activation_norm.{name}"] = norms[side][i]
    if act_fn == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = θ.log()
    if pickled:
        torch.save({"sae": tensors, "version": "2.0"}, folder / "sae_weights.pt")
    else:
        save_file(tensors, folder / "sae_weights.safetensors")
    said = {"sae_type": "clt", "d_model": D, "expansion_factor": F / D, "act_fn": act_fn, "top_k": K}
    said |= {"hook_points_in": hooks["in"], "hook_points_out": hooks["out"], "norm_activation": "dataset-wise"}
    (folder / "config.json").write_text(json.dumps({**said, "sparsity_include_decoder_norm": by_norm}))
    scale = {side: D**0.5 / norm[:, None] for side, norm in norms.items()}
    size = torch.stack(
        [sum(rows[s, t].square().sum(1) for t in range(s, L)).sqrt() for s in range(L)]  # type: ignore[union-attr]
    )
    weight = size if by_norm else torch.ones_like(size)

    def features(x: Tensor) -> Tensor:
        pre = pre_of(x * scale["in"], W, b)
        score = pre.relu() * weight
        if act_fn == "layertopk":
            return top(pre.flatten(1), score.flatten(1), K).view_as(pre)
        if act_fn == "topk":
            return top(pre, score, K)
        if act_fn == "batchtopk":  # of each layer, over tokens and features
            each = [top(pre[:, i].flatten(), score[:, i].flatten(), K * len(x)).view(len(x), F) for i in range(L)]
            return torch.stack(each, 1)
        return pre * (pre * weight > θ) if act_fn == "jumprelu" else pre.relu()

    outputs = lambda x: across(features(x), rows, bias) / scale["out"]  # noqa: E731
    name = {"layertopk": "topk"}.get(act_fn, act_fn)
    return Truth(features, outputs, "llamascopium", activation=name, hooks=("ln2.x", "hook_mlp_out"))


def clt_training(
    folder: Path, *, form: str = "pairs", tuned: bool = False, reach: int = L, activation: str = "topk"
) -> Truth:
    """clt-training: `form` "pairs", "per_source" or "concat"; or "alone", transcoders of a layer each as sparsify's.

    Args:
        tuned: with factors and offsets of active features for each pair of layers.
        reach: how many layers features write to.
        activation: "topk", or "groupmax" with groups of two.
    """
    (W, b, _), rows = encoder(), pairs()
    crossing = form != "alone"
    reached = [(s, t) for s in range(L) for t in range(s, min(L, s + reach) if crossing else s + 1)]
    tuning = {pair: numbers(2, F, seed=60 + 7 * pair[0] + pair[1], scale=0.5) for pair in reached}
    biases = {pair: numbers(D, seed=30 + 7 * pair[0] + pair[1]) for pair in reached}
    skip, norm_in, norm_out = numbers(L, D, D, seed=86), numbers(L, seed=85).abs() + 1, numbers(L, seed=84).abs() + 1
    matrix = {
        "pairs": lambda s, t: rows[s, t],
        "per_source": lambda s, t: rows[s, s],
        "concat": lambda s, t: rows[t, t],
        "alone": lambda s, t: rows[s, t],
    }[form]
    for s in range(L):
        inner = folder / f"h.{s}.mlp"
        inner.mkdir()
        targets = [t for source, t in reached if source == s]
        tensors = {"encoder.weight": W[s], "encoder.bias": b[s], "in_norm": norm_in[s : s + 1]}
        tensors["out_norm"] = norm_out[s : s + 1]
        if form == "pairs":
            for t in targets:
                tensors[f"W_decs.{t - s}"] = rows[s, t]
                tensors[f"W_skips.{t - s}"] = skip[s] if s == t else torch.zeros(D, D)
        else:
            tensors["W_dec"] = rows[s, s]
            tensors["W_skip"] = skip[s]
        if form in ("concat", "alone"):
            tensors["b_dec"] = biases[s, s]
        for t in targets:
            suffix = f"s.{t - s}" if crossing else ""
            if form in ("pairs", "per_source"):
                tensors[f"b_decs.{t - s}"] = biases[s, t]
            tensors[f"post_enc{suffix}"] = tuning[s, t][0] if tuned else torch.zeros(F)
            if tuned:
                tensors[f"post_enc_scale{suffix}"] = tuning[s, t][1]
        save_file(tensors, inner / "sae.safetensors")
        said = {
            "activation": activation,
            "k": K if activation == "topk" else F // 2,
            "transcode": True,
            "skip_connection": True,
            "normalize_io": True,
            "d_in": D,
        }
        said |= {
            "n_targets": len(targets) if crossing else 0,
            "coalesce_topk": "concat" if form == "concat" else "none",
        }
        said |= {"per_source_tied": form == "per_source", "post_encoder_scale": tuned, "divide_cross_layer": False}
        (inner / "cfg.json").write_text(json.dumps(said))
    (folder / "config.json").write_text(json.dumps({"model": MODEL, "hookpoints_in": []}))

    def features(x: Tensor) -> Tensor:
        pre = pre_of(x * (D**0.5 / norm_in[:, None]), W, b)
        if activation == "topk":
            return top(pre, pre, K)
        groups = pre.relu().unflatten(2, (F // 2, 2))
        return (groups * (groups == groups.amax(3, keepdim=True))).flatten(2)

    def outputs(x: Tensor) -> Tensor:
        acts, scaled = features(x), x * (D**0.5 / norm_in[:, None])
        out = torch.einsum("bld,led->ble", scaled, skip)
        for s, t in reached:
            values = acts[:, s]
            if tuned:
                values = (values + tuning[s, t][0] * (values > 0)) * tuning[s, t][1]
            out[:, t] += values @ matrix(s, t)
            if form in ("pairs", "per_source") or s == t:
                out[:, t] += biases[s, t]
        return out * (norm_out[:, None] / D**0.5)

    tying = {"alone": "per_layer", "pairs": "untied"}.get(form)
    tying = tying or ("untied" if tuned or reach < L else {"concat": "per_target"}.get(form, form))
    hooks, notes = ("mlp.hook_in", "mlp.hook_out"), "offsets" if tuned else ""
    return Truth(features, outputs, "clt-training", tying, activation, hooks, skip=True, notes=notes)

"""Miniatures of other tools' formats, made from the formats' descriptions, with what each computes.

None of this uses the code that is tested: files are written tensor by tensor, and features and outputs computed by the
tools' formulas.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import attrs
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

L, D, F, K = 3, 6, 10, 4
MODEL = "some/model"


@attrs.frozen(eq=False)
class Truth:
    """What a miniature computes, and what `inspect` must say of it."""

    features: Callable[[Tensor], Tensor]
    """Raw inputs [B, L, D] -> features [B, L, F]."""
    outputs: Callable[[Tensor], Tensor]
    """Raw inputs [B, L, D] -> outputs [B, L, D]."""
    format: str
    tying: str = "untied"
    activation: str = "jumprelu"
    hooks: tuple[str | None, str | None] = (None, None)
    skip: bool = False
    notes: str = ""


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def jump(pre: Tensor, threshold: Tensor) -> Tensor:
    return pre * (pre > threshold)


def top(pre: Tensor, score: Tensor, k: int) -> Tensor:
    """The k features with the highest score over the last axis, of those above 0."""
    kept = torch.zeros_like(pre).scatter(-1, score.topk(k, -1).indices, 1.0)
    return pre.relu() * kept


def encoder(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W [L, F, D], b [L, F], θ [L, F]."""
    return numbers(L, F, D, seed=seed), numbers(L, F, seed=seed + 1, scale=0.3), numbers(L, F, seed=seed + 2).abs() / 2


def pairs(seed: int = 10) -> dict[tuple[int, int], Tensor]:
    """A matrix [F, D] for each pair of layers."""
    return {(s, t): numbers(F, D, seed=seed + 7 * s + t) for s in range(L) for t in range(s, L)}


def pre_of(x: Tensor, W: Tensor, b: Tensor | float) -> Tensor:
    return torch.einsum("bld,lfd->blf", x, W) + b


def across(acts: Tensor, rows: dict[tuple[int, int], Tensor], bias: Tensor) -> Tensor:
    out = bias.expand(len(acts), L, D).clone()
    for (s, t), matrix in rows.items():
        out[:, t] += acts[:, s] @ matrix
    return out


def circuit_tracer(folder: Path, *, thresholds: bool = True) -> Truth:
    (W, b, θ), rows, bias = encoder(), pairs(), numbers(L, D, seed=99)
    for i in range(L):
        tensors = {f"W_enc_{i}": W[i], f"b_enc_{i}": b[i], f"b_dec_{i}": bias[i]}
        save_file(tensors | ({f"threshold_{i}": θ[i]} if thresholds else {}), folder / f"W_enc_{i}.safetensors")
        stacked = torch.stack([rows[i, t] for t in range(i, L)], 1)
        save_file({f"W_dec_{i}": stacked}, folder / f"W_dec_{i}.safetensors")
    said = {"model_kind": "cross_layer_transcoder", "model_name": MODEL}
    said |= {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    (folder / "config.yaml").write_text(yaml.safe_dump(said))

    def features(x: Tensor) -> Tensor:
        return jump(pre_of(x, W, b), θ) if thresholds else pre_of(x, W, b).relu()

    outputs = lambda x: across(features(x), rows, bias)  # noqa: E731
    name = "jumprelu" if thresholds else "relu"
    return Truth(features, outputs, "circuit-tracer", activation=name, hooks=("hook_resid_mid", "hook_mlp_out"))


def bytedance(folder: Path) -> Truth:
    (W, _, _), rows = encoder(), pairs()
    norms = torch.stack(
        [sum(rows[s, t].square().sum(1) for t in range(s, L)).sqrt() for s in range(L)]  # type: ignore[union-attr]
    )
    for i in range(L):
        save_file({f"W_enc_{i}": W[i]}, folder / f"W_enc_{i}.safetensors")
        stacked = torch.stack([rows[i, t] for t in range(i, L)], 1)
        save_file({f"W_dec_{i}": stacked, f"W_dec_norm_{i}": norms[i]}, folder / f"W_dec_{i}.safetensors")
    save_file({"W_dec_norm": norms}, folder / "W_dec_norm.safetensors")
    save_file({"resid_mid_l2": torch.ones(L), "mlp_out_l2": torch.ones(L)}, folder / "factors.safetensors")
    (folder / "config.json").write_text(json.dumps({"d_feature": F, "k": 2, "base_model": MODEL}))

    def features(x: Tensor) -> Tensor:
        acts = pre_of(x, W, 0.0).relu()
        return top(acts.flatten(1), (acts * norms).flatten(1), L * 2).view(-1, L, F)

    outputs = lambda x: across(features(x), rows, torch.zeros(L, D))  # noqa: E731
    return Truth(features, outputs, "bytedance", activation="topk", hooks=("hook_resid_mid", "hook_mlp_out"))


def gemma_scope_2(folder: Path) -> Truth:
    (W, b, θ), bias, skip = encoder(), numbers(L, D, seed=98), numbers(L, D, D, seed=97)
    rows = pairs()
    for i in range(L):
        written = torch.full((F, L, D), 7.0)  # what stands for earlier layers is not read
        for t in range(i, L):
            written[:, t] = rows[i, t]
        tensors = {"w_enc": W[i].T.contiguous(), "b_enc": b[i], "threshold": θ[i], "w_dec": written, "b_dec": bias[i]}
        save_file(tensors | {"affine_skip_connection": skip[i]}, folder / f"params_layer_{i}.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "model_name": MODEL}))
    features = lambda x: jump(pre_of(x, W, b), θ)  # noqa: E731
    outputs = lambda x: across(features(x), rows, bias) + torch.einsum("bld,lde->ble", x, skip)  # noqa: E731
    return Truth(features, outputs, "gemma-scope-2", skip=True)


def gemma_scope_2_layers(folder: Path) -> Truth:
    (W, b, θ), bias, rows = encoder(), numbers(L, D, seed=98), pairs()
    for i in range(L):
        inner = folder / f"layer_{i}"
        inner.mkdir()
        tensors = {
            "w_enc": W[i].T.contiguous(),
            "b_enc": b[i],
            "threshold": θ[i],
            "w_dec": rows[i, i],
            "b_dec": bias[i],
        }
        save_file(tensors, inner / "params.safetensors")
    features = lambda x: jump(pre_of(x, W, b), θ)  # noqa: E731
    own = {(i, i): rows[i, i] for i in range(L)}
    return Truth(features, lambda x: across(features(x), own, bias), "gemma-scope-2", "per_layer")


def transcoder_set(folder: Path, *, kind: str = "topk") -> Truth:
    (W, b, θ), bias, skip, rows = encoder(), numbers(L, D, seed=96), numbers(L, D, D, seed=95), pairs()
    for i in range(L):
        tensors = {"W_enc": W[i], "b_enc": b[i], "W_dec": rows[i, i], "b_dec": bias[i], "W_skip": skip[i]}
        extra = {"activation_function.threshold": θ[i, :1] if i == 1 else θ[i]} if kind == "jumprelu" else {}
        save_file(tensors | extra, folder / f"layer_{i}.safetensors")
    said = {"model_kind": "transcoder_set", "model_name": MODEL, "scan": "x"}
    said |= {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    stated = {"topk": {"activation": "topk", "k": K}, "relu": {"activation": "relu"}, "jumprelu": {}}[kind]
    (folder / "config.yaml").write_text(yaml.safe_dump({**said, **stated}))

    def features(x: Tensor) -> Tensor:
        pre = pre_of(x, W, b)
        if kind == "topk":
            return top(pre, pre, K)
        return pre.relu() if kind == "relu" else jump(pre, torch.stack([θ[0], θ[1, :1].expand(F), θ[2]]))

    own = {(i, i): rows[i, i] for i in range(L)}
    outputs = lambda x: across(features(x), own, bias) + torch.einsum("bld,led->ble", x, skip)  # noqa: E731
    hooks = ("mlp.hook_in", "mlp.hook_out")
    return Truth(features, outputs, "transcoder-set", "per_layer", kind, hooks, skip=True)


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


MINIATURES: dict[str, Callable[[Path], Truth]] = {
    "circuit-tracer": circuit_tracer,
    "circuit-tracer, ReLU": lambda folder: circuit_tracer(folder, thresholds=False),
    "bytedance": bytedance,
    "gemma-scope-2": gemma_scope_2,
    "gemma-scope-2, a layer each": gemma_scope_2_layers,
    "transcoder-set, TopK": transcoder_set,
    "transcoder-set, ReLU": lambda folder: transcoder_set(folder, kind="relu"),
    "transcoder-set, JumpReLU": lambda folder: transcoder_set(folder, kind="jumprelu"),
    "saelens": saelens,
    "clt-forge": clt_forge,
    "clt-forge, two ranks": lambda folder: clt_forge(folder, ranks=2),
    "clt-forge, a layer each": lambda folder: clt_forge(folder, crossing=False),
    "llamascopium, layertopk": llamascopium,
    "llamascopium, topk": lambda folder: llamascopium(folder, act_fn="topk", by_norm=False),
    "llamascopium, batchtopk": lambda folder: llamascopium(folder, act_fn="batchtopk"),
    "llamascopium, jumprelu": lambda folder: llamascopium(folder, act_fn="jumprelu"),
    "llamascopium, pickled": lambda folder: llamascopium(folder, act_fn="jumprelu", by_norm=False, pickled=True),
    "clt-training": clt_training,
    "clt-training, tuned": lambda folder: clt_training(folder, tuned=True),
    "clt-training, reaching two layers": lambda folder: clt_training(folder, reach=2),
    "clt-training, per source": lambda folder: clt_training(folder, form="per_source"),
    "clt-training, per target": lambda folder: clt_training(folder, form="concat"),
    "clt-training, per target, tuned": lambda folder: clt_training(folder, form="concat", tuned=True),
    "clt-training, per source, tuned": lambda folder: clt_training(folder, form="per_source", tuned=True),
    "clt-training, groupmax": lambda folder: clt_training(folder, activation="groupmax"),
    "sparsify": lambda folder: clt_training(folder, form="alone"),
    "sparsify, groupmax": lambda folder: clt_training(folder, form="alone", activation="groupmax"),
}
"""By name; each is made in an empty folder."""

"""Miniatures of other tools' formats, made from the formats' descriptions, with what each computes: here the formats in
which transcoders are published; those of trainers are in `trainer_formats`.

None of this uses the code that is tested: files are written tensor by tensor, and features and outputs computed by the
tools' formulas.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tests.support.format_truth import MODEL, D, F, K, L, Truth, across, encoder, jump, numbers, pairs, pre_of, top
from tests.support.trainer_formats import clt_forge, clt_training, llamascopium, saelens


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

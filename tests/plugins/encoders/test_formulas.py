"""The formulas of the encoders, in float64, from the tensors by their names in files.

`W_enc` [L, F, D], `W_down` [L, D, r], `W_up` [L, F, r], `b_enc` and `encoder_scale` [L, F], `b_pre` [L, D]; the rows of
`tied` are the decoder's, `W_dec.SS` [F, L - s, D] or `W_dec` [L, F, D], times `feature_scale` [L, F].
"""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from clt_plugins import CrossLayerTranscoder, Refused, Single
from clt_plugins.errors import Stopped
from clt_plugins.files.folders import atomic_folder
from clt_plugins.model.in_model.replacement import Replacement
from clt_plugins.model.sparse import reuse_gradients
from clt_plugins.training.objective import objective
from clt_plugins.training.optimizers.make import is_matrix
from clt_plugins.training.step.guard import guard
from clt_stages.thresholds import pre_activations_of
from tests.support.helpers import ENCODERS, TYINGS, parts, plugins, random_batch, stir

L, D = 3, 6


def built(encoder: str, tying: str = "untied", **changes: Any) -> CrossLayerTranscoder:
    """A transcoder in float64 with parameters at no special value."""
    changes = {"transcoder": {"dtype": "float64"}, "normalisation": {"name": "none"}} | changes
    transcoder = parts(encoder=ENCODERS[encoder], tying=TYINGS[tying], **changes).transcoder
    stir(transcoder)
    return transcoder


def inputs(tokens: int = 12) -> Tensor:
    return random_batch(tokens, L, D, torch.float64).inputs


def own_rows(tensors: dict[str, Tensor]) -> Tensor:
    """What each feature writes to its own layer, [L, F, D]."""
    if "W_dec" not in tensors:
        return torch.stack([tensors[f"W_dec.{layer:02}"][:, 0] for layer in range(L)])
    scale = tensors.get("feature_scale")
    return tensors["W_dec"] if scale is None else tensors["W_dec"] * scale[..., None]


def by_hand(encoder: str, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """Pre-activations [B, L, F]."""
    if encoder == "low_rank":
        rows = torch.einsum("ldr,lfr->lfd", tensors["W_down"], tensors["W_up"])
    elif encoder.startswith("tied"):
        rows = own_rows(tensors)
    else:
        rows = tensors["W_enc"]
    if encoder == "tied-scaled":
        rows = tensors["encoder_scale"][..., None] * rows / rows.square().sum(-1, keepdim=True).sqrt()
    if encoder == "pre_bias":
        x = x - tensors["b_pre"]
    return torch.einsum("bld,lfd->blf", x, rows) + tensors["b_enc"]


CASES = [(encoder, tying) for encoder in ENCODERS for tying in ("untied", "per_source-affine", "per_target")]


@pytest.mark.parametrize(("encoder", "tying"), CASES)
def test_pre_activations_and_gradients_are_those_of_the_formula(encoder: str, tying: str) -> None:
    """Also the gradients by the decoder, which `tied` shares; in buffers, as in training, and without."""
    transcoder, x = built(encoder, tying, activation={"name": "relu"}), inputs()
    transcoder.runs_dense = False
    named = dict(transcoder.named_parameters())
    tensors = {name: view(named[owner]) for name, (owner, view, _) in transcoder.views().items()}
    expected = by_hand(encoder, tensors, x).relu()
    weights = torch.rand(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    trained = list(named.values())
    grads = torch.autograd.grad((expected * weights).sum(), trained, allow_unused=True)
    for buffered in (False, True, True):
        if buffered:
            reuse_gradients(p for p in trained if is_matrix(p, D))
        transcoder.zero_grad()
        dense = transcoder.encode_normalised(x).features.dense()
        torch.testing.assert_close(dense, expected, rtol=1e-10, atol=1e-12)
        (dense * weights).sum().backward()
        for (name, p), grad in zip(named.items(), grads, strict=True):
            got = torch.zeros_like(p) if p.grad is None else p.grad
            expected_grad = torch.zeros_like(p) if grad is None else grad
            torch.testing.assert_close(got, expected_grad, rtol=1e-10, atol=1e-12, msg=name)


def written(tying: str, tensors: dict[str, Tensor], acts: Tensor) -> Tensor:
    """What features write, [B, L, D]."""
    out = []
    for t in range(L):
        rows = {
            "untied": lambda s, t=t: tensors[f"W_dec.{s:02}"][:, t - s],
            "per_source": lambda s: tensors["W_dec"][s],
            "per_target": lambda s, t=t: tensors["W_dec"][t],
        }[tying]
        out.append(torch.stack([acts[:, s] @ rows(s) for s in range(t + 1)]).sum(0))
    return torch.stack(out, 1) + tensors["b_dec"]


@pytest.mark.parametrize("tying", ["untied", "per_source", "per_target"])
def test_rows_that_are_shared_get_the_gradient_of_both_products(tying: str) -> None:
    """The loss reaches them by two ways, which write into one buffer."""
    transcoder, x = built("tied", tying, transcoder={"dtype": "float64", "path": "sparse"}), inputs()
    named = dict(transcoder.named_parameters())
    tensors = {name: view(named[owner]) for name, (owner, view, _) in transcoder.views().items()}
    chosen = transcoder.encode(x).dense().detach() > 0
    expected = written(tying, tensors, by_hand("tied", tensors, x).relu() * chosen)
    grads = torch.autograd.grad(expected.square().sum(), list(named.values()))
    reuse_gradients(p for p in named.values() if is_matrix(p, D))
    for _ in range(2):
        transcoder.zero_grad()
        out = transcoder(x)
        out.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    for (name, p), grad in zip(named.items(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_layer_by_layer_it_is_the_same(encoder: str) -> None:
    """In the language model, and for thresholds, a layer is encoded at a time."""
    for activation in ({"name": "jumprelu", "threshold": 0.2}, {"name": "topk", "k": 4, "scope": "layer"}):
        transcoder, x = built(encoder, activation=activation).eval(), inputs()
        with torch.no_grad():
            expected = transcoder(x)
            replacement = Replacement(transcoder, x)
            for layer in range(L):
                torch.testing.assert_close(replacement(layer, x[:, layer]), expected[:, layer], rtol=1e-9, atol=1e-10)
                pre = by_hand(encoder, transcoder.tensors(), x)[:, layer]
                torch.testing.assert_close(pre_activations_of(transcoder, x, layer), pre, rtol=1e-10, atol=1e-12)


def test_first_pre_activations_of_a_low_rank_have_the_size_of_a_plain_encoders() -> None:
    sizes = {}
    x = torch.randn(500, L, 32, generator=torch.Generator().manual_seed(0))
    source = {"name": "synthetic", "layers": L, "d_model": 32, "features": 64}
    for name, settings in (("plain", {}), ("low_rank", {"rank": 4}), ("low_rank", {"rank": 32}), ("low_rank", {})):
        changes = {"source": source, "transcoder": {"features": 500}, "activation": {"name": "relu"}}
        transcoder = parts(encoder={"name": name, **settings}, **changes).transcoder
        with torch.no_grad():
            h, rows, bias = transcoder.affine_form(x)
            sizes[name, rows.shape[-1]] = float((torch.einsum("blh,lfh->blf", h, rows) + bias).std())
    assert sizes.keys() == {("plain", 32), ("low_rank", 4), ("low_rank", 32), ("low_rank", 8)}
    for size in sizes.values():
        assert size == pytest.approx(sizes["plain", 32], rel=0.15)


def test_a_rank_above_d_model_is_refused() -> None:
    with pytest.raises(Refused, match=r"^encoder\.rank: 7 is more than the 6 dimensions of the model: lower it$"):
        parts(encoder={"name": "low_rank", "rank": 7})


def test_the_weights_by_name_are_those_of_plain_only() -> None:
    plain, low = (parts(encoder=ENCODERS[name]).transcoder for name in ("plain", "low_rank"))
    assert plain.W_enc is plain.encoder.W_enc and plain.W_enc.shape == (L, 10, D)
    assert not hasattr(low, "W_enc") and "W_enc" not in low.tensors()
    assert low.shape == plain.shape == (L, 10) and low.row_size == 2


@pytest.mark.parametrize("encoder", ENCODERS)
def test_saved_files_name_the_encoder_and_old_ones_are_plain(encoder: str, tmp_path: Any) -> None:
    transcoder = built(encoder)
    transcoder.save(tmp_path / "t")
    again = CrossLayerTranscoder.load(tmp_path / "t", plugins=plugins())
    assert again.choices["encoder"].config == transcoder.choices["encoder"].config
    torch.testing.assert_close(again(inputs()), transcoder(inputs()), rtol=0, atol=0)
    description = json.loads((tmp_path / "t/transcoder.json").read_text())
    assert description.pop("encoder")["name"] == ENCODERS[encoder]["name"]
    if encoder == "plain":
        with atomic_folder(tmp_path / "old", Single()) as folder:
            (folder / "transcoder.json").write_text(json.dumps(description))
            (tmp_path / "t/transcoder.safetensors").rename(folder / "transcoder.safetensors")
        old = CrossLayerTranscoder.load(tmp_path / "old", plugins=plugins())
        torch.testing.assert_close(old(inputs()), transcoder(inputs()), rtol=0, atol=0)


@pytest.mark.parametrize(("encoder", "weight"), [("plain", "W_enc"), ("low_rank", "W_up"), ("tied-scaled", "scale")])
def test_where_a_loss_stopped_being_finite_is_told_for_any_encoder(encoder: str, weight: str) -> None:
    built, batch = parts(encoder=ENCODERS[encoder]), random_batch(8, L, D)
    transcoder = built.transcoder
    outcome = objective(transcoder, built.losses, batch, torch.zeros(transcoder.shape, dtype=torch.int64), 0.5)
    outcome.total.backward()
    lost = attrs.evolve(outcome, total=outcome.total * torch.nan)
    changed = transcoder.get_parameter(f"encoder.{weight}")
    assert changed.grad is not None
    changed.grad[2] = torch.inf
    with pytest.raises(Stopped, match=r"not finite .*: first in the encoder's gradient at layer 2; "):
        guard(built, lost, None, batch, 3, 0)
    with torch.no_grad():
        changed[1] = torch.nan
    with pytest.raises(Stopped, match=r"not finite .*: first in the encoder's weights at layer 1; "):
        guard(built, lost, None, batch, 3, 0)

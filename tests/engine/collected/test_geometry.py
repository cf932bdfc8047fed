"""The geometry of features against brute force: rows by trying the transcoder, norms and heads written out by hand.

Shapes: L layers, D d_model, F features per layer, V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clt_plugins import Collected, CrossLayerTranscoder, Faults, Geometry, ReadsResidual, fill_geometry
from clt_plugins.collected.geometry import compute
from clt_plugins.collected.geometry.nearest import Nearest
from clt_plugins.files.folders import MANIFEST
from clt_plugins.model.normalisation.fit import fit_to_batches
from clt_stream.language import StreamLanguageModel
from clt_stream.sites import find_sites
from tests.plugins.stream.test_residual import model_of
from tests.support.collected import make_store
from tests.support.helpers import TYINGS, parts, random_batch, stir

L, D, F, V, N = 3, 32, 23, 320, 4
FAMILIES = ["gpt2", "llama", "gemma"]


def make(tying: str = "untied", **changes: Any) -> CrossLayerTranscoder:
    source = {"name": "synthetic", "layers": L, "d_model": D, "features": 24, "active": 2.0}
    normalisation = changes.pop("normalisation", {"name": "mean_std"})
    transcoder = parts(
        source=source,
        transcoder={"features": F, "device": "cpu"},
        tying=TYINGS[tying],
        normalisation=normalisation,
        activation={"name": "topk", "k": 3},
        **changes,
    ).transcoder
    stir(transcoder)
    batch = random_batch(64, L, D, seed=5)
    fit_to_batches(transcoder, [type(batch)(batch.inputs * 3 + 1.5, batch.targets * torch.arange(1, D + 1) - 2)])
    return transcoder.eval()


@torch.no_grad()
def tried_rows(transcoder: CrossLayerTranscoder) -> Tensor:
    """What each feature writes to each layer, [L, F, L, D]: a feature of value 2, less one of value 1."""
    one = torch.eye(L * F, dtype=torch.float64).view(L * F, L, F)
    still = torch.zeros(L * F, L, D, dtype=torch.float64)
    return (transcoder.decode(2 * one, still) - transcoder.decode(one, still)).view(L, F, L, D)


@torch.no_grad()
def tried_readers(transcoder: CrossLayerTranscoder) -> Tensor:
    """What each feature reads of its layer's raw inputs, [L, F, D]: a step along each dimension."""

    def pre(x: Tensor) -> Tensor:
        h, rows, bias = transcoder.affine_form(transcoder.normaliser.inputs(x))
        return torch.einsum("blh,lfh->blf", h, rows) + bias

    steps = torch.eye(D, dtype=torch.float64)[:, None].expand(D, L, D)
    return (pre(steps) - pre(torch.zeros_like(steps))).permute(1, 2, 0)


def by_hand(model: Any, family: str, w: Tensor, norm: str) -> Tensor:
    """What a direction of the residual stream becomes behind a norm, but for σ."""
    weight = model.get_submodule(norm).weight.double()
    if family == "gpt2":
        return (w - w.mean(-1, keepdim=True)) * weight
    return w * (1 + weight if family == "gemma" else weight)


NORMS = {"gpt2": ("transformer.h.{}.ln_2", "transformer.ln_f")}
OTHER_NORMS = ("model.layers.{}.post_attention_layernorm", "model.norm")


def language_model(family: str) -> StreamLanguageModel:
    model = model_of(family).float()
    return StreamLanguageModel(model, find_sites(model, None, None, None), D, None, None, contexts=1, length=8)  # type: ignore[arg-type]


def truth(transcoder: CrossLayerTranscoder, family: str | None, model: Any) -> dict[str, Tensor]:
    """All that the geometry is chosen from, in float64."""
    exact = transcoder.clone().double()
    rows, readers = tried_rows(exact), tried_readers(exact)
    flat = rows.view(L * F, L * D)
    flat = flat / flat.norm(dim=1, keepdim=True)
    virtual = torch.zeros(L * F, L * F, dtype=torch.float64)
    for s, f, t, g in itertools.product(range(L), range(F), range(L), range(F)):
        if t > s:
            written = sum(rows[s, f, r] for r in range(s, t))
            assert isinstance(written, Tensor)
            if family is not None:
                written = by_hand(model, family, written, NORMS.get(family, OTHER_NORMS)[0].format(t))
            virtual[s * F + f, t * F + g] = written @ readers[t, g]
    out = {"cosine": flat @ flat.T, "virtual": virtual, "rows": rows, "readers": readers}
    if family is not None:
        with_sum = torch.cat([rows, rows.sum(2, keepdim=True)], 2)
        logits = by_hand(model, family, with_sum, NORMS.get(family, OTHER_NORMS)[1]) @ model.lm_head.weight.double().T
        out["logits"] = logits - logits.mean(-1, keepdim=True)
    return out


def check(number: Any, value: Any, expected: Tensor, candidates: Tensor, *, by_size: bool) -> None:
    """That these are the largest of the candidates, in order, and what they are called.

    Args:
        number, value: [n].
        expected: every number, [C].
        candidates: whether each counts, [C].
    """
    score = (expected.abs() if by_size else expected).masked_fill(~candidates, -torch.inf)
    best = score.sort(descending=True).values[: len(number)]
    best = best[best > -torch.inf]
    scale = float(expected.abs().max()) or 1.0
    count = len(best)
    assert (number[count:] == -1).all() and (value[count:] == 0).all()
    assert len(set(number[:count].tolist())) == count and candidates[torch.tensor(number[:count]).long()].all()
    of_numbers = expected[torch.tensor(number[:count]).long()]
    assert (of_numbers - torch.tensor(value[:count])).abs().max().item() <= 1e-5 * scale if count else True
    sizes = torch.tensor(value[:count]).double()
    assert ((sizes.abs() if by_size else sizes) - best).abs().max().item() <= 1e-5 * scale if count else True


def check_all(transcoder: CrossLayerTranscoder, family: str | None, lm: ReadsResidual | None) -> None:
    true = truth(transcoder, family, getattr(lm, "model", None))
    geometry = Geometry(transcoder, lm, similar=N, virtual=N, logits=3)
    shares: list[float] = []
    layers = dict(geometry.layers(shares.append))
    assert list(layers) == list(range(L))
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    numbers = torch.arange(L * F)
    for s in range(L):
        arrays: Any = layers[s]
        norms = true["rows"][s].norm(dim=2)
        np.testing.assert_allclose(arrays["norms"], norms, rtol=2e-5, atol=1e-6)
        unit = true["rows"][s] / norms.clamp_min(1e-9)[:, :, None]
        np.testing.assert_allclose(arrays["cosines"], unit @ unit.mT, atol=2e-5)
        reader = true["readers"][s] / true["readers"][s].norm(dim=1, keepdim=True)
        np.testing.assert_allclose(arrays["encoder_cosine"], (unit @ reader[:, :, None])[..., 0], atol=2e-5)
        for f in range(F):
            own = s * F + f
            similar = arrays["similar"][f], arrays["similar_cosine"][f]
            check(*similar, true["cosine"][own], numbers != own, by_size=False)
            down = arrays["downstream"][f], arrays["downstream_weight"][f]
            check(*down, true["virtual"][own], numbers >= (s + 1) * F, by_size=True)
            up = arrays["upstream"][f], arrays["upstream_weight"][f]
            check(*up, true["virtual"][:, own], numbers < s * F, by_size=True)
            for t in range(L + 1):
                for name, sign in (("up", 1), ("down", -1)):
                    number, value = (arrays[f"logits_{name}_{what}"][f, t] for what in ("id", "value"))
                    if family is None:
                        assert number.shape == (0,)
                    elif t < s:
                        assert (number == -1).all() and (value == 0).all()
                    else:
                        all_tokens = torch.ones(V, dtype=torch.bool)
                        check(number, sign * value, sign * true["logits"][s, f, t], all_tokens, by_size=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_brute_force_finds_with_a_language_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "BLOCK", 150)  # some features of a block, and a last one with fewer
    check_all(make(), family, language_model(family))


@pytest.mark.parametrize(
    ("tying", "normalisation"),
    [("per_source-affine", "whitening"), ("per_target-affine", "rms"), ("untied-skip", "none")],
)
def test_it_is_what_brute_force_finds_for_other_tyings_and_normalisations(tying: str, normalisation: str) -> None:
    check_all(make(tying, normalisation={"name": normalisation}), None, None)


def test_what_is_left_out_is_not_computed() -> None:
    geometry = Geometry(make(), similar=0, virtual=0)
    assert (geometry.info.similar, geometry.info.virtual, geometry.info.logits) == (0, 0, 0)
    for _, arrays in geometry.layers():
        assert arrays["similar"].shape == arrays["upstream"].shape == (F, 0)
        assert arrays["norms"].any()
    assert 0 < geometry.seconds() < Geometry(make()).seconds() < 10


@pytest.mark.parametrize("by_size", [False, True])
def test_the_best_of_many_blocks_are_those_of_the_whole(by_size: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20, 900, generator=generator)
    values[3] = -values[3].abs()
    for order in ("rows", "columns"):
        best = Nearest(20, 5, torch.device("cpu"), by_size=by_size)
        for row, column in itertools.product(range(0, 20, 7), [*range(0, 896, 128), 896]):  # the last one has 4
            block = values[row : row + 7, column : min(column + 128, 900)]
            best.see(row, block if order == "rows" else block.T.contiguous().T, 1000 + column)
        number, value = best.best()
        expected = (values.abs() if by_size else values).sort(1, descending=True).indices[:, :5]
        assert torch.equal(number, (1000 + expected).int())
        assert torch.equal(value, values.gather(1, expected))


def test_a_transcoder_with_weights_that_are_not_finite_is_refused() -> None:
    transcoder = make()
    with torch.no_grad():
        transcoder.tying.expand(1)[3, 0, 2] = torch.nan
    with pytest.raises(Faults, match="transcoder: decoder rows of layer 1 are not finite"):
        list(Geometry(transcoder).layers())


# -- a store that is there already ------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def store_of(folder: Path, features: int) -> Path:
    make_store(folder, layers=L, d_model=D, features=features)
    return folder


def test_a_store_gets_its_geometry_and_keeps_all_else(tmp_path: Path) -> None:
    folder = store_of(tmp_path / "store", F)
    before, store = digests(folder), Collected.open(folder)
    spelled = dict(zip(store.vocabulary.token.tolist(), store.spell(store.vocabulary.token), strict=True))
    geometry = Geometry(make(), language_model("gpt2"), similar=N, virtual=N, logits=3)
    fill_geometry(folder, geometry, lambda ids: [b"token %d" % one for one in ids])
    after = Collected.open(folder)
    assert after.info.geometry == geometry.info
    changed = {name for name, digest in digests(folder).items() if before.get(name) != digest}
    others = "vocabulary.safetensors", "collected.json", MANIFEST
    assert changed <= {*(f"geometry_{n:02}.safetensors" for n in range(L)), *others}
    for layer, arrays in geometry.layers():
        for name, array in arrays.items():
            np.testing.assert_array_equal(after.layer(layer)[name], array)
        for number in np.unique(arrays["logits_up_id"][:, L]).tolist():
            assert after.spell([number]) == [spelled.get(number, b"token %d" % number)]


def test_a_store_of_another_transcoder_is_refused_and_stays(tmp_path: Path) -> None:
    folder = store_of(tmp_path / "store", F + 1)
    before = digests(folder)
    with pytest.raises(
        Faults, match=rf"collected with a transcoder of 3 layers, d_model 32 and {F + 1} features, not 3"
    ):
        fill_geometry(folder, Geometry(make()))
    assert digests(folder) == before

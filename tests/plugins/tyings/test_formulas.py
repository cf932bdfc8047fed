"""The formulas of the decoders, against loops over single numbers in float64.

The weights are read by their names in files: `W_dec.SS` [F, L - s, D], or `W_dec` [L, F, D]; `feature_offset` and
`feature_scale` [L, F]; `b_dec` [L, D]; `W_skip` [L, D, D].
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clt_plugins import Features, Pairs
from tests.support.helpers import parts, stir

B, L, D, F = 4, 3, 6, 10
OPTIONS = [(offset, scale, skip) for offset in (False, True) for scale in (False, True) for skip in (False, True)]
CASES: list[dict[str, Any]] = [
    *({"name": name, "skip": skip} for name in ("untied", "per_layer") for skip in (False, True)),
    *(
        {"name": name, "feature_offset": offset, "feature_scale": scale, "skip": skip}
        for name in ("per_source", "per_target")
        for offset, scale, skip in OPTIONS
    ),
]


def spell(settings: dict[str, Any]) -> str:
    return "-".join([settings["name"], *(name for name, value in settings.items() if value is True)])


def built(settings: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """A tying with parameters at no special value, and its tensors by their names in files."""
    transcoder = parts(tying=settings, transcoder={"dtype": "float64"}).transcoder
    stir(transcoder, scale=0.5)
    return transcoder.tying, transcoder.tensors()


def weight(name: str, tensors: dict[str, Tensor], s: int, t: int, f: int, d: int) -> float:
    """What feature f of layer s writes to dimension d of layer t, for a value of 1."""
    if name == "untied":
        return float(tensors[f"W_dec.{s:02}"][f, t - s, d])
    if name == "per_layer" and s != t:
        return 0.0
    return float(tensors["W_dec"][s if name == "per_source" else t, f, d])


def g(tensors: dict[str, Tensor], a: float, t: int, f: int) -> float:
    """(a + offset_t) * scale_t of an active feature, 0 of another one."""
    if a <= 0:
        return 0.0
    offset = float(tensors["feature_offset"][t, f]) if "feature_offset" in tensors else 0.0
    scale = float(tensors["feature_scale"][t, f]) if "feature_scale" in tensors else 1.0
    return (a + offset) * scale


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    "settings", CASES, ids=lambda case: "-".join(key for key, on in case.items() if on) + case["name"]
)
def test_a_target_gets_what_features_of_its_layer_and_earlier_ones_write(settings, sparse: bool) -> None:
    tying, tensors = built(settings)
    acts, inputs = draw(B, L, F, seed=1).relu(), draw(B, L, D, seed=2)
    assert 0 < int((acts == 0).sum()) < acts.numel()
    features = Features(acts)
    if sparse:
        # All pairs are selected, those of value 0 too: they are not active.
        pairs = Pairs.from_mask(torch.ones_like(acts, dtype=torch.bool))
        features = Features(acts.flatten(), pairs)
    out = (tying.decode(features) + tying.affine(inputs)).detach()

    expected = torch.zeros(B, L, D, dtype=torch.float64)
    for b, t, d in itertools.product(range(B), range(L), range(D)):
        total = float(tensors["b_dec"][t, d])
        if settings.get("skip"):
            total += sum(float(inputs[b, t, i]) * float(tensors["W_skip"][t, i, d]) for i in range(D))
        for s, f in itertools.product(range(t + 1), range(F)):
            total += g(tensors, float(acts[b, s, f]), t, f) * weight(settings["name"], tensors, s, t, f, d)
        expected[b, t, d] = total
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", CASES[::2], ids=spell)
def test_the_norm_of_a_feature_is_that_of_all_it_writes_per_unit_of_activation(settings) -> None:
    tying, tensors = built(settings)
    norms = tying.norms()
    assert not norms.requires_grad
    for s, f in itertools.product(range(L), range(F)):
        square = 0.0
        for t, d in itertools.product(range(s, L), range(D)):
            scale = float(tensors["feature_scale"][t, f]) if "feature_scale" in tensors else 1.0
            square += (scale * weight(settings["name"], tensors, s, t, f, d)) ** 2
        assert float(norms[s, f]) == pytest.approx(math.sqrt(square), rel=1e-5)


@pytest.mark.parametrize("name", ["per_source", "per_target"])
def test_an_offset_that_all_targets_share_is_a_shift_and_others_are_refused(name: str) -> None:
    tying, _ = built({"name": name, "feature_offset": True})
    with pytest.raises(ValueError, match=r"^tying\.feature_offset: differs between target layers"):
        tying.shift(0)
    shared = draw(F, seed=4)
    with torch.no_grad():
        tying.offset.copy_(shared.expand(L, F))
    assert all(torch.equal(tying.shift(layer), shared) for layer in range(L))
    assert built({"name": name})[0].shift(0) is None

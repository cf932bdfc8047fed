"""The encoder under selections: a bias that selections add themselves, as on a GPU, changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clt_plugins import Top, load_plugins
from clt_plugins.model import encoder
from clt_plugins.model.devices import make_kernels

B, L, D, F = 12, 3, 16, 40


def narrow_product(x: torch.Tensor, weight: torch.Tensor, product: Any) -> torch.Tensor:
    """What a GPU gives: a product of bfloat16 numbers, summed in float32, without the bias."""
    return x.bfloat16().float() @ weight.bfloat16().float().T


def selections(kernels: Any) -> list[Top]:
    dead = torch.tensor([[1, 5, 6, 39]] * L)
    norms = torch.linspace(0.5, 2, F)
    return [
        Top(5, B, L, F, per="batch", kernels=kernels),
        Top(4, B, L, F, per="token", kernels=kernels, columns=dead),
        Top(5, B, L, F, per="token", kernels=kernels, affine=lambda layer, pre: (norms, None)),
        Top(5, B, L, F, per="batch", kernels=kernels, score=lambda layer, pre: pre.abs()),
    ]


@pytest.mark.parametrize("name", ["torch", "numba"])
def test_a_bias_that_selections_add_gives_the_same_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = make_kernels(name, torch.device("cpu"), load_plugins())
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(B, L, D, generator=numbers)
    weight = torch.randn(L, F, D, generator=numbers).bfloat16()
    # Large beside the products: without it, other pairs are the best.
    bias = 4 * torch.randn(L, F, generator=numbers)
    monkeypatch.setattr(encoder, "without_bias", narrow_product)
    apart = encoder.encode_selected(x, weight, bias, selections(kernels), kernels, "bf16")
    monkeypatch.setattr(Top, "adds_bias", False)
    added = encoder.encode_selected(x, weight, bias, selections(kernels), kernels, "bf16")
    for (pairs, values), (others, expected) in zip(apart, added, strict=True):
        assert torch.equal(pairs.token, others.token) and torch.equal(pairs.feature, others.feature)
        assert torch.equal(values, expected)
    monkeypatch.setattr(encoder, "without_bias", lambda x, weight, product: narrow_product(x, weight, product) * 0)
    only_bias = encoder.encode_selected(x, weight, bias, selections(kernels)[:1], kernels, "bf16")[0][0]
    assert not torch.equal(only_bias.feature, apart[0][0].feature)

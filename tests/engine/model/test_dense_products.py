"""The dense products: their numbers and gradients, where gradients are written, and the types they run in."""

from __future__ import annotations

import pytest
import torch

from clt_plugins import Layout, Refused, dense_decode
from clt_plugins.model.products.dense import encode_dense
from clt_plugins.model.products.matrix import affine, check_product, wide_product
from clt_plugins.model.sparse import reuse_gradients
from tests.support.helpers import parts

B, L, F, D = 4, 3, 5, 2
ONE = Layout(F, (F,), (1,), (0,), (1,), L * F)
"""Source layer 1 alone, of an own-layer weight."""


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("layout", [Layout.untied(L, F), Layout.own_layer(L, F), ONE], ids=["untied", "own", "one"])
def test_decode_and_its_gradients(layout):
    values, weight = numbers(B, layout.n_layers, F).requires_grad_(), numbers(layout.rows, D, seed=1).requires_grad_()
    expected = torch.zeros(B, layout.n_layers, D, dtype=torch.float64)
    for s in range(layout.n_layers):
        for f in range(F):
            for j in range(layout.count[s]):
                row = weight.detach()[layout.first[s] + f * layout.step[s] + j * layout.stride[s]]
                expected[:, s + j] += values.detach()[:, s, f, None] * row
    torch.testing.assert_close(dense_decode(values, weight, layout), expected)
    assert torch.autograd.gradcheck(lambda v, w: dense_decode(v, w, layout), (values, weight))


def test_encode_and_its_gradients():
    inputs, weight, bias = (x.requires_grad_() for x in (numbers(B, L, D), numbers(L, F, D), numbers(L, F)))
    torch.testing.assert_close(encode_dense(inputs, weight, bias), torch.einsum("bld,lfd->blf", inputs, weight) + bias)
    assert torch.autograd.gradcheck(encode_dense, (inputs, weight, bias))


def test_gradients_of_several_terms_are_added_in_the_buffer():
    """One source layer after the other, as `per_source` decodes: rows of the others must be 0 after the first."""
    weight = torch.nn.Parameter(numbers(L, F, D))
    values, dense = numbers(B, L, F), numbers(B, L, D, seed=3)
    layouts = [Layout(F, (s * F,), (1,), (0,), (1,), L * F) for s in (2, 0, 2)]
    sources = [2, 0, 2]

    def total() -> torch.Tensor:
        terms = [
            (dense_decode(values[:, s, None], weight, one) * dense[:, s, None]).sum()
            for s, one in zip(sources, layouts, strict=True)
        ]
        return torch.stack(terms).sum()

    (expected,) = torch.autograd.grad(total(), weight)
    reuse_gradients([weight])
    for _ in range(2):
        weight.grad = None
        total().backward()
        torch.testing.assert_close(weight.grad, expected)
        weight.grad_buffer.fill_(torch.nan)  # what a step leaves behind is not read by the next


def test_bfloat16_weights_are_multiplied_in_the_type_of_the_values_on_a_cpu():
    values, rows = numbers(6, 7).float(), numbers(7, 3).bfloat16()
    assert torch.equal(wide_product(values, rows), values @ rows.float())


@pytest.mark.parametrize("activation", [{"name": "batchtopk", "k": 5}, {"name": "relu"}], ids=["batchtopk", "relu"])
def test_values_and_reconstruction_stay_float32_with_bfloat16_weights(activation):
    transcoder = parts(transcoder={"dtype": "bfloat16"}, activation=activation).transcoder
    x = torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(0))
    features = transcoder.encode_normalised(x).features
    assert features.values.dtype == torch.float32
    assert transcoder.reconstruct(features, x).dtype == torch.float32
    pre = torch.einsum("bld,lfd->blf", x, transcoder.W_enc.float()) + transcoder.b_enc.float()
    active = features.dense() > 0
    torch.testing.assert_close(features.dense()[active], pre[active], rtol=1e-5, atol=1e-6)


def test_an_fp8_product_is_near():
    """Numbers in [1, 2) have 8 steps: each is off by 2^-4 at most, a sum of 64 products by much less."""
    x, weight, bias = numbers(16, 64).float(), numbers(32, 64, seed=1).float(), numbers(32, seed=2).float()
    exact = x @ weight.T + bias
    off = (affine(x, weight, bias, "fp8") - exact).norm() / exact.norm()
    assert 1e-3 < off < 2**-4


@pytest.mark.parametrize(
    ("product", "sizes", "word"),
    [
        ("tf32", {"row_size": 16, "n_features": 16}, "Ampere"),
        ("fp8", {"row_size": 24, "n_features": 16}, "divisible by 16"),
        ("fp8", {"row_size": 16, "n_features": 8}, "divisible by 16"),
    ],
)
def test_a_product_that_is_not_there_is_refused(product, sizes, word):
    with pytest.raises(Refused, match=word):
        check_product(product, torch.device("cpu"), **sizes)


def test_a_recipe_that_asks_for_tf32_on_a_cpu_is_refused():
    with pytest.raises(Refused, match=r"train\.precision"):
        parts(train={"precision": "tf32"})


def test_evaluation_multiplies_in_the_weights_type_whatever_training_does():
    """Pairs just above their threshold were lost, which the saved transcoder does not lose."""
    chosen = {"features": 64, "path": "sparse"}
    transcoder = parts(activation={"name": "jumprelu", "threshold": 0.2}, transcoder=chosen).transcoder
    x = torch.randn(512, 3, 6, generator=torch.Generator().manual_seed(0))
    transcoder.eval()
    exact = transcoder.encode(x).dense() > 0
    transcoder.product = "bf16"
    assert torch.equal(transcoder.encode(x).dense() > 0, exact)

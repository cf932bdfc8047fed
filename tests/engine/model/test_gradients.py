"""Gradients of the sparse products: with kernels that compute both at once, in a kept buffer, of bfloat16 biases."""

from __future__ import annotations

import pytest
import torch

from clt_kernels.reference import TorchKernels
from clt_plugins import Layout, Pairs
from clt_plugins.model.sparse import pre_activations, reuse_gradients, row_squares, sparse_decode
from clt_plugins.testing.sparse_products import Problem, random_mask
from clt_plugins.training.objective import objective
from tests.support.helpers import parts, random_batch, stir


class AtOnce(TorchKernels):
    """Kernels that have the ability `BothGradients`."""

    calls = 0

    def gradients(
        self, values, pairs, layout, weight, dense, grad_values, grad_rows, *, overwrite, squares=None, sums=None
    ):
        self.calls += 1
        if grad_values is not None:
            self.grad_values(dense, pairs, layout, weight, grad_values)
        self.grad_rows(values, pairs, layout, dense, grad_rows, overwrite=overwrite)
        if squares is not None:
            squares.copy_(grad_rows.square().sum(1))
        if sums is not None:
            sums.zero_().index_add_(0, pairs.feature, values.to(sums.dtype))


def small(layout: Layout) -> Problem:
    return Problem.random(layout, random_mask(5, 3, 4, 0.4), 6, torch.float64, per_target=False)


def test_both_gradients_at_once_are_those_of_the_single_products():
    problem, results = small(Layout.untied(3, 4)), []
    for kernels in (TorchKernels(), AtOnce()):
        values, weight = problem.values.clone().requires_grad_(), problem.weight.clone().requires_grad_()
        out = sparse_decode(values, problem.pairs, weight, problem.layout, kernels)
        (out * problem.dense).sum().backward()
        results.append((values.grad, weight.grad))
    assert kernels.calls == 1
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("trained", ["weight and bias", "bias"])
@pytest.mark.parametrize("kernels", [TorchKernels(), AtOnce()], ids=["single", "at once"])
def test_gradients_of_pre_activations(kernels, trained):
    """Against autograd through the dense product."""
    problem = small(Layout.own_layer(3, 4))
    pairs, inputs = problem.pairs, problem.dense.clone().requires_grad_()
    weight = problem.weight.view(3, 4, 6).clone().requires_grad_(trained != "bias")
    bias = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    dense = torch.einsum("bld,lfd->blf", inputs, weight) + bias
    kept = dense.flatten(1)[pairs.token, pairs.feature]
    wanted = [x for x in (inputs, weight, bias) if x.requires_grad]
    expected = torch.autograd.grad((kept * problem.values).sum(), wanted)
    out = pre_activations(kept.detach(), inputs, weight, bias, pairs, kernels)
    for got, right in zip(torch.autograd.grad((out * problem.values).sum(), wanted), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


def test_a_bfloat16_bias_counts_beyond_256():
    """4096 ones, summed in bfloat16, are 256."""
    tokens = 4096
    pairs = Pairs(torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64), tokens, 1, 1)
    bias = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(1, 1, 2, dtype=torch.bfloat16, requires_grad=True)
    out = pre_activations(torch.zeros(tokens), torch.ones(tokens, 1, 2), weight, bias, pairs, TorchKernels())
    out.sum().backward()
    assert bias.grad.item() == tokens
    assert weight.grad.flatten().tolist() == [tokens, tokens]


def test_squares_are_known_while_the_kernels_alone_wrote_the_gradient():
    problem, kernels = small(Layout.untied(3, 4)), AtOnce()
    weight = torch.nn.Parameter(problem.weight.clone())

    def backward(kernels: TorchKernels) -> None:
        out = sparse_decode(problem.values, problem.pairs, weight, problem.layout, kernels)
        (out * problem.dense).sum().backward()

    backward(kernels)
    assert row_squares(weight) is None  # autograd added the gradient up
    weight.grad = None
    reuse_gradients([weight])
    for _ in range(2):  # the second term adds to the first
        backward(kernels)
        torch.testing.assert_close(row_squares(weight), weight.grad.square().sum(1).float())
    backward(TorchKernels())  # kernels that do not tell
    assert row_squares(weight) is None
    backward(kernels)
    assert row_squares(weight) is None
    weight.grad = None
    assert row_squares(weight) is None
    backward(kernels)
    assert row_squares(weight) is not None
    weight.grad.mul_(2)  # clipped, say
    assert row_squares(weight) is None


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_with_bfloat16_weights_features_reconstruction_and_losses_are_those_of_float32(kernels):
    """Of the same weights: only they are rounded, not what is computed from them."""
    results, weights = [], []
    # All are kept: a product in bfloat16 would choose others.
    activation = {"name": "topk", "k": 4, "scope": "layer", "anneal_from": 1.0}
    for dtype in ("bfloat16", "float32"):
        built = parts(activation=activation, transcoder={"dtype": dtype, "features": 4}, kernels={"name": kernels})
        stir(built.transcoder)
        with torch.no_grad():
            weights = weights or [p.float() for p in built.transcoder.parameters()]
            for parameter, weight in zip(built.transcoder.parameters(), weights, strict=True):
                parameter.copy_(weight)
        transcoder = built.transcoder.train()
        batch = random_batch(16, transcoder.n_layers, transcoder.d_model)
        idle = torch.zeros(transcoder.b_enc.shape, dtype=torch.int64)
        outcome = objective(transcoder, built.losses, batch, idle, 0.5)
        outcome.total.backward()
        results.append((outcome, [p.grad for p in transcoder.parameters()]))
    (low, low_grads), (full, full_grads) = results
    assert low.features.values.dtype == low.reconstruction.dtype == torch.float32
    # Up to the order of sums, which differs between products of different types.
    torch.testing.assert_close(low.reconstruction, full.reconstruction, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(low.total, full.total, rtol=1e-5, atol=0)
    for one, two in zip(low_grads, full_grads, strict=True):
        # Gradients are kept in the weights' type: eight bits.
        assert (one.float() - two).norm() <= 2**-8 * two.norm()

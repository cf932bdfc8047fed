"""The sparse path against the dense reference: outputs, every loss, every gradient; and gradcheck."""

from __future__ import annotations

import attrs
import pytest
import torch

from clt_kernels.reference import TorchKernels
from clt_plugins.model.sparse import reuse_gradients
from clt_plugins.training.objective import objective
from tests.support.helpers import ACTIVATIONS, ALL_LOSSES, TYINGS, parts, random_batch, stir

KERNELS = ["torch", "numba"]


def forward_backward(path: str, dtype: str, activation: str, tying: str, kernels: str, losses, tokens: int = 16):
    built = parts(
        activation=ACTIVATIONS[activation],
        tying=TYINGS[tying],
        losses=losses,
        kernels={"name": kernels},
        transcoder={"features": 10, "path": path, "dtype": dtype, "device": "cpu"},
    )
    transcoder = built.transcoder
    stir(transcoder)
    batch = random_batch(tokens, 3, 6, getattr(torch, dtype))
    idle = torch.zeros(3, 10, dtype=torch.int64)
    idle[:, ::3] = 1000  # dead, so that AuxK has something to do
    outcome = objective(transcoder, built.losses, batch, idle, 0.5)
    return transcoder, outcome


def assert_same(dense, sparse, tolerance: float) -> None:
    (model, first), (other, second) = dense, sparse
    torch.testing.assert_close(second.reconstruction, first.reconstruction, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(second.features.dense(), first.features.dense(), rtol=tolerance, atol=tolerance)
    for name, value in first.terms.items():
        torch.testing.assert_close(second.terms[name], value, rtol=tolerance, atol=0)
    first.total.backward()
    second.total.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        largest = p.grad.abs().max()
        assert largest > 0, f"{name} has no gradient: this test would not notice a wrong one"
        assert (p.grad - q.grad).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("tying", TYINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_losses_and_gradients_are_those_of_the_dense_path(activation, tying, kernels):
    # fp64: both paths add the same numbers in another order, so only rounding differs.
    dense = forward_backward("dense", "float64", activation, tying, "torch", ALL_LOSSES)
    sparse = forward_backward("sparse", "float64", activation, tying, kernels, ALL_LOSSES)
    assert_same(dense, sparse, 1e-11)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("tying", TYINGS)
@pytest.mark.parametrize("activation", ["jumprelu", "topk", "batchtopk"])
def test_in_float32_they_agree_to_1e_5(activation, tying, kernels):
    dense = forward_backward("dense", "float32", activation, tying, "torch", ALL_LOSSES)
    sparse = forward_backward("sparse", "float32", activation, tying, kernels, ALL_LOSSES)
    assert_same(dense, sparse, 1e-5)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_a_loss_that_reads_all_pre_activations_works_on_both_paths(path):
    losses = [*ALL_LOSSES, {"name": "preactivation", "weight": 0.3}]
    dense = forward_backward("dense", "float64", "batchtopk", "untied", "torch", losses)
    assert dense[1].terms["preactivation"] > 0
    assert_same(dense, forward_backward(path, "float64", "batchtopk", "untied", "numba", losses), 1e-11)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_auxk_reconstructs_with_dead_features_only_also_where_they_are_fewer_than_k(path, precision):
    changes = {"losses": ALL_LOSSES, "transcoder": {"features": 10, "path": path, "device": "cpu"}}
    built = parts(**changes, train={"precision": precision})
    stir(built.transcoder)
    idle = torch.zeros(3, 10, dtype=torch.int64)
    idle[1, 4] = 1000
    objective(built.transcoder, built.losses[2:], random_batch(16, 3, 6), idle, 0.5).total.backward()
    rows = built.transcoder.W_enc.grad.abs().sum(-1)
    assert rows[1, 4] > 0
    assert rows.sum() == rows[1, 4]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("tying", TYINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, tying, kernels):
    """Numerical derivatives of the loss by every parameter; JumpReLU's threshold has a straight-through gradient."""
    transcoder, _ = forward_backward("sparse", "float64", activation, tying, kernels, ALL_LOSSES, 8)
    if activation == "jumprelu":
        # Inside the window the threshold's gradient is not the derivative: hold the thresholds fixed.
        transcoder.activation.log_threshold.requires_grad_(False)
    batch = random_batch(8, 3, 6, torch.float64)
    names = [name for name, p in transcoder.named_parameters() if p.requires_grad]

    def loss(*values: torch.Tensor) -> torch.Tensor:
        def run(module: torch.nn.Module) -> torch.Tensor:
            x = transcoder.normaliser.inputs(batch.inputs)
            encoded = module.encode_normalised(x)
            y = module.reconstruct(encoded.features, x)
            return (y - batch.targets).square().sum() + encoded.features.values.tanh().sum()

        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(_Call(transcoder, run), {f"module.{k}": v for k, v in state.items()}, ())

    values = [p.detach().clone().requires_grad_() for p in transcoder.parameters() if p.requires_grad]
    # A step of 1e-7 does not change which features are kept: their pre-activations are further apart.
    assert torch.autograd.gradcheck(loss, values, eps=1e-7, atol=1e-5, rtol=1e-4, fast_mode=True)


class _Call(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, function):
        super().__init__()
        self.module = module
        self.function = function

    def forward(self) -> torch.Tensor:
        return self.function(self.module)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_empty_places_of_a_selection_of_fixed_sizes_count_nothing(path):
    """They all lie at the last token's last feature, whose value the dense path multiplied by their number."""
    found = []
    for fixed in (False, True):
        built = parts(
            activation={"name": "batchtopk", "k": 20},
            transcoder={"features": 40, "path": path, "dtype": "float64", "device": "cpu"},
            kernels={"name": "torch"},
        )
        transcoder = built.transcoder
        stir(transcoder)
        transcoder.encoder.b_enc.data[-1, -1] += 5  # that feature is active
        for part in (transcoder, transcoder.activation):
            part.context = attrs.evolve(part.context, kernels=TorchKernels(fixed=fixed))
        transcoder.activation.schedule(0.55)  # k falls, and there are places for a larger one
        found.append(transcoder.encode_normalised(random_batch(16, 3, 6, torch.float64).inputs).features)
    assert path == "dense" or int(found[1].pairs.count) < len(found[1].pairs.token), "there are empty places"
    assert torch.equal(found[0].dense(), found[1].dense()) and found[0].dense()[-1, -1, -1] > 0


@pytest.mark.parametrize("activation", ["topk", "topk-layer-norm", "topk-share"])
def test_exactly_k_features_of_each_token(activation):
    transcoder, outcome = forward_backward("sparse", "float64", activation, "untied", "numba", ALL_LOSSES)
    pairs = outcome.features.pairs
    wanted = {"topk": 4, "topk-layer-norm": 6, "topk-share": 4}[activation]  # 0.11 * 30 = 3.3, rounded up
    assert torch.bincount(pairs.token, minlength=16).tolist() == [wanted] * 16


@pytest.mark.parametrize("activation", ["batchtopk", "batchtopk-norm", "batchtopk-layer-zscore"])
def test_exactly_k_times_b_features_of_a_batch(activation):
    _, outcome = forward_backward("sparse", "float64", activation, "untied", "numba", ALL_LOSSES)
    wanted = {"batchtopk-layer-zscore": 2 * 3 * 16}.get(activation, 5 * 16)
    assert len(outcome.features.pairs.token) == wanted


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_no_feature_is_negative(activation, path):
    _, outcome = forward_backward(path, "float64", activation, "untied", "numba", ALL_LOSSES)
    assert (outcome.features.values >= 0).all()
    assert (outcome.features.values > 0).any()


def test_gradients_written_in_place_are_the_same_over_steps():
    fresh = forward_backward("sparse", "float64", "topk", "untied", "numba", ALL_LOSSES)
    reused = forward_backward("sparse", "float64", "topk", "untied", "numba", ALL_LOSSES)
    reuse_gradients([reused[0].W_enc, reused[0].tying.weight])
    fresh[1].total.backward()
    reused[1].total.backward()
    place = reused[0].tying.weight.grad.data_ptr()
    for p, q in zip(fresh[0].parameters(), reused[0].parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-12, atol=1e-14)
    # Another batch: what the first one left in the buffer must be gone.
    built = parts(losses=ALL_LOSSES)
    batch, idle = random_batch(5, 3, 6, torch.float64, seed=9), torch.zeros(3, 10, dtype=torch.int64)
    for model in (fresh[0], reused[0]):
        for p in model.parameters():
            p.grad = None
        objective(model, built.losses, batch, idle, 0.5).total.backward()
    assert reused[0].tying.weight.grad.data_ptr() == place
    for p, q in zip(fresh[0].parameters(), reused[0].parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-12, atol=1e-14)


def test_gradients_reach_the_inputs():
    """Attribution needs them: the derivative of the reconstruction by the MLP inputs."""
    built = parts(transcoder={"features": 10, "dtype": "float64", "device": "cpu"}, activation={"name": "topk", "k": 4})
    stir(built.transcoder)
    x = random_batch(4, 3, 6, torch.float64).inputs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: built.transcoder(x), [x], eps=1e-7, atol=1e-5, rtol=1e-4)


def test_relu_runs_sparse_once_few_features_are_active():
    built = parts(activation={"name": "relu"})
    assert built.transcoder.runs_dense
    built.transcoder.settle(0.3)
    assert built.transcoder.runs_dense
    built.transcoder.settle(0.01)
    assert not built.transcoder.runs_dense
    built.transcoder.settle(0.03)  # not back at once: the bounds are a factor apart
    assert not built.transcoder.runs_dense
    assert not parts(activation={"name": "topk", "k": 3}).transcoder.runs_dense

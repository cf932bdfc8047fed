"""Mutations of an activation with state that the kit once let pass: each is found, by one failure."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.faulty import HEADER, assert_only, needs_ranks

FBT = """
import torch

class Counting(Top):
    def __init__(self, activation, *shape, **how):
        super().__init__(*shape, **how)
        self.activation = activation

    def finish(self):
        pairs, pre = super().finish()
        self.activation.count(pairs)
        return pairs, pre

class Activation(torch.nn.Module):
    fixed_size = True

    def __init__(self, context):
        super().__init__()
        self.context, self.k = context, 8
        shard = context.parallel.shard(context.n_features)
        zeros = torch.zeros(context.n_layers, len(shard), dtype=context.dtype, device=context.device)
        STATE

    @torch.no_grad()
    def count(self, pairs):
        if not self.training:
            return
        LAZY
        counts = torch.zeros_like(self.frequency).flatten()
        counts.index_add_(0, pairs.feature, torch.ones_like(pairs.feature, dtype=counts.dtype))
        share = TOTAL / (pairs.tokens * self.context.parallel.batch_ranks)
        self.frequency.lerp_(share.view_as(self.frequency).to(self.frequency.dtype), 0.1)

    def schedule(self, progress):
        self.k = 8 if progress > 0.4 else 12

    def selection(self, tokens, norms):
        context = self.context
        return Counting(
            self, SCHEDULED, tokens, context.n_layers, context.n_features, per="batch", kernels=context.kernels,
            parallel=context.parallel, affine=lambda layer, pre: (None, PENALTY),
        )

    def forward(self, pre, feature):
        return pre.RELU()

@hookimpl
def clt_activations():
    return [Spec("mine", Config, lambda config, context: Activation(context))]
"""
FBT_RIGHT = {
    "STATE": "self.frequency = parameter(zeros, feature_axis=1).requires_grad_(False)",
    "LAZY": "pass",
    "TOTAL": "self.context.parallel.total(counts, over='tokens')",
    "SCHEDULED": "self.k if self.training else 8",
    "PENALTY": "-3 * self.frequency[layer]",
    "RELU": "relu",
}
FBT_CHECKS = ("selection", "schedule", "gradient", "own_gradient", "sparse_is_dense", "resume", "determinism")


@pytest.mark.slow
def test_an_activation_with_state_passes_all_checks(check: Any) -> None:
    """Also `gradient`: its state is taken back before each evaluation."""
    needs_ranks()
    found = check(HEADER + FBT, (*FBT_CHECKS, "tensor_parallel", "data_parallel", "save_load", "no_sync"), **FBT_RIGHT)
    assert found.pop("own_gradient") == "skip: it has no parameters"
    assert set(found.values()) == {"pass"}


@pytest.mark.parametrize(
    ("part", "name", "text"),
    [
        ({"RELU": "relu_"}, "selection", "`forward` to leave the pre-activations as they are"),
        ({"SCHEDULED": "self.k"}, "schedule", "features in eval mode at 50%"),
        ({"STATE": "self.frequency = zeros"}, "resume", "`frequency`"),
        (
            {
                "STATE": "self.frequency = None",
                "LAZY": "self.frequency = torch.zeros(self.context.n_layers, 41) if self.frequency is None "
                "else self.frequency",
                "PENALTY": "None if self.frequency is None else -3 * self.frequency[layer].to(pre.dtype)",
            },
            "resume",
            "`frequency`",
        ),
        ({"STATE": "self.frequency = parameter(zeros, feature_axis=1)"}, "own_gradient", "requires_grad_(False)"),
    ],
    ids=["inplace_fwd", "evaldep", "plainattr", "lazy", "reqgrad"],
)
def test_an_activation_that_is_wrong_in_one_way(check: Any, part: dict[str, str], name: str, text: str) -> None:
    found = check(HEADER + FBT, FBT_CHECKS, **{**FBT_RIGHT, **part})
    assert_only(found, name, text)


def test_an_activation_whose_state_is_that_of_one_data_rank(check: Any) -> None:
    needs_ranks()
    found = check(HEADER + FBT, ("data_parallel",), **{**FBT_RIGHT, "TOTAL": "counts"})
    assert_only(found, "data_parallel", "state activation.frequency in step 1 on data rank 0 of 2")
    assert 'over="tokens"' in found["data_parallel"]


def test_a_parameter_that_has_all_features_on_every_rank(check: Any) -> None:
    needs_ranks()
    whole = "self.frequency = torch.nn.Parameter(zeros[:, :1].expand(-1, context.n_features).contiguous(), False)"
    found = check(
        HEADER + FBT, ("tensor_parallel",), **{**FBT_RIGHT, "STATE": whole + "; self.frequency.feature_axis = 1"}
    )
    assert_only(found, "tensor_parallel", "of 41 features")  # of the rank that is first
    assert "context.parallel.shard" in found["tensor_parallel"]


def test_a_gradient_of_a_float32_parameter_is_checked_in_float64(check: Any) -> None:
    scaled = {
        "STATE": "self.frequency = parameter(zeros, feature_axis=1).requires_grad_(False); "
        "self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float32, device=context.device))",
        "pre.RELU()": "pre.relu() * self.scale.square().to(pre.dtype)",
    }
    right = {name: text for name, text in FBT_RIGHT.items() if name not in ("STATE", "RELU")}
    assert check(HEADER + FBT, ("own_gradient",), **scaled, **right) == {"own_gradient": "pass"}

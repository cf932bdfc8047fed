"""Activations that are wrong in one way each: the kit finds the fault and says where to look."""

from __future__ import annotations

from typing import Any

import pytest

from clt_plugins.registry.plugins import load_plugins
from tests.support.faulty import HEADER, assert_only

ACTIVATION = """
import torch

class Activation(torch.nn.Module):
    fixed_size = True

    def __init__(self, context):
        super().__init__()
        self.context = context

    def selection(self, tokens, norms):
        context = self.context
        # The features of all ranks where `Top` knows of ranks, else this rank's.
        features = context.n_features if PARALLEL else len(context.parallel.shard(context.n_features))
        parallel = context.parallel if PARALLEL else None
        return Top(8, tokens, context.n_layers, features, per="token", kernels=context.kernels, parallel=parallel)

    def forward(self, pre, feature):
        return pre.relu()

@hookimpl
def clt_activations():
    return [Spec("mine", Config, lambda config, context: Activation(context))]
"""


def test_a_topk_that_forgets_other_ranks(failures: Any) -> None:
    if "tensor" not in load_plugins().choices("parallel"):
        pytest.skip("no choice 'tensor' for [parallel] is installed")
    assert failures(HEADER + ACTIVATION, PARALLEL="True") == {}
    found = failures(HEADER + ACTIVATION, PARALLEL="False")
    assert found.keys() == {"mine/tensor_parallel"}
    assert "features on rank 0 of 2 as in one process" in found["mine/tensor_parallel"]
    assert "give `Top` its `parallel`" in found["mine/tensor_parallel"]


STATE = """
import torch

class Activation(torch.nn.Module):
    fixed_size = True

    def __init__(self, context):
        super().__init__()
        self.context, self.k, self.seen = context, 8, 0

    def schedule(self, progress):
        self.k = 8 if progress > 0.4 else 12

    def selection(self, tokens, norms):
        context = self.context
        if self.training and torch.is_grad_enabled():
            self.seen += 1
        shape = tokens, context.n_layers, context.n_features
        top = Top(K, *shape, per="token", kernels=context.kernels, parallel=context.parallel)
        SEE
        return top

    def forward(self, pre, feature):
        return pre.relu()FACTOR

@hookimpl
def clt_activations():
    return [Spec("mine", Config, lambda config, context: Activation(context))]
"""
AS_IT_SHOULD_BE = {"K": "self.k if self.training else 8", "SEE": "pass", "FACTOR": ""}


def test_an_activation_whose_evaluation_follows_the_schedule(failures: Any) -> None:
    assert failures(HEADER + STATE, **AS_IT_SHOULD_BE) == {}
    found = failures(HEADER + STATE, **{**AS_IT_SHOULD_BE, "K": "self.k"})
    assert found.keys() == {"mine/schedule"}
    assert "features in eval mode at 50% of the steps as at the first one" in found["mine/schedule"]


def test_a_selection_that_changes_what_it_sees(failures: Any) -> None:
    """What it keeps is right: it took a copy before."""
    see = "inner, top.see = top.see, lambda layer, pre: (inner(layer, pre.clone()), pre.relu_())"
    found = failures(HEADER + STATE, only="selection", **{**AS_IT_SHOULD_BE, "SEE": see})
    assert found.keys() == {"mine/selection"}
    assert "`see` to leave the block as it is" in found["mine/selection"]


def test_an_activation_with_a_state_that_no_checkpoint_holds(failures: Any) -> None:
    factor = " * (1 + 0.1 * self.seen)"
    found = failures(HEADER + STATE, only="resume", **{**AS_IT_SHOULD_BE, "FACTOR": factor})
    assert found.keys() == {"mine/resume"}
    assert "resumed after step 3, as if never stopped" in found["mine/resume"]
    assert "no checkpoint holds it" in found["mine/resume"]


ABOVE = """
import torch

class Activation(torch.nn.Module):
    fixed_size = False

    def __init__(self, context):
        super().__init__()
        self.shape = context.n_layers, len(context.parallel.shard(context.n_features))
        self.scale = parameter(torch.ones(self.shape, dtype=context.dtype, device=context.device), feature_axis=1)
        self.register_buffer("bound", torch.zeros(self.shape, DEVICE))

    def selection(self, tokens, norms):
        return Above(self.bound, tokens, *self.shape)

    def forward(self, pre, feature):
        scale = self.scale.exp() if feature is None else self.scale.flatten()[feature].exp()
        READ
        return VALUES

@hookimpl
def clt_activations():
    return [Spec("mine", Config, lambda config, context: Activation(context))]
"""
RIGHT = {"DEVICE": "device=context.device", "READ": "pass", "VALUES": "torch.where(pre > 0, scale * pre.relu(), 0)"}


@pytest.mark.parametrize(
    ("changed", "name", "text"),
    [
        ({}, "", ""),
        ({"VALUES": "torch.where(pre > 0, scale * pre, 0)"}, "empty_pairs", "NaN or infinity in it"),
        ({"VALUES": "scale * (pre * pre.sigmoid()).clamp(min=0)"}, "empty_pairs", "got: nan"),
        ({"READ": "assert not pre.numel() or float(pre.detach().max()) < 1e30"}, "no_sync", "in forward: `.item()`"),
        ({"DEVICE": ""}, "no_sync", "a tensor made without `device=`"),
    ],
    ids=["right", "a gradient of 0 times inf", "a value of 0 times inf", "a number read back", "on the host"],
)
def test_an_activation_that_would_fail_on_a_gpu(check: Any, changed: dict[str, str], name: str, text: str) -> None:
    found = check(
        HEADER + ABOVE, ("selection", "sparse_is_dense", "gradient", "no_sync", "empty_pairs"), **RIGHT | changed
    )
    if name:
        assert_only(found, name, text)
    else:
        assert set(found.values()) == {"pass"}

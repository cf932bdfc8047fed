"""Callbacks, and plugins with state, that are wrong in one way each: the kit finds the fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from clt_plugins.registry.plugins import load_plugins
from tests.support.kit_says import by_check, failures_of, installed

if TYPE_CHECKING:
    from tests.conftest import Distributions

CALLBACK = '''
import torch
from attrs import frozen
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    """One to be checked."""

class Mine:
    every = EVERY

    def __init__(self):
        self.count = 0

    def START(self, run):
        if FIRST:
            run.scale_decoder(0.5 * torch.ones_like(run.transcoder.tying.norms()))

    def AFTER(self, run, step):
        self.count += 1
        inputs = step.batch.inputs.double().abs().mean()
        idle = run.idle_tokens.double().sum()
        less = 0.01 * self.count + 0.1 * OF_TOKENS + 1e-4 * OF_FEATURES
        factor = 1 - less * torch.ones_like(run.transcoder.tying.norms())
        run.scale_decoder(factor)

    def state(self):
        return KEPT

    def load_state(self, state):
        self.count = state

@hookimpl
def clt_callbacks():
    return [Spec("mine", Config, lambda config, context: Mine())]
'''
RIGHT = {
    "EVERY": "1",
    "START": "start",
    "FIRST": "run.step == 0",
    "AFTER": "after",
    "OF_TOKENS": 'run.parallel.total(inputs, over="tokens") / run.parallel.data_ranks',
    "OF_FEATURES": "run.parallel.total(idle)",
    "KEPT": "self.count",
}


@pytest.fixture
def failures(distributions: Distributions) -> Callable[..., dict[str, str]]:
    """What the kit says of a plugin, by check; some source text replaced."""

    def run(source: str, **replaced: str) -> dict[str, str]:
        module = installed(distributions, source, **replaced)
        wanted = ("members", "resume", "ranks", "feature_rows")
        return by_check(failures_of(module, lambda case: case.check in wanted))

    return run


def test_a_callback_without_a_fault_conforms(failures: Any) -> None:
    assert failures(CALLBACK, **RIGHT) == {}


@pytest.mark.parametrize(
    "fault, check, text",
    [
        ({"EVERY": "0"}, "members", "its `every` is 0, so that `after` would never be called"),
        ({"START": "begin", "AFTER": "afterwards"}, "members", "has none of the methods of a callback: start, before"),
        ({"FIRST": "True"}, "resume", "W_dec.00 after step 6, resumed after step 3"),
        ({"KEPT": "0"}, "resume", "no checkpoint holds it"),
        ({"OF_TOKENS": "inputs"}, "ranks", "of 2 ranks that divide the tokens among them as in one process"),
        ({"OF_FEATURES": "idle"}, "ranks", "of 2 ranks that divide the features among them as in one process"),
    ],
)
def test_a_fault_is_found_by_one_check(failures: Any, fault: dict[str, str], check: str, text: str) -> None:
    if check == "ranks" and "tensor" not in load_plugins().choices("parallel"):
        pytest.skip("no choice 'tensor' for [parallel] is installed")
    found = failures(CALLBACK, **{**RIGHT, **fault})
    assert found.keys() == {check}
    assert text in found[check]


@pytest.mark.parametrize("fault, found", [({}, set()), ({"OF_TOKENS": "inputs"}, {"ranks"})])
def test_a_callback_that_refuses_to_share_features_is_tried_on_ranks_that_share_tokens(
    failures: Any, fault: dict[str, str], found: set[str]
) -> None:
    if "tensor" not in load_plugins().choices("parallel"):
        pytest.skip("no choice 'tensor' for [parallel] is installed")
    refusing = """def build(config, context):
    from clt_plugins import Refused
    if context.parallel.tensor_ranks > 1:
        raise Refused("callbacks", "mine needs all features on one rank: set parallel.tensor = 1")
    return Mine()

@hookimpl
"""
    source = CALLBACK.replace("@hookimpl\n", refusing).replace("lambda config, context: Mine()", "build")
    assert failures(source, **{**RIGHT, **fault}).keys() == found


NUDGE = """
        for layer in range(run.transcoder.n_layers):
            dead = torch.nonzero(run.idle_tokens[layer] > 8)[:, 0]
            bias = run.bias(layer)[dead] + 0.1
            run.reinitialise(layer, dead + OWN, bias=bias, revive=False)"""


@pytest.mark.parametrize("own, wrong", [("run.transcoder.own.start", False), ("0", True)])
def test_biases_of_single_features_are_raised_on_ranks_as_in_one_process(failures: Any, own: str, wrong: bool) -> None:
    if "tensor" not in load_plugins().choices("parallel"):
        pytest.skip("no choice 'tensor' for [parallel] is installed")
    source = CALLBACK.replace("        run.scale_decoder(factor)", NUDGE.replace("OWN", own))
    assert failures(source, **RIGHT).keys() == ({"ranks"} if wrong else set())


ACTIVATION = '''
import torch
from attrs import frozen
from clt_plugins import Above, Spec, buffer, hookimpl

@frozen(kw_only=True)
class Config:
    """A threshold that follows the mean of what is kept."""

class Following(torch.nn.Module):
    fixed_size = False

    def __init__(self, context):
        super().__init__()
        self.shape = context.n_layers, len(context.parallel.shard(context.n_features))
        self.mean = None
        KEPT

    def selection(self, tokens, norms):
        return Above(self.bound(), tokens, *self.shape)

    def bound(self):
        return 0.0 if self.mean is None else float(self.mean)

    def forward(self, pre, feature):
        value = torch.where(pre > self.bound(), pre, 0)
        if self.training and torch.is_grad_enabled():
            self.mean = MOVED
        return value

@hookimpl
def clt_activations():
    return [Spec("following", Config, lambda config, context: Following(context))]
'''


@pytest.mark.parametrize(
    "kept, moved, text",
    [
        ("self.register_buffer('mean', torch.zeros(()))", "0.9 * self.mean + 0.01", None),
        ("pass", "torch.tensor(0.01) if self.mean is None else 0.9 * self.mean + 0.01", "its tensor `mean` changes"),
        ("self.mean = 0.0", "0.9 * self.mean + 0.01", "resumed after step 3, as if never stopped"),
    ],
    ids=["buffer", "tensor", "number"],
)
def test_the_state_of_an_activation_is_kept_or_the_kit_says_so(
    failures: Any, kept: str, moved: str, text: str | None
) -> None:
    source = ACTIVATION.replace("self.mean = None\n        KEPT" if kept != "pass" else "KEPT", kept)
    found = failures(source, MOVED=moved)
    assert found.keys() == (set() if text is None else {"resume"})
    assert text is None or text in found["resume"]


TYING = '''
import torch
from attrs import frozen
from clt_plugins import Spec, Layout, dense_decode, hookimpl, parameter, sparse_decode, uniform

@frozen(kw_only=True)
class Config:
    """A row for each feature, for all targets."""

class Shared(torch.nn.Module):
    def __init__(self, context):
        super().__init__()
        shape = context.n_layers, context.n_features, context.d_model
        self.weight = parameter(uniform("rows", shape, 0.1, context, feature_axis=1), 1)

    def decode(self, features):
        return torch.einsum("blf,lfd->bld", features.dense(), self.weight).cumsum(1)

    def affine(self, inputs):
        return inputs.new_zeros(inputs.shape[1:])

    def norms(self):
        return torch.stack([self.expand(layer).flatten(1).norm(dim=1) for layer in range(len(self.weight))])

    def expand(self, layer):
        return self.weight.detach()[layer][:, None].expand(-1, len(self.weight) - layer, -1)

    def feature_rows(self, layer):
        return "weight", lambda weight: ROWS

    def views(self):
        return {"W_dec": ("weight", lambda x: x, 1)}

@hookimpl
def clt_tyings():
    return [Spec("shared", Config, lambda config, context: Shared(context))]
'''


@pytest.mark.parametrize(
    "rows, fault",
    [
        ("weight[layer][:, None]", False),
        ("weight[layer].clone()[:, None]", True),
        ("weight[0][:, None]", True),
        ("weight[layer]", True),
        ("weight[layer].flip(0)[:, None]", True),
    ],
)
def test_rows_of_features_that_are_not_theirs(failures: Any, rows: str, fault: bool) -> None:
    assert failures(TYING, ROWS=rows).keys() == ({"feature_rows"} if fault else set())

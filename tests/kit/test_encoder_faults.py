"""Encoders that are wrong in one way each: the kit finds the fault and says where to look."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from clt_plugins.testing import Case
from tests.support.kit_says import by_check, failures_of, installed

if TYPE_CHECKING:
    from tests.conftest import Distributions

ENCODER = """
import torch
from attrs import frozen
from clt_plugins import Spec, hookimpl, parameter, uniform

@frozen(kw_only=True)
class Config:
    '''One to be checked.'''

class Adds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kept):
        ctx.kept = kept
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.kept["grad"] = ctx.kept.get("grad", 0) + grad
        return ctx.kept["grad"], None

class Encoder(torch.nn.Module):
    def __init__(self, context):
        super().__init__()
        shape = context.n_layers, context.n_features, context.d_model
        self.weight = parameter(uniform("mine", shape, 0.3, context, 1), 1)
        self.b_enc = parameter(self.weight.detach().new_zeros(self.weight.shape[:2]), 1)
        self.gain = parameter(self.weight.detach().new_ones(shape[0], shape[2]), None, partial_gradient=True)
        self.kept = {}

    def inputs(self, x):
        return x * self.gain.to(x.dtype)

    def rows(self, tying):
        return self.weight

    def bias(self):
        return self.b_enc

    def expand(self, layer, tying):
        return self.weight.detach()[layer] * self.gain.detach()[layer], self.b_enc.detach()[layer]

    def views(self):
        return {name: (name, lambda x: x, p.feature_axis) for name, p in self.named_parameters()}

@hookimpl
def clt_encoders():
    return [Spec("mine", Config, lambda config, context: Encoder(context))]
"""

CHECKS = ("form", "causal", "product", "expand", "fresh")
"""Those of encoders alone; the template's test has all."""
INPUTS, ROWS, BIAS = "return x * self.gain.to(x.dtype)", "return self.weight\n", "return self.b_enc\n"
EXPAND = "return self.weight.detach()[layer] * self.gain.detach()[layer], self.b_enc.detach()[layer]"


@pytest.fixture
def failures(distributions: Distributions) -> Callable[..., dict[str, str]]:
    """What the kit says of a plugin by check: one, those of encoders alone, or all (None)."""

    def run(source: str, only: str | None = "") -> dict[str, str]:
        def wanted(case: Case) -> bool:
            asked = case.check == only or (not only and case.check in CHECKS)
            return asked or (only is None and case.slot != "plugin")  # the module imports torch

        return by_check(failures_of(installed(distributions, source), wanted))

    return run


def test_without_a_fault_it_conforms(failures: Any) -> None:
    assert failures(ENCODER) == {}


@pytest.mark.parametrize(
    ("right", "wrong", "check", "text"),
    [
        (INPUTS, "return x.mul_(self.gain.to(x.dtype))", "form", "`inputs` to leave its argument as it is"),
        (INPUTS, "return x * self.gain.double()", "form", "float32 `inputs` of a float32 argument"),
        (ROWS, "return self.weight + torch.rand(())\n", "form", "the same `rows` when asked again"),
        (BIAS, "return self.b_enc.detach().add_(1)\n", "form", "encoder.b_enc as it was before"),
        (INPUTS, "return x - x.mean(1, keepdim=True)", "causal", "only later layers of x change"),
        (INPUTS, "return x.flip(1)", "causal", "only later layers of x change"),
        (INPUTS, "return x - x.mean(0)", "causal", "as if it were alone"),
        (EXPAND, "return self.weight.detach()[layer], self.b_enc.detach()[layer]", "expand", "pre-activations"),
        (EXPAND, "return self.weight[layer] * self.gain[layer], self.b_enc.detach()[layer]", "expand", "detached"),
        (EXPAND, EXPAND.replace("b_enc.detach()[layer]", "b_enc.detach()[-layer]"), "expand", "pre-activations"),
        (ROWS, 'return self.kept.setdefault("rows", self.weight * 1)\n', "fresh", "to change with weight"),
        (BIAS, 'return self.kept.setdefault("bias", self.b_enc + 0)\n', "fresh", "to change with b_enc"),
        (ROWS, "return Adds.apply(self.weight, self.kept)\n", "product", "the gradient of encoder.weight"),
        (INPUTS, "return x * Adds.apply(self.gain, self.kept).to(x.dtype)", "product", "the gradient of encoder.gain"),
    ],
)
def test_a_fault_is_found_by_its_check(failures: Any, right: str, wrong: str, check: str, text: str) -> None:
    assert ENCODER.count(right) == 1
    found = failures(ENCODER.replace(right, wrong), check)
    assert found.keys() == {check}
    assert text in found[check]


SKIPPING = """
from attrs import frozen
from clt_plugins import Spec, hookimpl
from clt_plugins.templates.tying import ExampleConfig

def build(config, context):
    from clt_plugins.templates.tying.module import Example

    class Skips(Example):
        def affine(self, inputs):
            return 0.5 * SKIP + super().affine(inputs)

    return Skips(config.scale, context)

@hookimpl
def clt_tyings():
    return [Spec("mine", ExampleConfig, build)]
"""


@pytest.mark.parametrize(
    ("skip", "text"),
    [
        ("inputs", ""),
        ("inputs.cumsum(1)", ""),
        ("inputs.flip(1)", "`affine` of layers up to 0 as before"),
        ("(inputs - inputs.mean(0))", "`affine` of each token as if it were alone"),
    ],
)
def test_a_skip_path_that_reads_what_is_not_there_yet(failures: Any, skip: str, text: str) -> None:
    found = failures(SKIPPING.replace("SKIP +", f"{skip} +"), "causal")
    assert text in found["causal"] if text else not found


def test_views_that_lack_a_parameter_are_one_failure(failures: Any) -> None:
    lacks = "for name, p in self.named_parameters() if name != 'gain'}"
    found = failures(ENCODER.replace("for name, p in self.named_parameters()}", lacks), None)
    assert found.keys() == {"form"}
    assert "every parameter in `views`" in found["form"]
    assert "none of gain" in found["form"]


def test_rows_of_the_wrong_features_of_a_rank(failures: Any) -> None:
    """An encoder has no selection: the kit does not send its author there."""
    wrong = "return self.weight * (1 + self.weight.new_ones(self.weight.shape[1]).cumsum(0)[:, None])\n"
    found = failures(ENCODER.replace(ROWS, wrong), "tensor_parallel")
    assert "look at: `inputs`, `rows` and `bias` on a rank" in found["tensor_parallel"]


def test_shapes_that_do_not_fit_are_a_fault_of_the_plugin(failures: Any) -> None:
    found = failures(ENCODER.replace(ROWS, "return self.weight[..., :-1]\n"), "form")
    assert "inputs, rows and bias must be [B, L, H], [L, F, H] and [L, F]" in found["form"]

"""Optimizers and schedules that are wrong in one way each: the kit finds the fault. Without it each conforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from clt_plugins.testing import Case
from tests.support.kit_says import by_check, failures_of, installed

if TYPE_CHECKING:
    from tests.conftest import Distributions

OPTIMIZER = '''
from attrs import frozen
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    """One to be checked."""

def build(config, context):
    import torch

    class Momentum(torch.optim.Optimizer):
        _step_supports_amp_scaling = True
        grad_scale = None
        steps = 0

        @torch.no_grad()
        def step(self, closure=None):
            self.steps += 1
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                        state["step"] = 0
                    state["step"] += 1
                    grad = p.grad / (1 if self.grad_scale is None else self.grad_scale)
                    state["momentum"].lerp_(grad, 0.1)
                    p.sub_(group["lr"] * state["momentum"] / (1 - 0.9 ** state["step"]))

    class Maker:
        def make(self, weights):
            factors = {w.lr_factor for w in weights}
            groups = [{"params": [w.parameter for w in weights if w.lr_factor == f], "lr_factor": f} for f in factors]
            return Momentum(groups, {"lr": 1.0})

        def state_bytes(self, weight):
            return weight.parameter.element_size() * weight.parameter.numel()

    return Maker()

@hookimpl
def clt_optimizers():
    return [Spec("mine", Config, build)]
'''

SCHEDULE = '''
from attrs import frozen
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    """One to be checked."""

class Falling:
    asked = 0

    def __call__(self, step, steps, peak):
        self.asked += 1
        return peak * (1 - min(step, steps) / (2 * steps))

@hookimpl
def clt_schedules():
    return [Spec("mine", Config, lambda config, context: Falling())]
'''

GRAD = "grad = p.grad / (1 if self.grad_scale is None else self.grad_scale)"
UPDATE = 'p.sub_(group["lr"] * state["momentum"] / (1 - 0.9 ** state["step"]))'
FALL = "return peak * (1 - min(step, steps) / (2 * steps))"

FAULTS = [
    ("its own rate", OPTIMIZER, 'group["lr"] *', "0.01 *", "moves"),
    ("a NaN", OPTIMIZER, GRAD, "grad = p.grad / 0 * 0", "moves"),
    ("None as 0", OPTIMIZER, "continue", "p.grad = torch.ones_like(p)", "moves"),
    ("a weight left out", OPTIMIZER, "for w in weights if", "for w in weights[1:] if", "moves"),
    ("no optimizer", OPTIMIZER, 'return Momentum(groups, {"lr": 1.0})', "return None", "moves"),
    ("no factor of the rate", OPTIMIZER, '"lr_factor": f}', '"lr_factor": 1.0}', "moves"),
    ("a factor for all", OPTIMIZER, '"lr_factor": f}', '"lr_factor": max(factors)}', "moves"),
    ("a number read back", OPTIMIZER, GRAD, GRAD + "; assert float(grad.abs().max()) < 1e30", "no_sync"),
    ("uphill", OPTIMIZER, 'p.sub_(group["lr"]', 'p.add_(group["lr"]', "moves"),
    ("biases uphill", OPTIMIZER, 'p.sub_(group["lr"]', 'p.sub_((1 if p.dim() > 2 else -1) * group["lr"]', "moves"),
    ("a count of its own", OPTIMIZER, '0.9 ** state["step"]', "0.9 ** self.steps", "resume"),
    ("state beside the state", OPTIMIZER, 'state["momentum"].lerp_(grad, 0.1)',
     'self.kept = getattr(self, "kept", {}); m = self.kept.setdefault(p, torch.zeros_like(p)); m.lerp_(grad, 0.1);'
     ' state["momentum"].copy_(grad); p.sub_(group["lr"] * m)', "resume"),
    ("state that cannot be saved", OPTIMIZER, 'state["step"] = 0', 'state["step"] = 0; state["past"] = [1]', "resume"),
    ("two moments said", OPTIMIZER, "return weight", "return 2 * weight", "state_bytes"),
    ("bytes of a scalar", OPTIMIZER, "element_size() * weight.parameter.numel()", "element_size()", "state_bytes"),
    ("bytes of bfloat16", OPTIMIZER, "zeros_like(p)", "zeros(p.shape, device=p.device)", "state_bytes"),
    ("no scale", OPTIMIZER, GRAD, "grad = p.grad", "clipped"),
    ("a scale that multiplies", OPTIMIZER, GRAD, "grad = p.grad * (1 if self.grad_scale is None else self.grad_scale)",
     "clipped"),
    ("a norm of its own rows", OPTIMIZER, GRAD, GRAD + "; grad = grad / grad.norm()", "tensor_ranks"),
    ("a state of all rows", OPTIMIZER, 'state["step"] = 0',
     'state["step"] = 0; state["row"] = torch.ones(p.shape[-1] + 1)', "tensor_ranks"),
    ("more than the peak", SCHEDULE, FALL, "return peak * (1 + step)", "values"),
    ("below 0", SCHEDULE, FALL, "return peak * (1 - step / steps)", "values"),
    ("a division by 0 steps", SCHEDULE, FALL, "return peak * (1 - min(1, step / (steps - 1)))", "values"),
    ("no number", SCHEDULE, FALL, "return str(peak)", "values"),
    ("goes on falling", SCHEDULE, FALL, "return peak * (1 - step / (step + steps))", "values"),
    ("begins again", SCHEDULE, FALL, "return peak * (1 - (step % (steps + 1)) / (2 * steps))", "values"),
    ("a count", SCHEDULE, FALL, "return peak / self.asked", "by_step_alone"),
    ("random numbers", SCHEDULE, FALL, "import random; return peak * random.random()", "by_step_alone"),
]  # fmt: skip


@pytest.fixture
def failures(distributions: Distributions) -> Callable[..., dict[str, str]]:
    """What the kit says of a plugin by `choice/check`; one check or all."""

    def run(source: str, only: str = "") -> dict[str, str]:
        def wanted(case: Case) -> bool:
            return only in ("", case.check) and case.slot != "plugin"

        return by_check(failures_of(installed(distributions, source), wanted))

    return run


@pytest.mark.parametrize("source", [OPTIMIZER, SCHEDULE], ids=["optimizer", "schedule"])
def test_without_a_fault_it_conforms(failures: Any, source: str) -> None:
    assert failures(source) == {}


@pytest.mark.parametrize(("source", "right", "wrong", "check"), [row[1:] for row in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_fault_is_found_by_its_check(failures: Any, source: str, right: str, wrong: str, check: str) -> None:
    assert source.count(right) == 1
    assert list(failures(source.replace(right, wrong), check)) == [check]

"""Mutations of losses that the kit once let pass: each is found, by one failure; without it all is well."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.faulty import HEADER, LOSS, assert_only, needs_ranks


def test_a_loss_that_adds_up_over_tokens(check: Any) -> None:
    needs_ranks()
    assert check(HEADER + LOSS, ("data_parallel",), DETACH="") == {"data_parallel": "pass"}
    found = check(HEADER + LOSS.replace(" / forward.features.shape[0]", ""), ("terms", "data_parallel"), DETACH="")
    assert_only(found, "data_parallel", "term mine in step 1: the mean of 2 data ranks as in one process")
    assert "a mean over this rank's tokens, not a sum" in found["data_parallel"]


SHARE = "share = forward.share(); error = (share.reconstruction - share.targets).square().mean()"


def test_a_loss_of_a_share_of_the_tokens(check: Any) -> None:
    needs_ranks()
    value = "forward.sum_features(values.square().sum()) / forward.features.shape[0]"
    source = HEADER + LOSS.replace(f'return {{"mine": {value}}}', f'{SHARE}; return {{"mine": MEAN}}')
    assert "MEAN" in source
    checks = ("terms", "gradient_reconstruction", "tensor_parallel")
    assert set(check(source, checks, DETACH="", MEAN="share.mean(error)").values()) == {"pass"}
    assert_only(check(source, checks, DETACH="", MEAN="error"), "tensor_parallel", "goes through `share.mean`")


@pytest.mark.parametrize(
    ("wrong", "right", "text"),
    [
        (
            "values.square().sum() / values.sum()",
            "values.square().sum() / values.sum().clamp(min=1e-6)",
            "a finite term 'mine' for a batch where no feature is kept",
        ),
        (
            "values.square().sum().sqrt()",
            "values.square().sum().clamp(min=1e-12).sqrt()",
            "a finite gradient of 'mine' for a batch where all features are 0",
        ),
        (
            "values.sum() + (forward.reconstruction - forward.targets).square().sum() / forward.targets.norm()",
            "values.sum() + (forward.reconstruction - forward.targets).square().sum() / (1 + forward.targets.norm())",
            "a finite term 'mine' for a batch of zeros",
        ),
    ],
)
def test_a_loss_that_is_not_finite_where_nothing_is_active(check: Any, wrong: str, right: str, text: str) -> None:
    value = "forward.sum_features(values.square().sum()) / forward.features.shape[0]"
    source = HEADER + LOSS.replace(value, "VALUE")
    assert check(source, ("terms",), DETACH="", VALUE=right) == {"terms": "pass"}
    assert_only(check(source, ("terms", "bf16", "determinism"), DETACH="", VALUE=wrong), "terms", text)


BALANCED = """
import torch

class Loss(BASE):
    needs_pre = False

    def __init__(self, context):
        super().__init__()
        self.s = PARAMETER

    def selection(self, tokens, idle_tokens):
        return None

    def __call__(self, forward):
        error = (forward.reconstruction - forward.targets).square().mean((0, 2))
        s = USED
        return {"mine": (error * torch.exp(-s) + s).mean()}

@hookimpl
def clt_losses():
    return [Spec("mine", Config, lambda config, context: Loss(context))]
"""
ZEROS = "torch.nn.Parameter(torch.zeros(context.n_layers, device=context.device))"
BALANCED_RIGHT = {"BASE": "torch.nn.Module", "PARAMETER": ZEROS, "USED": "self.s"}


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"BASE": "object"}, "its parameter `s` would never be trained"),
        ({"PARAMETER": f"[{ZEROS}]", "USED": "self.s[0]"}, "its parameter `s[0]` would never be trained"),
        ({"PARAMETER": f"lambda s={ZEROS}: s", "USED": "self.s()"}, "a tensor of shape [[3]] gets one too"),
        ({"USED": "self.s.detach()"}, "got: none"),
        ({"USED": "self.s + 0.5 * self.s.detach()"}, "the gradient of the loss by its parameter 's'"),
    ],
    ids=["no module", "in a list", "in a function", "detached", "half detached"],
)
def test_a_loss_whose_parameter_is_not_trained(check: Any, part: dict[str, str], text: str) -> None:
    checks = ("terms", "own_gradient", "resume")
    assert set(check(HEADER + BALANCED, checks, **BALANCED_RIGHT).values()) == {"pass"}
    name = "resume" if "never" in text else "own_gradient"
    assert_only(check(HEADER + BALANCED, checks, **{**BALANCED_RIGHT, **part}), name, text)

"""Losses that are wrong in one way each: the kit finds the fault and says where to look. Without it each conforms."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.faulty import HEADER, LOSS, assert_only


def test_a_loss_that_detaches_its_gradient(failures: Any) -> None:
    assert failures(HEADER + LOSS, DETACH="") == {}
    found = failures(HEADER + LOSS, DETACH=".detach()")
    assert found.keys() == {"mine/terms"}
    assert "got: none: the loss changes no weight" in found["mine/terms"]
    found = failures(HEADER + LOSS, DETACH="* (1 - forward.features.values.detach().tanh())")
    assert found.keys() == {"mine/gradient_features"}
    assert "a `detach()`" in found["mine/gradient_features"]


def test_a_loss_whose_gradient_vanishes_is_compared_by_its_rounding(failures: Any) -> None:
    """Probabilities add up to 1 whatever changes."""
    old, new = (
        LOSS.index("        return {"),
        "        return {'mine': forward.reconstruction.softmax(-1).sum(-1).mean()}",
    )
    source = LOSS[:old] + new + LOSS[LOSS.index("\n", old) :]
    assert failures(HEADER + source, only="parallel", DETACH="") == {}


IN_MODEL = """
class Loss:
    needs_pre = False
    contexts = 3

    def selection(self, tokens, idle_tokens):
        return None

    def runs(self, step, progress):
        return RUNS

    def __call__(self, forward):
        NONE
        surprise = -forward.model.logits.log_softmax(-1).gather(1, forward.model.next_tokens[:, None]).squeeze(1)
        return {"mine": MEAN}

@hookimpl
def clt_losses():
    return [Spec("mine", Config, lambda config, context: Loss())]
"""


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"MEAN": "surprise.mean()"}, "instead of `x.mean()`"),
        ({"MEAN": "surprise.sum()"}, "instead of `x.mean()` or `x.sum()`"),
        ({"NONE": "pass"}, "'NoneType' object has no attribute"),
        ({"RUNS": "step"}, "expected: True or False, the same each time"),
    ],
)
def test_a_loss_that_runs_the_model_wrongly(failures: Any, changed: dict[str, str], text: str) -> None:
    right = {"RUNS": "progress >= 0.5", "NONE": "if forward.model is None: return {}"}
    right["MEAN"] = "forward.model.mean(surprise)"
    only = "" if changed.get("MEAN") == "surprise.mean()" else "runs_model"
    found = failures(HEADER + IN_MODEL, only=only, **{**right, **changed})
    assert found.keys() == {"mine/runs_model"}, "no other check tells the same fault by its consequences"
    assert text in found["mine/runs_model"]


def test_a_loss_that_runs_the_model_and_detaches_a_factor(failures: Any) -> None:
    """Its gradient nearly vanishes: ranks differ by rounding, and what is wrong is wrong on one."""
    right = {"RUNS": "True", "NONE": "if forward.model is None: return {}"}
    divergence = (
        "log_q = forward.model.logits.log_softmax(-1); log_p = forward.model.unchanged.log_softmax(-1); "
        "p, q = log_p.exp(), log_q.exp(); log_m = ((p + q) / 2).log(); "
        "twice = (p * (log_p - log_m) + q.detach() * (log_q - log_m)).sum(-1)\n        surprise"
    )
    changed = {"        surprise": f"        {divergence}", "MEAN": "forward.model.mean(twice)"}
    found = failures(HEADER + IN_MODEL, **right, **changed)
    assert found.keys() == {"mine/gradient_features"}
    assert "model.logits" in found["mine/gradient_features"]


def test_a_loss_that_runs_the_model_conforms(failures: Any) -> None:
    right = {"RUNS": "True", "NONE": "if forward.model is None: return {}", "MEAN": "forward.model.mean(surprise)"}
    assert failures(HEADER + IN_MODEL, **right) == {}


LOSS_WITH_STATE = """
import torch

class Loss(torch.nn.Module):
    needs_pre = False

    def __init__(self, context):
        super().__init__()
        self.context = context
        STATE

    def selection(self, tokens, idle_tokens):
        return SELECTION

    def forward(self, forward):
        mean = forward.features.values.sum() / forward.features.shape[0]
        CHANGE
        total = forward.sum_features(forward.features.values.square().sum()) / forward.features.shape[0]
        return {"mine": (1 + RUNNING) * total}

@hookimpl
def clt_losses():
    return [Spec("mine", Config, lambda config, context: Loss(context))]
"""
BUFFER = {
    "STATE": 'self.register_buffer("running", torch.zeros(()))',
    "CHANGE": "if torch.is_grad_enabled(): self.running += 1",
    "RUNNING": "self.running.clone()",
    "SELECTION": "None",
}


def test_a_loss_with_a_state_that_no_checkpoint_holds(failures: Any) -> None:
    assert failures(HEADER + LOSS_WITH_STATE, only="resume", **BUFFER) == {}, "a buffer is in checkpoints"
    number = {**BUFFER, "STATE": "self.running = 0", "RUNNING": "self.running"}
    found = failures(HEADER + LOSS_WITH_STATE, only="resume", **number)
    assert found.keys() == {"mine/resume"}


def test_a_loss_whose_selection_changes_what_it_sees(failures: Any) -> None:
    selection = """Selecting(tokens, self.context.kernels)

class Selecting:
    def __init__(self, tokens, kernels):
        self.top = Top(2, tokens, 3, 41, per="token", kernels=kernels)

    def see(self, layer, pre):
        self.top.see(layer, pre.clone())
        pre.clamp_(max=1.0)

    def finish(self):
        return self.top.finish()

class Loss(Loss):"""
    found = failures(HEADER + LOSS_WITH_STATE, only="selection", **{**BUFFER, "SELECTION": selection})
    assert found.keys() == {"mine/selection"}
    assert "other selections read it too" in found["mine/selection"]


def test_a_loss_that_adds_up_empty_pairs(check: Any) -> None:
    """Where fewer features are dead than it selects, a GPU fills up with pairs of -inf; a CPU has none."""
    selection = """self.dead(tokens, idle_tokens)

    def dead(self, tokens, idle_tokens):
        shift = torch.where(idle_tokens >= self.context.dead_after_tokens, 0.0, -torch.inf)
        return Top(
            3, tokens, *idle_tokens.shape, per="token", affine=lambda layer, pre: (None, shift[layer]),
            kernels=self.context.kernels,
        )"""
    pull = "mean = EXTRA.sum() / forward.features.shape[0] if forward.extra is not None else 0"
    right = {**BUFFER, "SELECTION": selection, "STATE": "pass", "CHANGE": pull, "RUNNING": "0 * mean"}
    right |= {
        "0 * mean": "0 - 0.1 * mean",
        "EXTRA": "forward.extra.values.masked_fill(forward.extra.values < -1e30, 0)",
    }
    checks = ("terms", "sparse_is_dense", "empty_pairs")
    assert set(check(HEADER + LOSS_WITH_STATE, checks, **right).values()) == {"pass"}
    found = check(HEADER + LOSS_WITH_STATE, checks, **{**right, "EXTRA": "forward.extra.values"})
    assert_only(found, "empty_pairs", "the term 'mine' as without empty pairs, where one feature is dead")


@pytest.mark.parametrize(
    ("body", "check", "text"),
    [
        ("weight = 1.0", "load", "Config.weight: has no type, so that no recipe can set it"),
        ("weight = field(default=1.0)", "load", "Config.weight: has no type"),
        ("weight: object = 1.0", "load", "a recipe cannot hold <class 'object'>"),
        ("weight: float = 1.0", "config", "a string literal under each field"),
    ],
)
def test_a_config_with_an_untyped_or_silent_field(failures: Any, body: str, check: str, text: str) -> None:
    header = HEADER[: HEADER.index("    weight: float")] + f"    {body}\n"
    found = failures(header + LOSS, only=check, DETACH="")
    assert len(found) == 1
    assert text in next(iter(found.values()))

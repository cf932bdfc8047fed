"""Learning-rate factors and weight decay by role, for every optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clt_plugins import Faults
from clt_plugins.training.optimizers.clip import clip_gradients
from clt_plugins.training.optimizers.make import make_optimizer, weights_of
from clt_plugins.training.optimizers.rate import set_rate
from clt_plugins.training.plan.build import plan
from tests.support.helpers import parts, plugins, recipe

OPTIMIZERS = ("adam", "adamw", "rowwise_adam", "muon", "adafactor")
ROLES = {
    "encoder.W_enc": "encoder", "encoder.b_enc": "bias", "activation.log_threshold": "threshold",
    "tying.weight": "decoder", "tying.b_dec": "bias", "tying.skip": "decoder", "losses[1].level": "loss",
}  # fmt: skip


def built(name: str, **settings: Any) -> tuple[Any, torch.optim.Optimizer]:
    """A transcoder of every role but losses', and its optimizer at a rate of 0.1."""
    activation, tying = {"name": "jumprelu"}, {"name": "untied", "skip": True}
    transcoder: Any = parts(activation=activation, tying=tying).transcoder
    optimizer = make_optimizer(transcoder, recipe(optimizer={"name": name, **settings}, train={"lr": 0.1}))
    numbers = torch.Generator().manual_seed(0)
    for p in transcoder.parameters():
        p.detach().add_(torch.rand(p.shape, generator=numbers))
        p.grad = torch.randn(p.shape, generator=numbers)
    return transcoder, optimizer


def moves(name: str, **settings: Any) -> dict[str, torch.Tensor]:
    """What each weight moves by in the second step; Adafactor's first ones go by the step alone."""
    transcoder, optimizer = built(name, **settings)
    optimizer.step()
    before = {name: p.detach().clone() for name, p in transcoder.named_parameters()}
    set_rate(optimizer, 0.01)
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in transcoder.named_parameters()}


def test_every_weight_has_its_role() -> None:
    transcoder, _ = built("adam")
    extra = {"losses[1].level": torch.nn.Parameter(torch.zeros(()))}
    weights = {weight.name: weight for weight in weights_of(transcoder, 0, extra)}
    assert {name: weight.role for name, weight in weights.items()} == ROLES
    assert {name for name, weight in weights.items() if weight.rows} == {"encoder.W_enc", "tying.weight", "tying.skip"}
    assert [piece.name for piece in weights["tying.weight"].pieces] == ["W_dec.00", "W_dec.01", "W_dec.02"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("role", ["encoder", "decoder", "bias", "threshold"])
def test_a_learning_rate_factor_holds_for_its_role_alone(name: str, role: str) -> None:
    """Of a second step from the same place: the first is at the factor too, so that one is made at 1."""
    base = moves(name)
    still = moves(name, roles={role: {"lr_factor": 0.0}})
    for key, moved in base.items():
        if ROLES[key] == role:
            assert not still[key].any(), key
            assert moved.any(), key
        else:
            assert torch.equal(still[key], moved), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_for_matrices_and_by_role(name: str) -> None:
    """Without gradients' part: gradients of 0 leave the decay alone, where that is decoupled."""
    settings: dict[str, Any] = {"weight_decay": 0.5, "roles": {"decoder": {"weight_decay": 0.25, "lr_factor": 2.0}}}
    settings["roles"]["threshold"] = {"weight_decay": 1.0}
    transcoder, optimizer = built(name, **settings)
    before = {name: p.detach().clone() for name, p in transcoder.named_parameters()}
    for p in transcoder.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    # jumprelu's thresholds have 5 times the rate by themselves.
    expected = {"encoder": (0.1, 0.5), "decoder": (0.2, 0.25), "threshold": (0.5, 1.0), "bias": (0.1, 0.0)}
    for key, p in transcoder.named_parameters():
        lr, decay = expected[ROLES[key]]
        step = decay * before[key]
        if name == "adam":  # coupled: the decay is the gradient, whose size Adam takes away
            step = step / (step.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), before[key] - lr * step, rtol=1e-5, atol=1e-6)


def test_a_role_that_there_is_not_is_refused() -> None:
    with pytest.raises(Faults, match=r"optimizer\.roles: must name some of encoder, decoder, .*: encodre"):
        recipe(optimizer={"name": "adam", "roles": {"encodre": {"lr_factor": 1.0}}})


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_features_that_are_split_are_refused_by_name_before_training(name: str) -> None:
    with pytest.raises(Faults, match=rf"optimizer\.name: '{name}' needs all features of a matrix on one rank: set par"):
        plan(recipe(optimizer=name, parallel={"name": "tensor", "tensor": 2}), plugins())


@pytest.mark.parametrize("name", ["rowwise_adam", "muon", "adafactor"])
def test_bfloat16_weights_are_refused_where_small_updates_would_be_lost(name: str) -> None:
    with pytest.raises(Faults, match=rf"optimizer\.name: {name} would lose small updates of bfloat16 weights: set tra"):
        recipe(optimizer=name, transcoder={"dtype": "bfloat16"})


@pytest.mark.parametrize("name", ["rowwise_adam", "muon", "adafactor"])
def test_the_plan_has_what_is_kept(name: str) -> None:
    chosen = {"optimizer": name, "tying": {"name": "untied", "skip": True}}
    transcoder = parts(**chosen).transcoder
    optimizer = make_optimizer(transcoder, recipe(**chosen))
    for p in transcoder.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor) and x.dim()]
    assert plan(recipe(**chosen), plugins()).bytes.optimizer == sum(x.numel() * x.element_size() for x in kept)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipped_gradients_are_as_if_they_had_been_small(name: str) -> None:
    ends = []
    for factor in (1.0, 64.0):
        transcoder, optimizer = built(name)
        for p in transcoder.parameters():
            p.grad.mul_(factor)
        norm = torch.stack([p.grad.norm() for p in transcoder.parameters()]).norm()
        clip_gradients(transcoder.parameters(), norm, 0.5, optimizer)
        optimizer.step()
        ends.append([p.detach().clone() for p in transcoder.parameters()])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)

"""What keeps features alive: k that falls over training, and AuxK with its pull."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import run
from clt_plugins.training.objective import objective
from tests.support.helpers import parts, random_batch, tables

TOKENS = 16


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_k_falls_over_training_and_evaluation_keeps_k(name: str, path: str) -> None:
    activation = {"name": name, "k": 4, "anneal_from": 3.0, "anneal_over": 0.8}
    transcoder = parts(activation=activation, transcoder={"path": path}).transcoder
    inputs = random_batch(TOKENS, 3, 6).inputs
    kept = []
    for progress in (0.0, 0.2, 0.4, 0.8, 0.95):
        transcoder.activation.schedule(progress)
        # Biases make all pre-activations positive, so that what is selected is active.
        with torch.no_grad():
            transcoder.b_enc.fill_(10.0)
        kept.append(float(transcoder.train().encode(inputs).l0().double().mean()))
        assert float(transcoder.eval().encode(inputs).l0().double().mean()) == 4
    assert kept == [12, 10, 8, 4, 4]


def test_k_begins_with_all_features_where_there_are_no_more() -> None:
    transcoder = parts(activation={"name": "topk", "k": 20, "anneal_from": 3.0}).transcoder.train()
    transcoder.activation.schedule(0.0)
    assert transcoder.activation.training_k == [3 * 10]


def alive_after(steps: int, auxk: dict[str, Any]) -> float:
    """The share of features active again that a bias had switched off for all tokens."""
    made = parts(
        activation={"name": "batchtopk", "k": 5},
        losses=[{"name": "mse"}, {"name": "auxk", **auxk}],
        train={"dead_after_tokens": TOKENS},
    )
    transcoder = made.transcoder.train()
    with torch.no_grad():
        transcoder.b_enc[:, 5:] = -2.0
    optimizer = torch.optim.Adam(transcoder.parameters(), lr=0.02)
    idle = torch.full((3, 10), TOKENS)
    fired = torch.zeros(3, 10, dtype=torch.bool)
    for step in range(steps):
        optimizer.zero_grad()
        outcome = objective(transcoder, made.losses, random_batch(TOKENS, 3, 6, seed=step), idle, 0.5)
        outcome.total.backward()
        optimizer.step()
        counts = outcome.features.counts()
        idle = torch.where(counts > 0, 0, idle + TOKENS)
        fired |= counts > 0
    return float(fired[:, 5:].double().mean())


def test_the_pull_revives_features_that_no_token_reaches() -> None:
    assert alive_after(60, {"pull": 0.0}) == 0, "AuxK alone cannot: their rectified values are all 0"
    assert alive_after(60, {"pull": 1e-3}) == 1


def trained(steps: int, *, known: bool, width: int | None = None) -> dict[str, torch.Tensor]:
    """Weights after some steps; by selection in a GPU's form where the number of dead features is not known."""
    made = parts(
        activation={"name": "batchtopk", "k": 5},
        losses=[{"name": "mse"}, {"name": "auxk", "k": 3}],
        train={"dead_after_tokens": 2 * TOKENS},
    )
    auxk = made.losses[1]
    if not known:
        auxk.late.exchange = lambda numbers: width and [width, width]
    transcoder = made.transcoder.train()
    with torch.no_grad():
        transcoder.b_enc[1, 5:] = -2.0
    optimizer = torch.optim.Adam(transcoder.parameters(), lr=0.02)
    idle = torch.zeros(3, 10, dtype=torch.int64)
    for step in range(steps):
        optimizer.zero_grad()
        outcome = objective(transcoder, made.losses, random_batch(TOKENS, 3, 6, seed=step), idle, 0.5)
        outcome.total.backward()
        optimizer.step()
        idle = torch.where(outcome.features.counts() > 0, 0, idle + TOKENS)
    return {name: x.detach() for name, x in transcoder.named_parameters()}


@pytest.mark.parametrize("width", [None, 8])
def test_looking_at_more_features_than_are_dead_changes_nothing(width: int | None) -> None:
    """A GPU's host does not know how many are dead in this step: a run that was resumed looks at all."""
    expected = trained(6, known=True)
    for name, x in trained(6, known=False, width=width).items():
        assert torch.equal(x, expected[name]), name


def test_a_run_whose_only_loss_has_no_gradient_goes_on(tmp_path: Path) -> None:
    """AuxK alone, while no feature is dead."""
    run(tables(losses=[{"name": "auxk"}], train={"steps": 2, "dead_after_tokens": 10**6}), out=tmp_path / "run")
    assert (tmp_path / "run/transcoder").is_dir()


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_k_is_exact_while_sizes_are_rounded(name: str) -> None:
    activation = {"name": name, "k": 16, "anneal_from": 1.5, "anneal_over": 1.0}
    transcoder = parts(activation=activation).transcoder.train()
    transcoder.context.kernels.select = lambda *shape, per, capacity: (shape[3], capacity)
    by_capacity: dict[int, set[int]] = {}
    rows = TOKENS if name == "batchtopk" else 1
    for step in range(101):
        transcoder.activation.schedule(step / 100)
        k, capacity = transcoder.activation.selection(TOKENS, transcoder.tying.norms).selects[0]
        assert k == transcoder.activation.training_k[0] * rows <= capacity < k + 2 * rows
        by_capacity.setdefault(capacity, set()).add(k)
    assert sorted(by_capacity) == [rows * places for places in (16, 18, 20, 22, 24)]
    assert max(len(ks) for ks in by_capacity.values()) == 2


def test_a_layer_without_an_error_gives_auxk_nothing_to_do() -> None:
    """Its error was divided by next to 0: one such batch made Adam's second moments infinite, and the layer stayed."""
    made = parts(
        activation={"name": "topk", "k": 2},
        losses=[{"name": "auxk", "k": 3}],
        tying={"name": "per_layer"},
        train={"dead_after_tokens": TOKENS},
    )
    transcoder = made.transcoder.train()
    with torch.no_grad():
        transcoder.b_enc[0, :5] = 50.0  # they are the best of all layers: nothing is active in layer 1
        transcoder.b_enc[:, 5:] = 1.0
    batch = random_batch(TOKENS, 3, 6)
    batch.targets[:, 1] = 0
    idle = torch.zeros(3, 10, dtype=torch.int64)
    idle[:, 5:] = TOKENS
    outcome = objective(transcoder, made.losses, batch, idle, 0.5)
    outcome.total.backward()
    assert 0 < float(outcome.terms["auxk"]) < 100
    assert float(transcoder.W_enc.grad.abs().max()) < 100 and bool(transcoder.W_enc.grad[0].any())

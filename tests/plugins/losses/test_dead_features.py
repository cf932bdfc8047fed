"""What keeps features alive: k that falls over training, and AuxK with its pull."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clt_plugins.training.objective import objective
from tests.support.helpers import parts, random_batch

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
    assert transcoder.activation.training_k == 3 * 10


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

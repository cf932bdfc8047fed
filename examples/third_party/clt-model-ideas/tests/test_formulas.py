"""The formulas, by hand: the conformance kit does not know them."""

import math
from types import SimpleNamespace

import pytest
import torch
from clt_model_ideas.drop_repeats import DropRepeats, DropRepeatsConfig
from clt_model_ideas.jensen_shannon import JensenShannon, JensenShannonConfig

from clt_plugins import Batch


def test_of_equal_neighbours_of_a_context_the_first_stays() -> None:
    """Rows of two contexts, shuffled: (0: a a b b a), (1: a a)."""
    rows = [(1, 0, "a"), (0, 3, "b"), (0, 0, "a"), (0, 1, "a"), (1, 1, "a"), (0, 4, "a"), (0, 2, "b")]
    positions = torch.tensor([row[:2] for row in rows])
    ids = torch.tensor([ord(row[2]) for row in rows])
    activations = torch.arange(7.0)[:, None, None]
    batch = DropRepeats(DropRepeatsConfig(), None)(Batch(activations, activations, ids, positions), 0)
    assert batch.inputs.flatten().tolist() == [0, 2, 5, 6]
    assert batch.positions.tolist() == [[1, 0], [0, 0], [0, 4], [0, 2]]


def test_the_divergence_is_the_mean_of_two_kl_from_the_middle() -> None:
    p, q = [0.7, 0.2, 0.1], [0.1, 0.1, 0.8]
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    expected = sum(a * math.log(a / m) + b * math.log(b / m) for a, b, m in zip(p, q, middle, strict=True)) / 2
    logits, unchanged = (torch.tensor([x]).log() + 3 for x in (q, p))
    model = SimpleNamespace(logits=logits, unchanged=unchanged, mean=torch.Tensor.mean)
    loss = JensenShannon(JensenShannonConfig(weight=2.0), None)
    assert float(loss(SimpleNamespace(model=model))["jensen_shannon"]) == pytest.approx(2 * expected)
    assert loss(SimpleNamespace(model=None)) == {}

"""The losses that run the language model: their formulas and gradients by loops, when they act, and what `kl` does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from clt_plugins import run
from clt_plugins.contract.training.loss import ModelPass
from tests.plugins.losses.test_formulas import built, draw, make_forward, same
from tests.support.helpers import plugins

R, V = 5, 7
MODEL = Path(__file__).resolve().parents[3] / "examples/models/stdlib-gpt2"


def softmax(logits: torch.Tensor) -> list[float]:
    powers = [math.exp(float(x)) for x in logits]
    return [x / sum(powers) for x in powers]


@pytest.mark.parametrize("name", ["kl", "ce"])
def test_its_value_and_gradient_by_loops(name: str) -> None:
    """∂ KL(p‖q) / ∂ logits of q is q - p; of the cross-entropy it is q - 1 at the next token."""
    logits, unchanged = draw(R, V, seed=1).requires_grad_(), draw(R, V, seed=2)
    next_tokens = torch.tensor([3, 0, 6, 6, 2])
    made = ModelPass(logits=logits, unchanged=unchanged, next_tokens=next_tokens, mean=torch.mean)
    (term,) = built(name, weight=0.4)(attrs.evolve(make_forward(), model=made)).values()
    term.backward()
    expected, gradient = 0.0, torch.zeros(R, V, dtype=torch.float64)
    for r in range(R):
        p, q, token = softmax(unchanged[r]), softmax(logits.detach()[r]), int(next_tokens[r])
        if name == "ce":
            p = [float(v == token) for v in range(V)]
        for v in range(V):
            expected += 0.4 * (p[v] * math.log(p[v] / q[v]) if p[v] else 0.0) / R
            gradient[r, v] = 0.4 * (q[v] - p[v]) / R
    same(term, expected)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-10, atol=1e-14)


def test_it_acts_in_the_last_share_of_the_run_and_only_then() -> None:
    loss: Any = built("kl", start=0.75, every=5)
    acts = [step for step in range(1, 101) if loss.runs(step, (step - 1) / 100)]
    assert acts == [80, 85, 90, 95, 100]
    assert loss(make_forward()) == {}, "no term without a pass of the model"


@pytest.mark.slow
def test_the_last_share_with_kl_lowers_the_kl_of_the_shipped_model(tmp_path: Path) -> None:
    """Two runs that are one until then, on the same text; KL on held-out text."""
    found: dict[str, tuple[float, float]] = {}
    for name, losses in {"without": [], "with": [{"name": "kl", "weight": 1.0, "contexts": 8, "start": 0.7}]}.items():
        recipe = {
            "name": name,
            "model": {"path": str(MODEL)},
            "source": {"name": "stream", "text": "python-stdlib", "context": 64, "buffer_tokens": 8192},
            "transcoder": {"features": 256, "device": "cpu"},
            "activation": {"name": "batchtopk", "k": 32},
            "losses": ["mse", "auxk", *losses],
            "loggers": [],
            "stages": [{"name": "evaluate", "tokens": 8192}],
            "train": {"steps": 160, "batch_tokens": 256, "eval_tokens": 8192},
        }
        run(recipe, out=tmp_path / name, plugins=plugins())
        report = json.loads((tmp_path / name / "evaluation/evaluation.json").read_text())
        found[name] = report["model"]["kl"]["transcoder"], report["nmse"]
    (kl, nmse), (kl_before, nmse_before) = found["with"], found["without"]
    assert kl < 0.9 * kl_before, found
    assert nmse < 1.2 * nmse_before, found

"""The built-in metrics against loops and formulas by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import Refused, run
from clt_plugins.model.scores import score
from clt_plugins.training.metrics import of_pass, of_step, passes, step_of
from clt_plugins.training.objective import objective
from clt_plugins.training.saved.checkpoint import Progress
from tests.support.helpers import parts, random_batch, stir, tables

L, D, F, B = 3, 6, 10, 16


def of_one_step(metric: str, **changes: Any) -> tuple[dict[str, Any], Any, Any]:
    built = parts(metrics=[metric], transcoder={"dtype": "float64"}, **changes)
    stir(built.transcoder)
    batch = random_batch(B, L, D, torch.float64)
    idle = torch.zeros(L, F, dtype=torch.int64)
    idle[1, :4] = 64
    outcome = objective(built.transcoder, built.losses, batch, idle, 0.5)
    outcome.total.backward()
    step = step_of(built, Progress(5, 80, idle), batch, outcome, outcome.features.counts(), torch.tensor(2.5), 3e-4)
    return of_step(built.metrics, step, {}), step, built


def test_a_step_reports_losses_error_sparsity_and_the_optimizer() -> None:
    found, step, built = of_one_step("training")
    error = built.transcoder.normaliser.restore(step.reconstruction) - step.batch.targets
    for layer in range(L):
        expected = float(error[:, layer].square().mean()) / float(built.transcoder.target_variance[layer])
        assert float(found["train/nmse_by_layer"][layer]) == pytest.approx(expected, rel=1e-5)
    assert found["train/nmse"] == pytest.approx(float(found["train/nmse_by_layer"].mean()))
    assert found["train/l0"] == float((step.features.dense() > 0).sum()) / B
    assert found["train/dead_fraction"] == 4 / (L * F)
    assert found["loss/total"] == found["loss/mse"] == float(step.total)
    assert (found["optim/lr"], found["optim/grad_norm"]) == (3e-4, 2.5)


def test_norms_of_the_decoder_by_layer_and_by_distance() -> None:
    found, _, built = of_one_step("decoder_norms", tying={"name": "untied"})
    by_layer, by_distance = [], [[] for _ in range(L)]
    for layer in range(L):
        rows = built.transcoder.tying.expand(layer)
        by_layer.append(sum(float(rows[f].norm()) for f in range(F)) / F)
        for distance in range(L - layer):
            by_distance[distance] += [float(rows[f, distance].norm()) for f in range(F)]
    assert found["train/decoder_norm_by_layer"].tolist() == pytest.approx(by_layer, rel=1e-6)
    means = [sum(norms) / len(norms) for norms in by_distance]
    assert found["train/decoder_norm_by_distance"].tolist() == pytest.approx(means, rel=1e-6)


def test_norms_of_gradients_by_role_are_those_of_all_gradients() -> None:
    found, step, built = of_one_step("gradient_norms")
    assert found.keys() == {f"optim/grad_norm_{role}" for role in ("encoder", "decoder", "bias")}
    expected = float(built.transcoder.W_enc.grad.norm())
    assert found["optim/grad_norm_encoder"] == pytest.approx(expected, rel=1e-9)
    grads = [weight.parameter.grad for weight in step.weights if weight.parameter.grad is not None]
    whole = torch.cat([grad.flatten() for grad in grads]).norm()
    assert sum(norm**2 for norm in found.values()) ** 0.5 == pytest.approx(float(whole), rel=1e-9)


def test_cosine_is_the_mean_over_tokens_of_all_batches() -> None:
    built = parts(metrics=["cosine"], transcoder={"dtype": "float64"})
    stir(built.transcoder)
    batches = [random_batch(count, L, D, torch.float64, seed=count) for count in (5, 9, 2)]
    held_out = passes(built.metrics)
    found = of_pass(held_out, score(built.transcoder, batches, held_out))
    cosines = []
    for batch in batches:
        written = built.transcoder.eval()(batch.inputs)
        for b in range(batch.tokens):
            for layer in range(L):
                one, other = written[b, layer].detach(), batch.targets[b, layer]
                cosines.append(float(one @ other / (one.norm() * other.norm())))
    assert found["eval/cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-6)
    assert found["eval/cosine_by_layer"].tolist() == pytest.approx(
        torch.tensor(cosines).view(-1, L).mean(0).tolist(), rel=1e-5
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_reports_what_its_recipe_names(tmp_path: Path) -> None:
    run(tables(), out=tmp_path / "default")
    step, evaluation = lines(tmp_path / "default")[-2:]
    assert [name for name in step if not name.startswith("time/")] == [
        "step", "tokens", "loss/mse", "loss/total", "train/nmse", "train/nmse_by_layer", "train/l0",
        "train/dead_fraction", "optim/lr", "optim/grad_norm",
    ]  # fmt: skip
    scores = ("nmse", "explained_variance", "l0", "dead_fraction")
    names = ["step", "tokens", *(f"eval/{name}" for name in scores), *(f"eval/{name}_by_layer" for name in scores)]
    assert list(evaluation) == names
    weights = [torch.equal(*pair) for pair in zip(*(x.tensors().values() for x in (
        run(tables(metrics=[]), out=tmp_path / "none"),
        run(tables(metrics=["decoder_norms", "cosine"]), out=tmp_path / "others"),
    )), strict=True)]  # fmt: skip
    assert all(weights)
    assert all(name.startswith(("step", "tokens", "time/")) for line in lines(tmp_path / "none") for name in line)
    assert {"train/decoder_norm_by_distance", "eval/cosine"} <= {n for line in lines(tmp_path / "others") for n in line}


def test_two_metrics_with_one_name_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"^metrics: two of them report 'loss/mse': leave one of them out"):
        run(tables(metrics=["training", "training"]), out=tmp_path / "run")

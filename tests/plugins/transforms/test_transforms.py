"""The built-in transforms against what they say, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clt_plugins import Batch, Refused, Single
from clt_plugins.model.assemble import assemble
from clt_plugins.training.objective import objective
from tests.support.helpers import parts, random_batch, recipe

L, D = 3, 6


def transform(name: str, **settings: Any) -> Any:
    return parts(transforms=[{"name": name, **settings}]).transforms[0]


def with_text(batch: Batch) -> Batch:
    count = torch.arange(batch.tokens)
    return Batch(batch.inputs, batch.targets, count % 7, torch.stack([count // 5, count % 5], 1))


def test_an_outlier_has_twenty_times_the_mean_norm_in_some_layer() -> None:
    """ByteDance's rule: in any layer, at least 20 times the mean over tokens."""
    batch = random_batch(100, L, D)
    inputs = batch.inputs / batch.inputs.norm(dim=-1, keepdim=True)  # of norm 1
    # With one token of norm x among n of norm 1, x is 20 times the mean from x = 20 (n - 1) / (n - 20) on.
    bound = 20 * 99 / 80
    inputs[7, 2] *= bound * 1.001
    inputs[50, 0] *= bound * 0.999
    batch = Batch(inputs, batch.targets)
    kept = transform("drop_outliers")(batch, 0)
    rows = [n for n in range(100) if n != 7]
    assert torch.equal(kept.inputs, batch.inputs[rows]) and torch.equal(kept.targets, batch.targets[rows])


def test_a_layer_whose_inputs_are_all_0_has_no_outliers() -> None:
    """Each of its tokens was one: the batch was dropped."""
    batch = random_batch(100, L, D)
    batch.inputs[:, 1] = 0
    assert transform("drop_outliers")(batch, 0).tokens == 100


def test_an_outlier_has_no_part_in_the_loss_and_its_gradients() -> None:
    """Of `mse`, by a loop over the tokens that are left: only the decoder's bias has a gradient where nothing is
    active."""
    made = parts(
        transforms=[{"name": "drop_outliers", "factor": 3.0}],
        transcoder={"dtype": "float64"},
        normalisation={"name": "none"},
        losses=[{"name": "mse", "scale": "raw"}],
        activation={"name": "relu"},
    )
    transcoder = made.transcoder
    with torch.no_grad():
        transcoder.b_enc.fill_(-100.0)
        transcoder.tying.b_dec.copy_(random_batch(L, 1, D, torch.float64, seed=5).inputs[:, 0])
    batch = random_batch(20, L, D, torch.float64)
    batch.inputs[4, 1] *= 8
    batch.inputs[9, 2] *= 9
    batch.targets[4] += 50
    norms = [[sum(float(x) ** 2 for x in batch.inputs[b, s]) ** 0.5 for s in range(L)] for b in range(20)]
    means = [sum(norms[b][s] for b in range(20)) / 20 for s in range(L)]
    kept = [b for b in range(20) if all(norms[b][s] < 3 * means[s] for s in range(L))]
    assert kept == [b for b in range(20) if b not in (4, 9)]
    idle = torch.zeros(transcoder.shape, dtype=torch.int64)
    outcome = objective(transcoder, made.losses, made.transforms[0](batch, 0), idle, 0.0)
    outcome.total.backward()
    expected, gradient = 0.0, torch.zeros(L, D, dtype=torch.float64)
    for b in kept:
        error = transcoder.tying.b_dec.detach() - batch.targets[b]
        expected += float(error.square().sum()) / (len(kept) * D)
        gradient += 2 * error / (len(kept) * D)
    assert float(outcome.total.detach()) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(transcoder.tying.b_dec.grad, gradient, rtol=1e-12, atol=0)


def test_positions_and_tokens_are_dropped_by_what_the_source_says() -> None:
    batch = with_text(random_batch(35, L, D))
    assert batch.positions is not None and batch.token_ids is not None
    kept = transform("drop_positions", first=2)(batch, 0)
    assert kept.positions[:, 1].tolist() == [2, 3, 4] * 7
    kept = transform("drop_tokens", ids=[0, 3])(batch, 0)
    assert kept.token_ids.tolist() == [n % 7 for n in range(35) if n % 7 not in (0, 3)]


@pytest.mark.parametrize(("name", "lacks"), [("drop_positions", "where in its context"), ("drop_tokens", "token ids")])
def test_a_source_that_does_not_know_its_text_is_refused_by_name(name: str, lacks: str) -> None:
    settings = {"ids": [1]} if name == "drop_tokens" else {}
    with pytest.raises(
        Refused, match=rf"^transforms: {name} needs .*{lacks}.*leave it out, or use a source that reads"
    ):
        transform(name, **settings)(random_batch(4, L, D), 0)


def test_subsample_keeps_about_its_share_and_other_rows_in_other_batches() -> None:
    keeps, batch = transform("subsample", share=0.3), with_text(random_batch(4000, L, D))
    one, other = keeps(batch, 0), keeps(batch, 1)
    assert abs(one.tokens - 1200) < 4 * (4000 * 0.3 * 0.7) ** 0.5
    assert one.tokens != other.tokens or not torch.equal(one.inputs, other.inputs)
    assert torch.equal(keeps(batch, 0).inputs, one.inputs)


def test_noise_has_the_size_that_it_says_relative_to_each_activation() -> None:
    batch = random_batch(2000, L, D)
    batch.inputs[:, 1] *= 50
    noisy = transform("noise", inputs=0.2, targets=0.0)(batch, 3)
    rms = batch.inputs.square().mean(-1, keepdim=True).sqrt()
    draws = (noisy.inputs - batch.inputs) / rms
    assert draws.std((0, 2)).tolist() == pytest.approx([0.2] * L, rel=0.05)
    assert abs(float(draws.mean())) < 0.01
    assert noisy.targets is batch.targets


def test_noise_is_the_same_on_any_number_of_data_ranks() -> None:
    chosen = recipe(transforms=[{"name": "noise", "targets": 0.3}])
    whole = assemble(chosen).source
    halves = [assemble(chosen, parallel=Single(rank, 2)).source for rank in range(2)]
    for _ in range(3):
        batch, pieces = whole.next(), [half.next() for half in halves]
        assert torch.equal(torch.cat([piece.inputs for piece in pieces]), batch.inputs)
        assert torch.equal(torch.cat([piece.targets for piece in pieces]), batch.targets)


def test_noise_is_in_training_only() -> None:
    plain, noisy = parts().source, parts(transforms=["noise"]).source
    assert torch.equal(next(noisy.held_out(16)).inputs, next(plain.held_out(16)).inputs)
    assert not torch.equal(noisy.next().inputs, plain.next().inputs)

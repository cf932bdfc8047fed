"""`exemplar_start`: every feature begins as a training token, whose number the test finds by brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clt_callbacks.exemplar import _Examples
from clt_callbacks.targets import targets as written_to
from clt_plugins import Batch
from clt_plugins.errors import Faults
from tests.plugins.callbacks.test_formulas import Opened
from tests.support.helpers import recipe

BATCH = 16
"""Tokens of a batch of the small recipe; it has 10 features in each of 3 layers."""


def start(**changed: object) -> tuple[Opened, Tensor, Tensor]:
    """A run whose features are examples; inputs and targets of the batches that come next, each [T, L, D]."""
    changed.setdefault("source", {"active": 15.0})
    opened = Opened({"name": "exemplar_start"}, **changed)
    batches = list(opened.batches(4))
    opened.callback.start(opened.run)
    inputs, targets = (torch.cat([getattr(batch, side) for batch in batches]) for side in ("inputs", "targets"))
    return opened, inputs.double(), targets.double()


def examples(opened: Opened, inputs: Tensor) -> Tensor:
    """The number of the token in whose direction each feature's encoder row points, [L, F]."""
    encoder = opened.transcoder.tensors()["W_enc"].detach().double()
    cosines = torch.einsum("lfd,tld->lft", normalize(encoder, dim=-1), normalize(inputs, dim=-1))
    best, number = cosines.max(-1)
    torch.testing.assert_close(best, torch.ones_like(best), rtol=0, atol=1e-6)  # inputs are float32
    return number


def test_encoder_rows_have_the_directions_of_tokens_and_keep_their_norms():
    before = Opened({"name": "exemplar_start"}).transcoder.tensors()["W_enc"].detach().norm(dim=-1)
    opened, inputs, _ = start()
    after = opened.transcoder.tensors()["W_enc"].detach().norm(dim=-1)
    torch.testing.assert_close(after, before)
    number = examples(opened, inputs)
    for layer in number:
        assert len(layer.unique()) == len(layer), "each token once in a layer"
    assert not torch.equal(number[0], number[1]), "layers have other examples"


def test_decoder_rows_are_the_tokens_targets_times_the_least_squares_factor_of_the_next_batch():
    opened, inputs, targets = start()
    number = examples(opened, inputs)
    transcoder = opened.transcoder
    rows = [transcoder.tensors()[f"W_dec.{layer:02}"].detach().double() for layer in range(3)]
    factors = torch.zeros(3, dtype=torch.float64)
    for layer in range(3):
        for later in range(layer, 3):
            written, target = rows[layer][:, later - layer], targets[number[layer], later]
            factor = (written * target).sum() / target.square().sum()
            torch.testing.assert_close(written, factor * target, rtol=1e-5, atol=1e-8)
            # All source layers have the same factor for a target.
            assert layer == 0 or torch.isclose(factors[later], factor, rtol=1e-5)
            factors[later] = factor
    # 20 tokens of two batches are read for 10 features; the third batch is what they are fitted to.
    fitted = slice(2 * BATCH, 3 * BATCH)
    transcoder.eval()
    written = transcoder(inputs[fitted]).detach()
    best = (written * targets[fitted]).sum((0, 2)) / written.square().sum((0, 2))
    torch.testing.assert_close(best, torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tying", ["per_source", "per_layer", "per_target"])
def test_a_row_for_several_targets_is_their_mean(tying):
    opened, inputs, targets = start(tying={"name": tying})
    number = examples(opened, inputs)
    decoder = opened.transcoder.tensors()["W_dec"].detach().double()
    for layer in range(3):
        later = slice(layer, layer + 1) if tying == "per_layer" else slice(layer, None)
        wanted = targets[number[layer], later].mean(1)
        cosine = torch.cosine_similarity(decoder[layer], wanted, dim=-1)
        same = torch.allclose(cosine, torch.ones_like(cosine), atol=1e-6)
        # Features of `per_target` have no decoder rows of their own: those stay as drawn.
        assert same == (tying != "per_target")


def test_a_run_that_goes_on_is_left_alone():
    opened = Opened({"name": "exemplar_start"})
    opened.progress.step = 5
    before = opened.transcoder.W_enc.clone()
    opened.callback.start(opened.run)
    assert torch.equal(opened.transcoder.W_enc, before)


def test_it_begins_lower_than_random_rows():
    errors = []
    for callbacks in ({"name": "exemplar_start"}, {"name": "tied_start"}):
        opened = Opened(callbacks)
        opened.callback.start(opened.run)
        batch = list(opened.batches(5))[-1]
        opened.transcoder.eval()
        errors.append(float((opened.transcoder(batch.inputs.double()) - batch.targets).square().sum()))
    assert errors[0] < errors[1]


def test_a_token_without_an_input_is_no_example():
    sparse = {"source": {"active": 0.5}}
    opened = Opened({"name": "exemplar_start"}, **sparse)
    before = opened.transcoder.tensors()["W_enc"].detach().clone()
    opened.callback.start(opened.run)
    after = opened.transcoder.tensors()["W_enc"].detach()
    kept = (before == after).all(-1)
    assert kept.any()
    assert not kept.all()
    assert after.any(-1).all(), "no row is 0"


def test_rare_tokens_are_drawn_more_often_than_frequent_ones():
    opened = Opened({"name": "exemplar_start"})
    # 90 of 100 tokens are alike; the others differ from them and from each other.
    frequent = torch.zeros(90, 3, 6)
    frequent[..., 0] = 1 + torch.rand(90, 3, generator=torch.Generator().manual_seed(0))
    rare = torch.zeros(10, 3, 6)
    rare[torch.arange(10), :, 1 + torch.arange(10) % 5] = torch.where(torch.arange(10) < 5, 1.0, -1.0)[:, None]
    examples = _Examples(opened.run, 1, torch.cat([frequent, rare]), written_to(opened.run))
    # Densities are 90 and 1, so that all of the ten are among the first twenty but for one chance in hundreds.
    assert set(range(90, 100)) <= set(examples._order(torch.cat([frequent, rare])[:, 0], 0)[:20].tolist())


@pytest.mark.parametrize("name", ["exemplar_start", "tied_start", "active_subspace"])
def test_first_values_are_refused_where_a_run_begins_with_other_weights(name):
    with pytest.raises(Faults, match=rf"callbacks\[0\]: '{name}' overwrites the weights of transcoder\.from"):
        recipe(callbacks=[{"name": name}], transcoder={"from": "other/transcoder"})


def test_a_layer_that_never_varies_gives_no_nan():
    """With `per_layer` its rows became 0, and then nothing said any more that they are written to one layer."""
    opened = Opened({"name": "exemplar_start"}, tying={"name": "per_layer"}, source={"active": 15.0})
    real = opened.parts.source.next

    def constant() -> Batch:
        batch = real()
        batch.targets[:, 1] = 0
        return batch

    opened.parts.source.next = constant
    opened.callback.start(opened.run)
    rows = opened.transcoder.tensors()["W_dec"].detach()
    assert not rows[1].any() and rows[0].any() and rows.isfinite().all()

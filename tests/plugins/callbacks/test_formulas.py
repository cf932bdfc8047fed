"""The built-in callbacks against their formulas, computed another way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clt_plugins import CrossLayerTranscoder, Training, build, generator, load_plugins, run
from clt_plugins.errors import Faults, Refused
from clt_plugins.files.folders import read_tensors
from clt_plugins.files.steps import step_folders
from clt_plugins.training.optimizers.make import make_optimizer
from clt_plugins.training.saved.checkpoint import Progress
from tests.support import recording
from tests.support.helpers import parts, stir, tables

MODULE = "tests.support.recording"


@pytest.fixture(autouse=True)
def empty() -> None:
    for kept in (recording.CALLS, recording.WEIGHTS, recording.ACT):
        kept.clear()


def go(folder: Path, *callbacks: dict[str, Any], resume: str | None = None, **changed: Any) -> CrossLayerTranscoder:
    changed["callbacks"] = list(callbacks)
    return run(tables(**changed), out=folder, resume=resume, plugins=load_plugins(extra=[MODULE]))


class Opened:
    """A run before its first step, with one callback."""

    def __init__(self, callback: dict[str, Any], **changed: Any):
        changed.setdefault("transcoder", {"dtype": "float64"})
        self.parts = parts(callbacks=[callback], **changed)
        self.transcoder = self.parts.transcoder
        optimizer = make_optimizer(self.transcoder, self.parts.context.recipe)
        self.progress = Progress(step=0, tokens=0, idle_tokens=torch.zeros(3, 10, dtype=torch.int64))
        self.run = Training(self.parts, optimizer, self.progress, 12)
        (self.callback,) = self.parts.callbacks

    def batches(self, count: int) -> Iterator[Any]:
        """The batches that come next, from a source of its own; raw, since statistics are not fitted."""
        recipe = self.parts.context.recipe
        source = build(recipe.source, self.parts.context)
        for _ in range(count):
            yield source.next()


# -- decoder_norm ------------------------------------------------------------------------------------------------------


def norms(tensors: dict[str, Tensor]) -> Tensor:
    return torch.stack([tensors[f"W_dec.{layer:02}"].flatten(1).norm(dim=1) for layer in range(3)])


@pytest.mark.parametrize("how", ["exactly", "at_most"])
def test_decoder_norms_are_projected_after_each_step(tmp_path, how):
    go(tmp_path / "run", {"name": "decoder_norm", "norm": 0.5, "how": how})
    by_step = [
        norms(read_tensors(path / "transcoder.safetensors")) for path in step_folders(tmp_path / "run/checkpoints")
    ]
    for found in by_step:
        assert (found < 0.5 + 1e-6).all()
        assert how == "at_most" or (found > 0.5 - 1e-6).all()
    go(tmp_path / "free")
    assert (norms(read_tensors(tmp_path / "free/transcoder/transcoder.safetensors")) > 0.5).any(), (
        "it had something to do"
    )


def test_an_offset_of_features_cannot_be_compensated():
    """It is multiplied with the row, and nothing divides it: the reconstruction changed by a tenth."""
    tying = {"name": "per_source", "feature_offset": True}
    opened = Opened({"name": "decoder_norm", "compensate": True}, tying=tying)
    with pytest.raises(Refused, match=r"compensate: an offset of features \(tying\.feature_offset\) cannot be divided"):
        opened.callback.start(opened.run)
    without = Opened({"name": "decoder_norm", "compensate": True}, tying={"name": "per_source"})
    without.callback.start(without.run)


@pytest.mark.parametrize(
    "activation",
    [{"name": "relu"}, {"name": "jumprelu", "threshold": 0.2}, {"name": "topk", "k": 5, "ranking": "norm"}],
    ids=str,
)
def test_a_compensated_projection_changes_no_reconstruction(activation):
    opened = Opened({"name": "decoder_norm", "norm": 0.5, "compensate": True}, activation=activation)
    stir(opened.transcoder)
    opened.transcoder.eval()
    x = torch.randn(32, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, l0 = opened.transcoder(x).detach(), float((opened.transcoder.encode(x).dense() > 0).sum())
    opened.callback.after(opened.run, None)
    assert float(opened.transcoder.tying.norms().max()) < 0.5 + 1e-6 and l0 > 32
    # norms() are float32, so factors are off by that; they divide out in the product.
    torch.testing.assert_close(opened.transcoder(x).detach(), before, rtol=1e-6, atol=1e-6)
    assert float((opened.transcoder.encode(x).dense() > 0).sum()) == l0


# -- ema ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_the_saved_transcoder_has_the_average_and_checkpoints_the_weights(tmp_path, every):
    changed = {"train": {"eval_every": 12}}
    ended = go(tmp_path / "run", {"name": "recording"}, {"name": "ema", "decay": 0.6, "every": every}, **changed)
    average: dict[str, Tensor] = {}
    for update, step in enumerate(range(every, 13, every)):
        decay = min(0.6, update / (update + 9))
        for name, weight in recording.WEIGHTS[step].items():
            before = average.get(name, torch.zeros(()))
            average[name] = decay * before + (1 - decay) * weight
    for name, parameter in ended.named_parameters():
        torch.testing.assert_close(parameter.detach(), average[name], rtol=1e-5, atol=1e-7)
    last = read_tensors(tmp_path / "run/checkpoints/step_000012/transcoder.safetensors")
    assert torch.equal(last["b_enc"], recording.WEIGHTS[12]["encoder.b_enc"]), "goes on with the weights as they are"
    (evaluated,) = [nmse for what, _, *rest in recording.CALLS if what == "evaluated" for nmse in rest]
    scored = CrossLayerTranscoder.load(tmp_path / "run/transcoder")
    source = build(ended.context.recipe.source, ended.context)
    batches = list(source.held_out(64))
    targets = torch.cat([batch.targets for batch in batches])
    error = (torch.cat([scored(batch.inputs).detach() for batch in batches]) - targets).square().mean((0, 2))
    total = targets.var(0, correction=0).mean(1)
    assert evaluated == pytest.approx(float((error / total).mean()), rel=1e-4), "evaluated with the averages"


def test_without_an_update_the_weights_are_saved(tmp_path):
    """The averages were still the initial weights."""
    ended = go(tmp_path / "ema", {"name": "ema", "every": 13})
    alone = go(tmp_path / "alone")
    for (name, one), other in zip(ended.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other), name
    evaluated = [
        [
            value
            for line in (folder / "metrics.jsonl").read_text().splitlines()
            for value in [json.loads(line).get("eval/nmse")]
        ]
        for folder in (tmp_path / "ema", tmp_path / "alone")
    ]
    assert evaluated[0] == evaluated[1] and any(evaluated[0])


# -- early_stopping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience, better, end", [(1, "lower", 4), (2, "lower", 6), (2, "higher", 6)])
def test_training_ends_when_nothing_is_better_for_so_many_evaluations(tmp_path, patience, better, end):
    sets = {"name": "early_stopping", "patience": patience, "better": better, "change": 1e6}
    train = {"train": {"eval_every": 2}}
    go(tmp_path / "run", sets, **train)
    assert step_folders(tmp_path / "run/checkpoints")[-1].name == f"step_{end:06}"


def test_it_goes_on_while_held_out_tokens_get_better(tmp_path):
    go(tmp_path / "run", {"name": "early_stopping", "patience": 1}, train={"eval_every": 4})
    assert step_folders(tmp_path / "run/checkpoints")[-1].name == "step_000012"


def test_a_metric_that_nobody_logs_is_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(Faults, match=r"callbacks\.metric: no number 'eval/mnse' .*there are: .*eval/nmse"):
        go(tmp_path / "run", {"name": "early_stopping", "metric": "eval/mnse"})


# -- initial values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tying", ["untied", "per_source", "per_target"])
def test_encoder_rows_begin_as_decoder_rows_of_their_own_layer(tying):
    opened = Opened({"name": "tied_start", "scale": 2.0}, tying={"name": tying})
    opened.callback.start(opened.run)
    tensors = opened.transcoder.tensors()
    for layer in range(3):
        rows = tensors[f"W_dec.{layer:02}"][:, 0] if tying == "untied" else tensors["W_dec"][layer]
        assert torch.equal(tensors["W_enc"][layer], 2 * rows)


def subspace(x: Tensor, dimensions: int) -> Tensor:
    """The projection on the first right singular vectors of [T, D]."""
    _, _, vectors = np.linalg.svd(x.double().numpy(), full_matrices=False)
    return torch.from_numpy(vectors[:dimensions].T @ vectors[:dimensions])


def test_rows_begin_in_the_directions_in_which_activations_vary():
    opened = Opened({"name": "active_subspace", "dimensions": 2, "tokens": 60})
    before = {name: value.clone() for name, value in opened.transcoder.tensors().items()}
    batches = list(opened.batches(4))
    inputs, targets = (torch.cat([getattr(batch, side) for batch in batches]) for side in ("inputs", "targets"))
    opened.callback.start(opened.run)
    after = opened.transcoder.tensors()

    def projected(rows: Tensor, x: list[Tensor]) -> Tensor:
        out = torch.stack([rows[:, n] @ subspace(one, 2) for n, one in enumerate(x)], 1)
        return out * (rows.flatten(1).norm(dim=1) / out.flatten(1).norm(dim=1))[:, None, None]

    for layer in range(3):
        encoder = projected(before["W_enc"][layer][:, None], [inputs[:, layer]])[:, 0]
        torch.testing.assert_close(after["W_enc"][layer], encoder, rtol=1e-9, atol=1e-10)
        name = f"W_dec.{layer:02}"
        decoder = projected(before[name], [targets[:, t] for t in range(layer, 3)])
        torch.testing.assert_close(after[name], decoder, rtol=1e-9, atol=1e-10)


def test_a_share_of_the_mean_square_takes_the_fewest_directions_that_have_it():
    opened = Opened({"name": "active_subspace", "variance": 0.9})
    squares = torch.diag(torch.tensor([5.0, 1.0, 3.0, 0.5, 0.3, 0.2], dtype=torch.float64))
    found = opened.callback._subspace(squares[None])[0]
    assert torch.equal(found.diagonal().round(), torch.tensor([1.0, 1.0, 1.0, 0, 0, 0], dtype=torch.float64))


def test_initial_values_do_nothing_in_a_run_that_goes_on():
    for name in ("tied_start", "active_subspace"):
        opened = Opened({"name": name, **({} if name == "tied_start" else {"tokens": 32})})
        opened.progress.step = 5
        before = opened.transcoder.W_enc.clone()
        opened.callback.start(opened.run)
        assert torch.equal(opened.transcoder.W_enc, before)


# -- resample ----------------------------------------------------------------------------------------------------------


def test_dead_features_begin_anew_at_inputs_of_high_loss():
    opened = Opened({"name": "resample", "tokens": 48, "every": 1, "until": 1.0})
    transcoder, run_ = opened.transcoder, opened.run
    dead = {0: [1, 4], 2: [9]}
    for layer, features in dead.items():
        opened.progress.idle_tokens[layer, features] = 64
    before = {name: value.clone() for name, value in transcoder.tensors().items()}
    batches = list(opened.batches(3))
    inputs = torch.cat([batch.inputs for batch in batches]).double()
    targets = torch.cat([batch.targets for batch in batches]).double()
    transcoder.eval()
    missing = targets - torch.cat([transcoder(batch.inputs) for batch in batches]).detach()
    transcoder.train()
    opened.progress.step = 3
    opened.callback.after(run_, None)
    after = transcoder.tensors()
    for layer in range(3):
        loss = missing[:, layer:].square().sum((1, 2)).square()
        alive = [f for f in range(10) if f not in dead.get(layer, [])]
        of_encoder = before["W_enc"][layer, alive].norm(dim=1).mean()
        of_decoder = before[f"W_dec.{layer:02}"][alive].flatten(1).norm(dim=1).mean()
        drawn = torch.rand(10, dtype=torch.float64, generator=generator(0, "resample", 3, layer))
        for feature in range(10):
            rows = after[f"W_dec.{layer:02}"][feature]
            if feature in alive:
                assert torch.equal(after["W_enc"][layer, feature], before["W_enc"][layer, feature])
                assert torch.equal(rows, before[f"W_dec.{layer:02}"][feature])
                continue
            share = torch.cat([torch.zeros(1, dtype=torch.float64), (loss / loss.sum()).cumsum(0)])
            (token,) = [b for b in range(48) if share[b] <= drawn[feature] < share[b + 1]]
            x, r = inputs[token, layer], missing[token, layer:]
            torch.testing.assert_close(after["W_enc"][layer, feature], 0.2 * of_encoder * x / x.norm())
            torch.testing.assert_close(rows, of_decoder.to(r) * r / r.norm(), rtol=1e-6, atol=1e-9)
            assert after["b_enc"][layer, feature] == 0
    assert not opened.progress.idle_tokens[0].any()


@pytest.mark.parametrize("tying", [{"name": "per_layer"}, {"name": "per_source", "feature_scale": True}])
def test_features_with_one_row_begin_at_what_is_missing_where_they_write(tying):
    """`per_layer` took the mean of what is missing in layers that it cannot write to; rows were too short."""
    opened = Opened({"name": "resample", "tokens": 48, "every": 1, "until": 1.0}, tying=tying)
    name = tying["name"]
    transcoder, run_ = opened.transcoder, opened.run
    with torch.no_grad():
        for factors in (value for own, value in transcoder.tying.named_parameters() if own == "scale"):
            factors.uniform_(0.5, 1.5)
    opened.progress.idle_tokens[0, [1, 4]] = 64
    batches = list(opened.batches(3))
    targets = torch.cat([batch.targets for batch in batches]).double()
    transcoder.eval()
    missing = targets - torch.cat([transcoder(batch.inputs) for batch in batches]).detach()
    transcoder.train()
    norms = transcoder.tying.norms().detach()[0]
    opened.progress.step = 3
    opened.callback.after(run_, None)
    to = missing[:, :1] if name == "per_layer" else missing
    share = to.square().sum((1, 2)).square()
    share = torch.cat([torch.zeros(1, dtype=torch.float64), (share / share.sum()).cumsum(0)])
    drawn = torch.rand(10, dtype=torch.float64, generator=generator(0, "resample", 3, 0))
    alive = [f for f in range(10) if f not in (1, 4)]
    for feature in (1, 4):
        (token,) = [b for b in range(48) if share[b] <= drawn[feature] < share[b + 1]]
        row = transcoder.tying.expand(0)[feature, 0]
        torch.testing.assert_close(row / row.norm(), to[token].mean(0) / to[token].mean(0).norm())
        torch.testing.assert_close(transcoder.tying.norms()[0, feature], norms[alive].mean())


def test_with_adafactor_it_forgets_what_is_of_single_features_alone(tmp_path):
    """A factor of all layers was taken for one of features."""
    resample = {"name": "resample", "every": 2, "tokens": 16, "until": 1.0}
    go(tmp_path / "run", resample, optimizer={"name": "adafactor"}, train={"dead_after_tokens": 1})
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line).get("callbacks/resampled", 0) for line in lines) > 0


def test_it_rests_after_its_share_of_the_steps():
    opened = Opened({"name": "resample", "tokens": 16, "until": 0.5})
    opened.progress.idle_tokens.fill_(64)
    opened.progress.step = 7
    before = opened.transcoder.W_enc.clone()
    opened.callback.after(opened.run, None)
    assert torch.equal(opened.transcoder.W_enc, before)


def test_with_an_encoder_that_shares_the_decoders_rows_the_decoder_alone_begins_anew():
    opened = Opened({"name": "resample", "tokens": 16, "until": 1.0}, encoder={"name": "tied"})
    opened.progress.idle_tokens[1, 3] = 64
    before = {name: value.clone() for name, value in opened.transcoder.tensors().items()}
    opened.callback.after(opened.run, None)
    after = opened.transcoder.tensors()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"W_dec.01"}
    assert (before["W_dec.01"] != after["W_dec.01"]).any(2).any(1).nonzero().flatten().tolist() == [3]


def test_low_rank_encoders_get_the_direction_that_their_inputs_make_of_it():
    opened = Opened({"name": "tied_start"}, encoder={"name": "low_rank", "rank": 4})
    opened.callback.start(opened.run)
    transcoder = opened.transcoder
    rows = transcoder.tying.expand(1)[:, 0]
    x = torch.zeros(10, 3, 6, dtype=torch.float64)
    x[:, 1] = rows
    h, encoder, _ = transcoder.affine_form(x)
    torch.testing.assert_close(encoder[1], h[:, 1])
    other = Opened({"name": "tied_start"}, encoder={"name": "tied"})
    with pytest.raises(Faults, match=r"the encoder .tied. computes its rows from other weights"):
        other.callback.start(other.run)

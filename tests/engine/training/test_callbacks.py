"""When callbacks are called, and what their operations change."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from clt_plugins import CrossLayerTranscoder, PluginError, Training, load_plugins, run, score
from clt_plugins.errors import Faults
from clt_plugins.files.folders import read_tensors
from clt_plugins.files.steps import step_folders
from clt_plugins.training.optimizers.make import make_optimizer
from clt_plugins.training.saved.checkpoint import Progress
from tests.support import recording
from tests.support.helpers import parts, tables

MODULE = "tests.support.recording"


@pytest.fixture
def noted() -> ModuleType:
    """The module whose callback notes its calls, empty."""
    for kept in (recording.CALLS, recording.WEIGHTS, recording.ACT):
        kept.clear()
    return recording


def go(folder: Path, resume: str | None = None, accept: tuple[str, ...] = (), **changed: Any) -> Any:
    changed.setdefault("callbacks", [{"name": "recording", "every": 2}])
    changed["train"] = {"steps": 6, "eval_every": 3, "checkpoint_every": 3, "log_every": 3, **changed.get("train", {})}
    return run(tables(**changed), out=folder, resume=resume, accept=accept, plugins=load_plugins(extra=[MODULE]))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_method_is_called_at_its_steps(tmp_path, noted):
    go(tmp_path / "run")
    seen = [(what, step) for what, step, *_ in noted.CALLS]
    assert seen == [
        ("start", 0),
        *[("before", 0), ("after", 2), ("before", 2)],
        *[("evaluated", 3), ("after", 4), ("before", 4), ("after", 6), ("evaluated", 6), ("finish", 6)],
    ]
    assert all(step == number for what, step, *rest in noted.CALLS if what == "after" for number in rest)
    noted.CALLS.clear()
    go(tmp_path / "run", resume="step_000003")
    assert [(what, step) for what, step, *_ in noted.CALLS][:3] == [("start", 3), ("after", 4), ("before", 4)]


def test_sampled_batches_are_normalised_and_trained_on_as_if_they_had_not_been_read(tmp_path, noted):
    go(tmp_path / "without", callbacks=[])
    seen = []
    noted.ACT["start"] = noted.ACT["after"] = lambda run: seen.extend(run.sample(40))
    go(tmp_path / "with")
    assert len(seen) == 4 * 3, "batches of 16 tokens"
    made = parts(**tables())
    made.transcoder.load_state_dict(CrossLayerTranscoder.load(tmp_path / "with/transcoder").state_dict())
    first, normaliser = made.source.next(), made.transcoder.normaliser
    torch.testing.assert_close(seen[0].inputs, normaliser.inputs(first.inputs))
    torch.testing.assert_close(seen[0].targets, normaliser.targets(first.targets))
    one, other = (read_tensors(tmp_path / name / "transcoder/transcoder.safetensors") for name in ("without", "with"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_checkpoint_and_a_number_on_demand(tmp_path, noted):
    def act(run: Training) -> None:
        if run.step == 2:
            run.checkpoint()
            run.log({"mine/number": 7})

    noted.ACT["after"] = act
    go(tmp_path / "run")
    assert [path.name for path in step_folders(tmp_path / "run/checkpoints")] == [f"step_00000{n}" for n in (2, 3, 6)]
    assert [line["step"] for line in lines(tmp_path / "run") if line.get("mine/number") == 7] == [2]


def test_numbers_of_callbacks_are_in_the_record_of_their_step(tmp_path, noted, capsys):
    """Steps 3 and 6 log and evaluate, after 2, 4 and 6 the callback is called."""
    noted.ACT["after"] = lambda run: run.log({"mine/after": run.step})
    noted.ACT["evaluated"] = lambda run: run.log({"mine/seen": run.metrics["eval/nmse"]})
    noted.ACT["finish"] = lambda run: run.log({"mine/end": 1})
    go(tmp_path / "run", loggers=["jsonl", "console"])
    watched = ("loss/total", "eval/nmse", "mine/after", "mine/seen", "mine/end")
    logged = lines(tmp_path / "run")
    assert [(line["step"], *(name for name in watched if name in line)) for line in logged] == [
        (2, "mine/after"),
        (3, "loss/total"),
        (3, "eval/nmse", "mine/seen"),
        (4, "mine/after"),
        (6, "loss/total", "mine/after"),
        (6, "eval/nmse", "mine/seen"),
        (6, "mine/end"),
    ]
    assert all(line["tokens"] == 16 * line["step"] for line in logged)
    shown = [line.split() for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line[:6] for line in shown if "mine/after" in line] == [
        ["step", f"{step}", "tokens", f"{16 * step}", "mine/after", f"{step}"] for step in (2, 4)
    ]
    assert len(shown) == len(logged)
    go(tmp_path / "run", resume="latest", loggers=["jsonl", "console"])
    assert lines(tmp_path / "run") == logged, "the end comes once"


def test_a_transcoder_that_is_changed_at_the_end_is_evaluated_as_it_is_saved(tmp_path, noted, caplog):
    def halve(run: Training) -> None:
        run.set_weights({name: value / 2 for name, value in run.weights().items() if name.startswith("tying")})

    noted.ACT["finish"] = halve
    caplog.set_level("INFO")
    go(tmp_path / "run")
    before, after = [line["eval/nmse"] for line in lines(tmp_path / "run") if line["step"] == 6 and "eval/nmse" in line]
    saved = CrossLayerTranscoder.load(tmp_path / "run" / "transcoder")
    assert after == pytest.approx(
        score(saved, parts().source.held_out(tables()["train"]["eval_tokens"])).nmse, rel=1e-6
    )
    assert abs(after - before) > 1e-3
    assert f"held-out NMSE {after:.4f}" in caplog.text
    go(tmp_path / "run", resume="latest")
    assert len([line for line in lines(tmp_path / "run") if line["step"] == 6 and "eval/nmse" in line]) == 2


def test_averages_at_the_end_were_evaluated_already(tmp_path, noted):
    go(tmp_path / "run", callbacks=[{"name": "ema", "decay": 0.8}])
    assert len([line for line in lines(tmp_path / "run") if line["step"] == 6 and "eval/nmse" in line]) == 1


def test_a_name_that_callbacks_log_twice_loses_no_number(tmp_path, noted):
    def act(run: Training) -> None:
        run.log({"mine/first": 1, "mine/same": 1})
        run.log({"mine/same": 2, "loss/total": -1.0})

    noted.ACT["after"] = act
    go(tmp_path / "run", callbacks=[{"name": "recording", "every": 3}])
    logged = [line for line in lines(tmp_path / "run") if line["step"] == 3 and "eval/nmse" not in line]
    assert [(line.get("mine/first"), line["mine/same"], line["loss/total"] > 0) for line in logged] == [
        (1, 1, True),
        (None, 2, False),
    ]


@pytest.mark.parametrize("method", ["before", "after", "evaluated"])
def test_an_early_end_is_logged_evaluated_saved_and_stays(tmp_path, noted, method, caplog):
    caplog.set_level("INFO")
    noted.ACT[method] = lambda run: run.stop("enough") if run.step >= 3 else None
    go(tmp_path / "run")
    end = {"before": 5, "after": 4, "evaluated": 3}[method]
    assert noted.CALLS[-1] == ("finish", end)
    assert step_folders(tmp_path / "run/checkpoints")[-1].name == f"step_00000{end}"
    last = [line for line in lines(tmp_path / "run") if line["step"] == end]
    assert any("loss/total" in line for line in last)
    assert any("eval/nmse" in line for line in last)
    assert f"training ended at step {end} of 6: enough" in caplog.text
    noted.ACT.clear()
    noted.CALLS.clear()
    go(tmp_path / "run", resume="latest")
    assert [("start", end), ("finish", end)] == noted.CALLS
    go(tmp_path / "run", resume="latest", accept=("callbacks",))
    assert noted.CALLS[-1] == ("finish", 6)


class Opened:
    """A run that is begun, with an optimizer that knows of every weight."""

    def __init__(self, **changed: Any):
        self.parts = parts(**changed)
        self.transcoder = self.parts.transcoder
        recipe = self.parts.context.recipe
        self.optimizer = make_optimizer(self.transcoder, recipe)
        for p in self.transcoder.parameters():
            p.grad = torch.ones_like(p)
        self.optimizer.step()
        idle = torch.full((3, 10), 9)
        self.progress = Progress(step=1, tokens=16, idle_tokens=idle)
        self.run = Training(self.parts, self.optimizer, self.progress, 12)

    def states(self, key: str = "exp_avg") -> dict[str, torch.Tensor]:
        """The optimizer's tensors, cut as files are."""
        parameters = dict(self.transcoder.named_parameters())
        views = self.transcoder.views().items()
        out = {}
        for name, (owner, view, _) in views:
            out[name] = view(self.optimizer.state[parameters[owner]][key].expand_as(parameters[owner]))
        return out


@pytest.mark.parametrize("tying", ["untied", "per_source"])
@pytest.mark.parametrize(
    "optimizer",
    [{"name": "adam"}, {"name": "adam", "states": "bf16"}, {"name": "rowwise_adam"}],
    ids=["float32", "bf16", "rowwise"],
)
def test_new_weights_of_features_leave_all_other_numbers_as_they_are(tying, optimizer):
    opened = Opened(tying={"name": tying}, optimizer=optimizer)
    before = {name: x.clone() for name, x in opened.transcoder.tensors().items()}
    feature = torch.tensor([2, 7])
    encoder, decoder = torch.randn(2, 6), torch.randn(2, 2, 6)
    opened.run.reinitialise(1, feature, encoder=encoder, bias=torch.tensor([0.5, 0.25]), decoder=decoder)
    expected = dict(before)
    expected["W_enc"] = before["W_enc"].clone()
    expected["W_enc"][1, feature] = encoder
    expected["b_enc"] = before["b_enc"].clone()
    expected["b_enc"][1, feature] = torch.tensor([0.5, 0.25])
    changed = {"W_enc": (1, feature), "b_enc": (1, feature)}
    if tying == "untied":
        expected["W_dec.01"] = before["W_dec.01"].clone()
        expected["W_dec.01"][feature] = decoder
        changed["W_dec.01"] = (feature,)
    else:
        expected["W_dec"] = before["W_dec"].clone()
        expected["W_dec"][1, feature] = decoder.mean(1)
        changed["W_dec"] = (1, feature)
    for name, value in opened.transcoder.tensors().items():
        assert torch.equal(value, expected[name]), name
    for key in ("exp_avg", "exp_avg_sq"):
        for name, value in opened.states(key).items():
            forgotten = torch.zeros_like(value, dtype=torch.bool)
            if name in changed:
                forgotten[changed[name]] = True
            assert (value[forgotten] == 0).all()
            assert (value[~forgotten] != 0).all()
    idle = torch.full((3, 10), 9)
    idle[1, feature] = 0
    assert torch.equal(opened.progress.idle_tokens, idle)


@pytest.mark.parametrize("revive", [True, False])
def test_a_raised_bias_leaves_a_dead_feature_dead_where_it_should(revive):
    opened = Opened()
    before = {name: x.clone() for name, x in opened.transcoder.tensors().items()}
    assert torch.equal(opened.run.bias(1), before["b_enc"][1])
    assert not opened.run.bias(1).requires_grad
    feature = torch.tensor([8, 3])
    opened.run.reinitialise(1, feature, bias=opened.run.bias(1)[feature] + 0.25, revive=revive)
    expected = before["b_enc"][1].clone()
    expected[feature] += 0.25
    assert torch.equal(opened.run.bias(1), expected)
    others = {name: x for name, x in opened.transcoder.tensors().items() if name != "b_enc"}
    assert all(torch.equal(value, before[name]) for name, value in others.items())
    idle = torch.full((3, 10), 9)
    idle[1, feature] = 0 if revive else 9
    assert torch.equal(opened.progress.idle_tokens, idle)


def test_biases_that_are_computed_are_refused_by_name(monkeypatch):
    opened = Opened()
    monkeypatch.setattr(type(opened.transcoder.encoder), "bias", lambda self: 2 * self.b_enc)
    with pytest.raises(Faults, match="the encoder 'plain' computes its biases from other weights"):
        opened.run.bias(0)


def test_the_lower_halves_of_new_weights_are_empty():
    opened = Opened(transcoder={"dtype": "bfloat16"}, optimizer={"name": "adam", "bf16_weights": "split"})
    for p in opened.transcoder.parameters():
        opened.optimizer.state[p]["low"].fill_(77)
    opened.run.reinitialise(0, torch.tensor([4]), encoder=torch.ones(1, 6))
    low = opened.states("low")["W_enc"]
    assert (low[0, 4] == 0).all()
    assert int((low == 77).sum()) == low.numel() - 6
    factor = torch.ones(3, 10)
    factor[2, 1] = 0.5
    opened.run.scale_decoder(factor)
    low = opened.states("low")["W_dec.02"]
    assert (low[1] == 0).all()
    assert int((low == 77).sum()) == low.numel() - 6


@pytest.mark.parametrize("tying", [{"name": "untied"}, {"name": "per_source", "feature_scale": True}])
def test_a_scaled_decoder_with_its_encoder_divided_writes_the_same(tying):
    opened = Opened(tying=tying, activation={"name": "relu"}, transcoder={"dtype": "float64"})
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    before, norms = opened.transcoder(x), opened.transcoder.tying.norms()
    factor = torch.rand(3, 10, dtype=torch.float64) + 0.5
    opened.run.scale_decoder(factor, inverse=True)
    torch.testing.assert_close(opened.transcoder(x), before)
    torch.testing.assert_close(opened.transcoder.tying.norms(), norms * factor.float())


def test_a_tying_whose_features_share_rows_is_refused_by_name():
    opened = Opened(tying={"name": "per_target"})
    with pytest.raises(
        Faults, match=r"callbacks: features of the tying 'per_target' have no decoder rows of their own"
    ):
        opened.run.scale_decoder(torch.ones(3, 10))


MINE = """
from attrs import frozen
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    '''One to be checked.'''

class Mine:
    BODY

@hookimpl
def clt_callbacks():
    return [Spec("mine", Config, lambda config, context: Mine())]
"""


@pytest.mark.parametrize(
    "body, text",
    [
        ("every = 1", "has none of the methods of a callback: start, before"),
        ("every = 0; after = print", "its `every` is 0, so that `after` would never be called"),
        ("every = 2; start = print", "its `every` is 2, but it has neither `before` nor `after`"),
        ("every = 0.5; after = print", "must be a number of steps, 0 or more: 0.5"),
        ("start = print", "is no Callback: it has no every"),
    ],
)
def test_an_object_that_is_no_callback_is_refused_by_name(tmp_path, distributions, body, text):
    distributions.module("mine", MINE.replace("BODY", body))
    with pytest.raises(PluginError, match=rf"^callbacks\[0\]: 'mine' of plugin 'mine' .*{text}"):
        run(tables(callbacks=["mine"]), out=tmp_path / "run", plugins=load_plugins(extra=["mine"]))

"""What plugins keep from step to step is saved, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from clt_plugins import CrossLayerTranscoder, PluginError, load_plugins, run
from clt_plugins.errors import Faults
from clt_plugins.files.folders import read_tensors
from tests.support import guide as guide_text
from tests.support.helpers import tables

if TYPE_CHECKING:
    from tests.conftest import Distributions

KEPT = [{"name": "mse"}, *({"name": name} for name in ("learned", "average", "counted"))]
TRAIN = {"steps": 6, "checkpoint_every": 3, "log_every": 6, "eval_every": 2}


@pytest.fixture
def guide(distributions: Distributions) -> list[str]:
    """The module of the guide with a parameter, a buffer and plain data."""
    distributions.package(guide_text.package("clt_state"))
    return ["clt_state"]


def go(
    folder: Path, modules: list[str], resume: str | None = None, accept: tuple[str, ...] = (), **changed: Any
) -> Any:
    recipe = tables(**{"loggers": [], "train": TRAIN, **changed})
    return run(recipe, out=folder, resume=resume, accept=accept, plugins=load_plugins(extra=modules))


def saved(folder: Path, step: int = 6) -> dict[str, torch.Tensor]:
    path = folder / f"checkpoints/step_{step:06}"
    return read_tensors(path / "transcoder.safetensors") | read_tensors(path / "training.safetensors")


def test_a_run_with_state_of_every_form_resumes_bit_for_bit(tmp_path, guide):
    go(tmp_path / "run", guide, losses=KEPT)
    whole = saved(tmp_path / "run")
    assert whole["losses[1].log_weight"].all(), "trained in every layer"
    assert whole["exp_avg/losses[1].log_weight"].all()
    assert whole["losses[2].often"].shape == (3, 10)
    assert whole["losses[2].often"].any()
    state = json.loads((tmp_path / "run/checkpoints/step_000006/training.json").read_text())
    assert state["plugins"] == {"losses[3]": {"name": "counted", "state": {"steps": 6}}}, "evaluation does not count"
    go(tmp_path / "run", guide, resume="step_000003", losses=KEPT)
    again = saved(tmp_path / "run")
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


LOGGED = """
from attrs import frozen
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    '''The weights of layers that the loss has learned.'''

class Learned:
    def step(self, step):
        (one,) = [weight for weight in step.weights if weight.name == "losses[1].log_weight"]
        return {"learned/log_weight": one.parameter}

    def held_out(self):
        return None

@hookimpl
def clt_metrics():
    return [Spec("learned_weights", Config, lambda config, context: Learned())]
"""


def test_a_metric_logs_what_a_loss_has_learned(tmp_path, guide, distributions):
    distributions.module("logged_weights", LOGGED)
    recipe = {"losses": KEPT[:2], "loggers": ["jsonl"], "metrics": ["training", "held_out", "learned_weights"]}
    go(tmp_path / "run", [*guide, "logged_weights"], **recipe)
    (line,) = [one for one in map(json.loads, (tmp_path / "run/metrics.jsonl").open()) if "learned/log_weight" in one]
    kept = saved(tmp_path / "run")["losses[1].log_weight"]
    torch.testing.assert_close(torch.tensor(line["learned/log_weight"]), kept)


def test_what_a_checkpoint_lacks_is_refused_unless_it_may_begin_anew(tmp_path, guide):
    go(tmp_path / "run", guide)
    for name in ("average", "counted"):
        other = [{"name": "mse"}, {"name": name}]
        with pytest.raises(Faults, match=r"losses: differs from the run"):
            go(tmp_path / "run", guide, "step_000003", losses=other)
        go(tmp_path / "run", guide, "step_000003", ("losses",), losses=other)
    state = json.loads((tmp_path / "run/checkpoints/step_000006/training.json").read_text())
    assert state["plugins"] == {"losses[1]": {"name": "counted", "state": {"steps": 3}}}
    go(tmp_path / "run", guide, "step_000003", ("losses",), losses=KEPT[:3])
    go(tmp_path / "run", guide, "step_000006", ("losses",), losses=KEPT[:1])


LOSS = """
import torch
from attrs import define, frozen
from clt_plugins import Spec, buffer, hookimpl

@frozen(kw_only=True)
class Config:
    '''One to be checked.'''

@define
class Record:
    value: object

class Loss(BASE):
    needs_pre = False
    CLASS

    def __init__(self):
        super().__init__()
        self.mean = None
        INIT

    def selection(self, tokens, idle_tokens):
        return None

    def __call__(self, forward):
        STEP
        return {"mine": 0 * forward.features.values.sum()}

@hookimpl
def clt_losses():
    return [Spec("mine", Config, lambda config, context: Loss())]
"""


@pytest.fixture
def loss(distributions: Distributions, tmp_path: Path):
    """Runs two steps with a loss; source text replaced first."""

    def go_on(base: str = "object", **replaced: str) -> None:
        source = LOSS.replace("BASE", base)
        for word in ("CLASS", "INIT", "STEP"):
            source = source.replace(word, replaced.get(word, "pass"))
        distributions.forget("mine")
        distributions.module("mine", source)
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        go(out, ["mine"], losses=[{"name": "mse"}, {"name": "mine"}], train={"steps": 2, "eval_every": 2})

    return go_on


LOST = {
    "appears": {"STEP": "self.mean = forward.inputs.mean(0)"},
    "replaced": {"INIT": "self.mean = torch.zeros(3)", "STEP": "self.mean = self.mean + 1"},
    "in place": {"INIT": "self.mean = torch.zeros(3)", "STEP": "self.mean += 1"},
    "list": {"INIT": "self.mean = []", "STEP": "self.mean.append(forward.inputs.mean())"},
    "table": {"INIT": "self.mean = {'a': torch.zeros(3)}", "STEP": "self.mean['a'].add_(1)"},
    "record": {"INIT": "self.mean = Record(torch.zeros(3))", "STEP": "self.mean.value += 1"},
    "array": {
        "INIT": "import numpy; self.mean = numpy.empty(2, object); self.mean[1] = torch.zeros(3)",
        "STEP": "self.mean[1].add_(1)",
    },
}


@pytest.mark.parametrize("base", ["object", "torch.nn.Module"])
@pytest.mark.parametrize("fault", LOST)
def test_a_tensor_that_would_be_lost_is_refused_by_name(loss, base, fault):
    with pytest.raises(
        PluginError,
        match=r"^losses\[1\]: 'mine' of plugin 'mine' .*its tensor `mean\S*` changes .*caches = \('mean',\)",
    ):
        loss(base, **LOST[fault])


def test_what_may_be_forgotten_and_what_is_saved_pass(loss):
    loss(CLASS="caches = ('mean',)", **LOST["appears"])
    loss(
        "torch.nn.Module",
        INIT="self.register_buffer('mask', None, persistent=False)",
        STEP="self.mask = forward.inputs",
    )
    loss(
        "torch.nn.Module",
        INIT="self.register_buffer('mask', torch.ones(3)); self.part = self.mask[:1]",
        STEP="self.part += 1",
    )
    loss(INIT="self.mean = torch.zeros(3)", STEP="self.mean.sum()")
    for numbers in ("numpy.float32(1)", "numpy.array(1.0)", "numpy.arange(3)", "[numpy.array(1)]", "bytearray(3)"):
        loss(INIT=f"import numpy; self.mean = {numbers}")


@pytest.mark.parametrize(
    ("base", "kept"),
    [
        ("object", "torch.nn.Parameter(torch.zeros(3))"),
        ("object", "torch.nn.Linear(2, 2)"),
        ("object", "torch.zeros(3, requires_grad=True)"),
        ("torch.nn.Module", "[torch.nn.Linear(2, 2)]"),
    ],
)
def test_a_parameter_that_nobody_would_train_is_refused_before_the_first_step(loss, tmp_path, base, kept):
    with pytest.raises(PluginError, match=r"^losses\[1\]: .*its parameter `mean\S*` would never be trained"):
        loss(base, INIT=f"self.mean = {kept}")
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.parametrize("value", ["(1, 2)", "{1: 2}", "float('nan')", "torch.zeros(2)"])
def test_a_state_that_is_no_plain_data_is_refused_by_name(loss, value):
    methods = f"state = lambda self: {value}; load_state = lambda self, state: None"
    with pytest.raises(PluginError, match=r"^losses\[1\]: 'mine' of .*its `state` (must be|is not what JSON)"):
        loss(CLASS=methods)


ACTIVATION = """
import torch
from attrs import frozen
from clt_plugins import Above, Spec, buffer, hookimpl

@frozen(kw_only=True)
class Config:
    '''Everything above a threshold that follows the mean of what was kept.'''

class Following(torch.nn.Module):
    fixed_size = False

    def __init__(self, config, context):
        super().__init__()
        self.shape = context.n_layers, len(context.parallel.shard(context.n_features))
        self.register_buffer("bound", buffer(torch.full(self.shape, 0.1, device=context.device), 1))
        self.register_buffer("pull", torch.full((), 0.5, device=context.device), persistent=False)

    def threshold(self):
        return self.bound.clone()

    def selection(self, tokens, norms):
        return Above(self.bound, tokens, *self.shape)

    def forward(self, pre, feature):
        bound = self.bound if feature is None else self.bound.flatten()[feature]
        if self.training:
            with torch.no_grad():
                self.bound = self.bound * (1 - 0.1 * self.pull) + 0.01 * pre.mean().abs()
        return torch.where(pre > bound, pre, 0)

@hookimpl
def clt_activations():
    return [Spec("following", Config, Following)]
"""


def test_an_activations_buffer_is_saved_with_the_transcoder_and_in_slices(tmp_path, distributions):
    distributions.module("following", ACTIVATION)
    trained = go(tmp_path / "run", ["following"], activation={"name": "following"})
    whole = saved(tmp_path / "run")
    assert not torch.equal(whole["activation.bound"], torch.full((3, 10), 0.1))
    assert "activation.pull" not in whole
    assert trained.feature_axes()["activation.bound"] == 1, "also after another tensor took its place"
    loaded = CrossLayerTranscoder.load(tmp_path / "run/transcoder", plugins=load_plugins(extra=["following"]))
    assert torch.equal(loaded.activation.bound, whole["activation.bound"])
    assert float(loaded.activation.pull) == 0.5, "computed when it is built"
    x = torch.randn(5, 3, 6)
    assert torch.equal(loaded(x), trained(x))
    go(tmp_path / "run", ["following"], "step_000003", activation={"name": "following"})
    again = saved(tmp_path / "run")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())

"""What the engine promises to third-party plugins, and what it does when one of them is wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from clt_plugins import CrossLayerTranscoder, Faults, PluginError, load_plugins, read_recipe, run
from clt_plugins.cli.main import main_group
from clt_plugins.errors import ExitCode
from clt_plugins.files.sliced import SlicedTensors
from clt_plugins.model.assemble import assemble
from clt_plugins.model.devices import make_kernels
from clt_plugins.recipe.read import as_toml
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry.build import build
from tests.support.commands import on_ranks
from tests.support.helpers import random_batch, stir, tables

if TYPE_CHECKING:
    from tests.conftest import Distributions

HEADER = '''
from attrs import frozen
import torch
from clt_plugins import *

@frozen(kw_only=True)
class Config:
    """Third-party."""
    weight: float = 1.0
    """A number."""
'''

LOSS = (
    HEADER
    + """
class Loss:
    needs_pre = False
    def selection(self, tokens, idle_tokens):
        return None
    def __call__(self, forward):
        pass  # step
        return {"mine": forward.features.values.sum() * 0}

def build(config, context):
    pass  # build
    return Loss()

@hookimpl
def clt_losses():
    return [Spec("mine", Config, build)]

@hookimpl
def clt_check(recipe):
    pass  # check
    return []
"""
)

RECIPE = """
name = "x"
activation = { name = "topk", k = 4 }
loggers = []

[source]
name = "synthetic"

[transcoder]
features = 16
device = "cpu"

[[losses]]
name = "mse"

[[losses]]
name = "mine"
weight = 2.0

[train]
statistics_tokens = 64
steps = 2
batch_tokens = 32
eval_tokens = 32
"""


@pytest.fixture
def third_party(distributions: Distributions) -> Callable[[str], None]:
    """Installs a plugin `mine` of the distribution `clt-mine 1.0` with this source."""
    return lambda source: distributions.install("clt-mine", "1.0", {"mine": source})


@pytest.fixture
def ran(third_party: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Result]:
    """Runs RECIPE on the command line; the loss `mine` executes a statement in a phase: build, step or check."""

    def go(phase: str, statement: str) -> Result:
        third_party(LOSS.replace(f"pass  # {phase}", statement))
        (tmp_path / "recipe.toml").write_text(RECIPE)
        monkeypatch.chdir(tmp_path)
        return CliRunner().invoke(main_group, ["run", "recipe.toml"])

    return go


# -- whose error it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["build", "step"])
def test_an_accidental_value_error_with_a_colon_is_the_plugins(ran: Any, phase: str) -> None:
    done = ran(phase, 'raise ValueError("losses: too heavy")')
    assert done.exit_code == ExitCode.FAILED
    (line,) = [line for line in done.stderr.splitlines() if "too heavy" in line]
    number = LOSS.splitlines().index(f"    {'    ' * (phase == 'step')}pass  # {phase}") + 1
    assert line.startswith("recipe.toml:16: losses[1]: 'mine' of plugin 'mine' (clt-mine 1.0): failed in ")
    assert f"ValueError: losses: too heavy (clt_mine_mine.py:{number})" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("phase", ["build", "step"])
def test_a_full_disk_in_a_plugin_names_it_without_blaming_it(ran: Any, phase: str) -> None:
    done = ran(phase, 'raise OSError(28, "No space left on device", "log.bin")')
    assert done.exit_code == ExitCode.FAILED
    line = done.stderr.splitlines()[-1]
    named = "losses[1]: 'mine' of plugin 'mine' (clt-mine 1.0)"
    assert line == f"{named}: [Errno 28] No space left on device: 'log.bin'"


def test_a_closed_pipe_is_not_an_error_of_the_plugin_that_wrote_into_it(ran: Any) -> None:
    done = ran("step", 'raise BrokenPipeError(32, "Broken pipe")')
    assert done.exit_code == ExitCode.FAILED
    assert "plugin" not in done.stderr


@pytest.mark.parametrize("phase", ["build", "step", "check"])
def test_what_a_plugin_refuses_is_the_users_and_has_the_recipes_line(ran: Any, phase: str) -> None:
    done = ran(phase, 'raise Refused("losses[1].weight", "too heavy; use a smaller one")')
    assert done.exit_code == ExitCode.USAGE
    assert done.stderr.splitlines()[-1] == "recipe.toml:18: losses[1].weight: too heavy; use a smaller one"
    assert "plugin" not in done.stderr


def test_what_checks_refuse_is_told_with_the_complaints_of_others(third_party: Any, distributions: Any) -> None:
    third_party(LOSS.replace("pass  # check", 'raise Refused("train.lr", "too high")'))
    complaint = "from clt_plugins import *\n@hookimpl\ndef clt_check(recipe):\n    return ['seed: no luck in it']\n"
    distributions.install("clt-other", "1.0", {"other": complaint})
    with pytest.raises(Faults) as caught:
        read_recipe(tables())
    assert [fault.path for fault in caught.value.faults] == ["train.lr", "seed"]


# -- protocols ----------------------------------------------------------------------------------------------------

ACTIVATION = (
    HEADER
    + """
class Thing(torch.nn.Module):
    def __init__(self, context):
        super().__init__()
        shape = context.n_layers, len(context.parallel.shard(context.n_features))
        self.threshold = parameter(torch.zeros(shape, device=context.device), feature_axis=1)
    def selection(self, tokens, norms):
        return Above(self.threshold.detach(), tokens, *self.threshold.shape)
    def forward(self, pre, feature):
        return (pre - (self.threshold if feature is None else self.threshold.flatten()[feature])).relu()

@hookimpl
def clt_activations():
    return [Spec("mine", Config, lambda config, context: Thing(context))]
"""
)


def test_an_activation_that_lacks_something_is_told_what(third_party: Any, tmp_path: Path) -> None:
    third_party(ACTIVATION)
    with pytest.raises(PluginError) as caught:
        run(tables(activation={"name": "mine"}), out=tmp_path / "out")
    who = "activation: 'mine' of plugin 'mine' (clt-mine 1.0)"
    assert f"{who}: build returned Thing, which is no Activation: it has no fixed_size;" in str(caught.value)


def test_the_feature_axis_of_a_parameter_survives_saving_and_loading(third_party: Any, tmp_path: Path) -> None:
    third_party(
        ACTIVATION.replace("class Thing(torch.nn.Module):", "class Thing(torch.nn.Module):\n    fixed_size = False")
    )
    transcoder = assemble(read_recipe(tables(activation={"name": "mine"}))).transcoder
    transcoder.save(tmp_path / "saved")
    loaded = CrossLayerTranscoder.load(tmp_path / "saved")
    assert loaded.activation.threshold.feature_axis == 1
    assert loaded.feature_axes() == transcoder.feature_axes()
    assert transcoder.feature_axes()["threshold"] == 1


TYING = (
    HEADER
    + """
from clt_plugins.templates.tying.module import Example

class Tying(Example):
    def affine(self, inputs):
        return super().affine(inputs) + READS

@hookimpl
def clt_tyings():
    return [Spec("mine", Config, lambda config, context: Tying(1.0, context))]
"""
)


@pytest.mark.parametrize("reads", ["0.5 * inputs", "inputs.mean(0) * 0", "0"])
def test_a_tying_that_reads_the_inputs_decodes_only_with_them(third_party: Any, reads: str) -> None:
    third_party(TYING.replace("READS", reads))
    transcoder = assemble(read_recipe(tables(tying={"name": "mine"}))).transcoder
    stir(transcoder)
    inputs = random_batch(5, 3, 6).inputs
    features = transcoder.encode(inputs)
    assert torch.equal(transcoder.decode(features, inputs), transcoder(inputs))
    if reads == "0":
        assert torch.equal(transcoder.decode(features), transcoder(inputs))
    else:
        with pytest.raises(Faults, match="give `inputs` too"):
            transcoder.decode(features)


# -- one broken plugin must not take the defaults from everybody ------------------------------------------------------

KERNELS = (
    HEADER
    + """
from clt_plugins.templates.kernel import Example

class Kernels:
    name = "mine"
    select = Example.select
    decode, grad_values, grad_rows = Example.decode, Example.grad_values, Example.grad_rows

@hookimpl
def clt_kernels():
    return [Spec("mine", Config, lambda config, context: BUILD)]
"""
)


def test_kernels_without_a_preference_leave_auto_working(third_party: Any) -> None:
    cpu = torch.device("cpu")
    best = make_kernels("auto", cpu, load_plugins()).name
    third_party(KERNELS.replace("BUILD", "Kernels()"))
    assert make_kernels("auto", cpu, load_plugins()).name == best
    assert make_kernels("auto", cpu, load_plugins(block=["kernels"])).name == "mine"


def test_kernels_that_cannot_be_built_leave_auto_working(third_party: Any, caplog: pytest.LogCaptureFixture) -> None:
    cpu = torch.device("cpu")
    best = make_kernels("auto", cpu, load_plugins()).name
    third_party(KERNELS.replace("BUILD", "1 / 0"))
    assert make_kernels("auto", cpu, load_plugins()).name == best
    assert "plugin 'mine' (clt-mine 1.0): failed in build: ZeroDivisionError" in caplog.text


EXPORTER = (
    HEADER.replace("weight: float = 1.0", "weight: float")
    + """
class Exporter:
    def __init__(self, config, context):
        pass
    def export(self, transcoder, folder):
        pass

@hookimpl
def clt_exporters():
    return [Spec("a-mine", Config, Exporter, reader=READER)]
"""
)


@pytest.mark.parametrize("reader", ["None", "lambda: 1 / 0", "lambda: Exporter({}, {})"])
def test_an_exporter_that_needs_settings_leaves_reading_other_formats_working(
    third_party: Any, tmp_path: Path, reader: str
) -> None:
    third_party(EXPORTER.replace("READER", reader))
    plugins = load_plugins()
    transcoder = assemble(read_recipe(tables(activation={"name": "relu"}), plugins=plugins)).transcoder
    stir(transcoder)
    assert next(iter(plugins.choices("exports"))) == "a-mine", "asked before the others"
    (tmp_path / "folder").mkdir()
    exporter = build(
        structure_choice(plugins, "exports", {"name": "circuit-tracer", "model_name": "none"}), transcoder.context
    )
    exporter.export(transcoder, tmp_path / "folder")
    loaded = CrossLayerTranscoder.load(tmp_path / "folder")
    inputs = random_batch(5, 3, 6).inputs
    torch.testing.assert_close(loaded(inputs), transcoder(inputs))


# -- what a loss learns -------------------------------------------------------------------------------------------

LEARNED = (
    HEADER
    + """
class Loss(torch.nn.Module):
    needs_pre = False
    def __init__(self, config, context):
        super().__init__()
        self.weight = config.weight
        self.level = parameter(torch.zeros((), dtype=context.dtype), feature_axis=None)
        shape = context.n_layers, len(context.parallel.shard(context.n_features))
        self.offset = parameter(torch.zeros(shape, dtype=context.dtype), feature_axis=1)
    def selection(self, tokens, idle_tokens):
        return None
    def forward(self, forward):
        active = forward.sum_features(forward.features.values.tanh().sum()) / forward.features.shape[0]
        return {
            "level": self.weight * (active - self.level).square(),
            "offset": self.weight * forward.sum_features((forward.idle_tokens + 2 - self.offset).square().sum()),
        }

@hookimpl
def clt_losses():
    return [Spec("mine", Config, Loss)]
"""
)
SETTINGS: dict[str, Any] = {
    "transcoder": {"dtype": "float64", "features": 11},
    "losses": [{"name": "mse"}, {"name": "mine", "weight": 0.01}],
    "loggers": [],
    "train": {"steps": 6, "checkpoint_every": 3, "clip_norm": 0.5, "lr": 0.01},
}
NAMES = ("losses[1].level", "losses[1].offset")


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:06}"


def test_parameters_of_a_loss_are_trained_saved_and_resumed_bit_for_bit(third_party: Any, tmp_path: Path) -> None:
    third_party(LEARNED)
    run(tables(**SETTINGS), out=tmp_path / "whole")
    states = {step: load_file(checkpoint(tmp_path / "whole", step) / "training.safetensors") for step in (3, 6)}
    for name in NAMES:
        assert bool((states[3][name] != 0).all()), "trained, and in the checkpoint"
        assert bool((states[6][name] != states[3][name]).all())
        assert f"exp_avg/{name}" in states[6] or f"exp_avg of {name}" in states[6]
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(checkpoint(tmp_path / "resumed", 6))
    shutil.rmtree(tmp_path / "resumed" / "transcoder")
    run(tables(**SETTINGS), out=tmp_path / "resumed", resume="step_000003")
    for file in ("training.safetensors", "transcoder.safetensors"):
        one, other = (load_file(checkpoint(tmp_path / name, 6) / file) for name in ("whole", "resumed"))
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_gradients_of_a_losss_parameters_count_for_the_norm_and_are_clipped(third_party: Any, tmp_path: Path) -> None:
    steep = LEARNED.replace("self.weight * (active - self.level).square()", "1000 * self.level + 0 * active")
    third_party(steep)
    # The first step of Adam is lr · g / (|g| + eps): half of lr for a gradient that was clipped to 1, else almost all.
    chosen = {
        "train": {"steps": 1, "clip_norm": 1.0, "lr": 0.01},
        "optimizer": {"name": "adam", "eps": 1.0},
        "schedule": {"name": "constant", "warmup_steps": 0},
    }
    run(tables(**{**SETTINGS, **chosen, "loggers": ["jsonl"]}), out=tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("optim/grad_norm", 0) for line in lines) == pytest.approx(1000, rel=1e-2)
    level = load_file(checkpoint(tmp_path / "out", 1) / "training.safetensors")["losses[1].level"]
    assert float(level) == pytest.approx(-0.005, rel=1e-2)


def test_parameters_of_a_loss_learn_the_same_on_two_tensor_ranks(third_party: Any, tmp_path: Path) -> None:
    third_party(LEARNED)
    run(tables(**SETTINGS), out=tmp_path / "one")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(as_toml(read_recipe(tables(**SETTINGS, parallel={"name": "tensor"}))))
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(tmp_path)])
    for done in on_ranks(2, "-m", "clt_plugins", "run", recipe, "--out", tmp_path / "two", PYTHONPATH=path):
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (SlicedTensors.find(checkpoint(tmp_path / name, 6), "training") for name in ("one", "two"))
    assert one.shapes == two.shapes
    for name in NAMES:
        torch.testing.assert_close(two.read(name), one.read(name), rtol=1e-9, atol=1e-12)

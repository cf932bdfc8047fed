"""What the engine promises to third-party plugins, and that one that is wrong takes nothing from the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import CrossLayerTranscoder, Faults, PluginError, load_plugins, read_recipe, run
from clt_plugins.model.assemble import assemble
from clt_plugins.model.devices import make_kernels
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry.build import build
from tests.support.helpers import random_batch, stir, tables
from tests.support.third_party import HEADER

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

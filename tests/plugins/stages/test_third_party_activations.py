"""Activations of other distributions that are converted: rankings of any kind, and what thresholds cannot stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clt_plugins import CrossLayerTranscoder, run
from clt_plugins.errors import Faults, PluginError
from clt_plugins.registry.plugins import Plugins, load_plugins
from tests.support.helpers import tables

ACTIVATION = '''
import torch
from attrs import frozen
from clt_plugins import Above, Spec, Top, hookimpl, parameter

@frozen(kw_only=True)
class Config:
    """Of a test."""

class Activation(torch.nn.Module):
    fixed_size = FIXED

    def __init__(self, context):
        super().__init__()
        self.context = context
        PARAMETER

    def selection(self, tokens, norms):
        context = self.context
        if FIXED:
            n_layers, n_features = context.n_layers, context.n_features
            kernels, parallel = context.kernels, context.parallel
            return Top(5, tokens, n_layers, n_features, per="token", kernels=kernels, parallel=parallel)
        return Above(0.0, tokens, context.n_layers, context.n_features)

    def forward(self, pre, feature):
        return VALUE

@hookimpl
def clt_activations():
    return [Spec("mine", Config, lambda config, context: Activation(context))]
'''
CHANGES: dict[str, Any] = {
    "activation": {"name": "mine"},
    "convert": {"tokens": 512, "calibration_tokens": 2048, "tolerance": 0.3},
}


def with_activation(distributions: Any, fixed: bool, value: str, parameter: str = "pass") -> Plugins:
    source = ACTIVATION.replace("FIXED", str(fixed)).replace("VALUE", value).replace("PARAMETER", parameter)
    distributions.module("my_activation", source)
    return load_plugins(extra=["my_activation"])


@pytest.mark.parametrize("fixed", [True, False])
def test_one_that_keeps_pre_activations_is_converted(distributions, fixed, tmp_path):
    """One without a fixed size runs dense, and has as many features as pass."""
    loaded = with_activation(distributions, fixed, "pre.relu()")
    chosen = tables(**CHANGES)
    run(chosen, out=tmp_path / "run", plugins=loaded)
    before, after = (
        CrossLayerTranscoder.load(tmp_path / "run" / name, plugins=loaded) for name in ("transcoder", "converted")
    )
    x = torch.randn(200, 3, 6, generator=torch.Generator().manual_seed(0))
    assert after.choices["activation"].name == "jumprelu"
    if not fixed:  # thresholds near 0 let pass nearly what a ReLU lets pass
        assert float(after.encode(x).l0().double().mean()) > 0.8 * float(before.encode(x).l0().double().mean()) > 0


@pytest.mark.parametrize("value", ["pre.relu().square()", "torch.nn.functional.softplus(pre)", "pre.sigmoid()"])
@pytest.mark.parametrize("fixed", [True, False])
def test_one_that_changes_what_it_keeps_is_refused_before_training(distributions, fixed, value, tmp_path):
    loaded = with_activation(distributions, fixed, value)
    with pytest.raises(Faults, match=r"stages\[0\]: mine changes the pre-activations that it keeps"):
        run(tables(**CHANGES), out=tmp_path / "run", plugins=loaded)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "b_dec"])
def test_a_parameter_with_the_name_of_a_tensor_in_files_is_refused_by_name(distributions, name, tmp_path):
    parameter = f"self.{name} = parameter(torch.zeros(context.n_layers, context.n_features), feature_axis=1)"
    loaded = with_activation(distributions, True, "pre.relu()", parameter)
    text = rf"^activation: .*'my_activation'.*its parameter '{name}' has the name of a tensor"
    with pytest.raises(PluginError, match=text):
        run(tables(activation={"name": "mine"}), out=tmp_path / "run", plugins=loaded)
    assert not (tmp_path / "run").exists()

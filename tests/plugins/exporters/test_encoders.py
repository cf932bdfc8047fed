"""Exports of every encoder compute what the transcoder computes; one that is no matrix is refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clt_plugins import CrossLayerTranscoder, Faults, load_plugins
from clt_plugins.model.assemble import assemble
from clt_plugins.model.in_model.replacement import Replacement
from clt_plugins.recipe.read import read_recipe
from clt_plugins.testing import cases
from tests.support.exports import (
    JUMPRELU,
    MODEL,
    TYINGS,
    circuit_tracer_forward,
    close,
    export,
    exporter,
    inputs,
    load,
    make,
)
from tests.support.helpers import ENCODERS, tables

FORMATS = ("circuit-tracer", "saelens", "safetensors", "crosslayer-coding")


@pytest.mark.parametrize("tying", TYINGS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_outputs_are_the_same(encoder: str, tying: str, tmp_path: Path) -> None:
    """Features by the formulas of the formats, to 1e-6 of the largest where files hold float32."""
    transcoder = make(tying=TYINGS[tying], encoder=ENCODERS[encoder], transcoder={"dtype": "float64"})
    x = inputs().double()
    wanted, features = transcoder(x).detach(), transcoder.encode(x).dense().detach()
    assert features.count_nonzero() > 100
    folder = export(transcoder, "circuit-tracer", tmp_path / "c")
    close(circuit_tracer_forward(folder, x.float()), wanted, 1e-5)
    assert load(folder).choices["encoder"].name == "plain"
    close(load(folder)(x.float()).detach().double(), wanted, 1e-5)

    tensors = load_file(export(transcoder, "safetensors", tmp_path / "p") / "clt.safetensors")
    folder = export(transcoder, "saelens", tmp_path / "s")
    for layer in range(3):
        sae = load_file(folder / f"layer_{layer:02}/sae_weights.safetensors")
        for matrix, bias in ((sae["W_enc"], sae["b_enc"]), (tensors["W_enc"][layer].T, tensors["b_enc"][layer])):
            pre = x[:, layer] @ matrix.double() + bias
            close(pre * (pre > sae["threshold"]), features[:, layer], 1e-6)

    library = export(transcoder, "crosslayer-coding", tmp_path / "l")
    close(load(library)(x.float()).detach().double(), wanted, 1e-5)


CROSS = """
import torch
from attrs import frozen
from clt_plugins import Refused, Spec, hookimpl, parameter, uniform

@frozen(kw_only=True)
class Config:
    '''Features read their layer and all earlier ones.'''

class Cross(torch.nn.Module):
    def __init__(self, context):
        super().__init__()
        self.n_layers = context.n_layers
        shape = context.n_layers, context.n_features, context.n_layers * context.d_model
        self.weight = parameter(uniform("cross", shape, 0.3, context, 1), 1)
        self.b_enc = parameter(self.weight.detach().new_zeros(self.weight.shape[:2]), 1)

    def inputs(self, x):
        seen = torch.ones(self.n_layers, self.n_layers, dtype=x.dtype, device=x.device).tril()
        return (x[:, None] * seen[..., None]).flatten(2)

    def rows(self, tying):
        return self.weight

    def bias(self):
        return self.b_enc

    def expand(self, layer, tying):
        raise Refused("encoder", "cross reads several layers, which no matrix of one layer can: choose plain to export")

    def views(self):
        return {"W_cross": ("weight", lambda x: x, 1), "b_enc": ("b_enc", lambda x: x, 1)}

@hookimpl
def clt_encoders():
    return [Spec("cross", Config, lambda config, context: Cross(context))]
"""


@pytest.mark.parametrize("name", FORMATS)
def test_an_encoder_that_is_no_matrix_of_a_layer_is_refused_before_training(
    name: str, distributions: Any, tmp_path: Path
) -> None:
    distributions.module("my_cross", CROSS)
    loaded = load_plugins(extra=["my_cross"])
    typed = read_recipe(tables(encoder={"name": "cross"}, activation=JUMPRELU, model=MODEL), plugins=loaded)
    text = "encoder: cross reads several layers, which no matrix of one layer can: choose plain to export"
    for device in ("cpu", "meta"):
        assert exporter(name).check(assemble(typed, device=torch.device(device)).transcoder) == [text]
    with pytest.raises(Faults, match=f"^{text}$"):
        exporter(name).export(assemble(typed).transcoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_such_an_encoder_conforms_and_is_read_in_a_language_model(distributions: Any, tmp_path: Path) -> None:
    distributions.module("my_cross", CROSS)
    loaded = load_plugins(extra=["my_cross"])
    typed = read_recipe(tables(encoder={"name": "cross"}, activation=JUMPRELU), plugins=loaded)
    transcoder = assemble(typed).transcoder.eval()
    transcoder.save(tmp_path / "t")
    x = inputs()
    wanted = transcoder(x).detach()
    torch.testing.assert_close(CrossLayerTranscoder.load(tmp_path / "t", plugins=loaded)(x), wanted, rtol=0, atol=0)
    replacement = Replacement(transcoder, x)
    for layer in range(3):
        torch.testing.assert_close(replacement(layer, x[:, layer]), wanted[:, layer], rtol=1e-5, atol=1e-5)
    for case in cases("my_cross"):
        if case.check in ("form", "causal", "product", "fresh", "sparse_is_dense"):
            case.run()

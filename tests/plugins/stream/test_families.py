"""A target is what the MLP adds to the residual, in every family: tried on tiny models, by plain torch.

families.md has the verdict on every causal class of transformers; the slow test tries them all again.
"""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from clt_plugins import Refused
from clt_stream.sites import find_sites
from clt_stream.taps import find_order
from tests.support.families import JSON, TABLE, Verdict, error_of, examine, table, tiny_config, tiny_model

RIGHT = {
    "bloom": ("transformer.h.0.mlp.input", "transformer.h.0.mlp.dense_4h_to_h.output"),
    "codegen": ("transformer.h.0.mlp.input", "transformer.h.0.mlp.output"),
    "cohere": ("model.layers.0.mlp.input", "model.layers.0.mlp.output"),
    "falcon": ("transformer.h.0.mlp.input", "transformer.h.0.mlp.output"),
    "falcon_h1": ("model.layers.0.feed_forward.input", "model.layers.0.feed_forward.output"),
    "gemma2": ("model.layers.0.mlp.input", "model.layers.0.post_feedforward_layernorm.output"),
    "gemma3_text": ("model.layers.0.mlp.input", "model.layers.0.post_feedforward_layernorm.output"),
    "gpt_neox": ("gpt_neox.layers.0.mlp.input", "gpt_neox.layers.0.mlp.output"),
    "gptj": ("transformer.h.0.mlp.input", "transformer.h.0.mlp.output"),
    "granite": ("model.layers.0.mlp.input", "model.layers.0.mlp.output * 0.22"),
    "jamba": ("model.layers.0.feed_forward.input", "model.layers.0.feed_forward.output"),
    "lfm2": ("model.layers.0.feed_forward.input", "model.layers.0.feed_forward.output"),
    "mixtral": ("model.layers.0.mlp.input", "model.layers.0.mlp.output"),
    "modernbert-decoder": ("model.layers.0.mlp.input", "model.layers.0.mlp.output"),
    "mpt": ("transformer.blocks.0.ffn.input", "transformer.blocks.0.ffn.down_proj.output"),
    "opt": ("model.decoder.layers.0.fc1.input", "model.decoder.layers.0.fc2.output"),
    "phi": ("model.layers.0.mlp.input", "model.layers.0.mlp.output"),
    "qwen2_moe": ("model.layers.0.mlp.input", "model.layers.0.mlp.output"),
}
"""The sites of the first layer."""

REFUSED = {
    "bart": r"^model\.outputs: found no MLPs in BartForCausalLM \(.*'fc2': .* changed after the sum",
    "bert": r"^model\.outputs: found no MLPs in BertLMHeadModel \(.*'output': the residual stream runs through it\)",
    "gemma3n_text": r"^model\.outputs: found no MLPs in Gemma3nForCausalLM .* is not a residual stream of one vector",
    "granitemoeshared": r"^model\.outputs: found no MLPs in .*'block_sparse_moe': .*'shared_mlp' adds to it too",
    "mamba": r"^model\.outputs: found no MLPs in MambaForCausalLM .* it has no feed-forward module",
    "nemotron_h": r"^model\.layers: layers 0, 2 of NemotronHForCausalLM have no MLP .*: model\.layers = \[1\]$",
}
"""What the refusal says: which layers or modules, and the remedy."""

SMALLEST = 1e-5
"""A relative error of float32 sums; anything that is left out or added is of the size of 1."""


@pytest.mark.parametrize("family", RIGHT)
def test_the_target_is_what_the_layers_output_loses_without_its_mlp(family: str) -> None:
    model = tiny_model(family)
    pairs = find_sites(model, None, None, None)
    assert tuple(map(str, pairs[0])) == RIGHT[family]
    assert len(pairs) == 3
    assert error_of(model, pairs) < SMALLEST


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_whose_mlps_add_nothing_by_themselves_is_refused_by_name(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(Refused, match=REFUSED[family]):
        find_sites(model, None, None, None)


def test_the_truth_of_these_tests_sees_a_wrong_target() -> None:
    model = tiny_model("gemma2")
    pairs = find_sites(model, "model.layers.{}.mlp", "model.layers.{}.mlp", None)
    assert error_of(model, pairs) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bloom", "gemma2", "gemma3_text", "granite", "gptj"])
def test_the_sites_are_the_same_in_sixteen_bits(family: str, dtype: torch.dtype) -> None:
    pairs = find_sites(tiny_model(family).to(dtype), None, None, None)
    assert tuple(map(str, pairs[0])) == RIGHT[family]


def test_a_weak_second_branch_is_noticed_in_sixteen_bits() -> None:
    """It adds less than bfloat16 keeps of the sum."""
    model = tiny_model("granitemoeshared").to(torch.bfloat16)
    for layer in model.model.layers:
        layer.shared_mlp.output_linear.weight.data.mul_(1e-4)
    with pytest.raises(Refused, match="'shared_mlp' adds to it too"):
        find_sites(model, None, None, None)


def test_a_norm_after_a_wide_mlp_is_not_taken_for_a_factor() -> None:
    """Random rows of many numbers have almost the same norm, and so a norm multiplies them by almost the same."""
    config = tiny_config("gemma2")
    config.hidden_size = 512
    model = tiny_model("gemma2", config)
    for layer in model.model.layers:
        layer.post_feedforward_layernorm.weight.data.zero_()  # it multiplies all dimensions by 1
    pairs = find_sites(model.to(torch.bfloat16), None, None, None)
    assert str(pairs[0][1]) == RIGHT["gemma2"][1]


def test_layers_that_lack_an_mlp_are_named_and_those_that_have_one_are_read() -> None:
    model = tiny_model("nemotron_h")
    pairs = find_sites(model, None, None, [1])
    assert [str(site) for site in pairs[0]] == ["model.layers.1.mixer.input", "model.layers.1.mixer.output"]
    # All kinds of layers are called `mixer` here; layer 1 has only experts.
    assert error_of(model, pairs, re.compile("norm")) < SMALLEST


def test_named_sites_that_some_layers_lack_are_refused_with_the_layers_that_have_them() -> None:
    model = tiny_model("nemotron_h")
    named = "model.layers.{}.mixer.gate"
    with pytest.raises(Refused, match=r"^model\.layers: layers 0, 2 have no '.*gate': .*: model\.layers = \[1\]$"):
        find_sites(model, named, named, None)


@pytest.mark.parametrize(
    ("family", "inputs", "outputs", "warning"),
    [
        ("bloom", "transformer.h.{}.mlp", "transformer.h.{}.mlp", "model.outputs: .* residual stream runs through it"),
        ("gemma2", "model.layers.{}.mlp", "model.layers.{}.mlp", "model.outputs: .* changes its values before it adds"),
        ("granite", "model.layers.{}.mlp", "model.layers.{}.mlp", "model.outputs: .* adds 0.22 times that"),
        ("gptj", "transformer.h.{}.attn.q_proj.output", "transformer.h.{}.mlp", "model.inputs: .* depends on more"),
        ("gpt2", "transformer.h.{}.ln_2.output", "transformer.h.{}.mlp.c_proj", ""),
        ("gpt2", "transformer.h.{}.ln_2.output", None, ""),
        ("opt", "model.decoder.layers.{}.fc1", "model.decoder.layers.{}.fc2", ""),
    ],
)
def test_named_sites_are_read_as_named_and_a_warning_says_what_they_are_not(
    family: str, inputs: str, outputs: str | None, warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(family)
    with caplog.at_level(logging.WARNING, "clt_stream"):
        pairs = find_sites(model, inputs, outputs, None)
    assert pairs[0][0].path == inputs.format(0).removesuffix(".output")
    assert pairs[0][1].scale == 1
    if warning:
        assert re.search(warning, caplog.text)
    else:
        assert not caplog.records


class Flat(nn.Module):
    """An MLP that is called with all tokens of all sequences in one row of tokens, [B * T, D]."""

    def __init__(self, mlp: nn.Module, turned: bool):
        super().__init__()
        self.inner, self.turned = mlp, turned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.turned:
            return self.inner(x.transpose(0, 1)).transpose(0, 1)
        return self.inner(x.flatten(0, 1)).view_as(x)


def test_a_flattened_site_is_read_and_a_turned_one_is_refused() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = Flat(layer.mlp, turned=False)
    pairs = find_sites(model, "model.layers.{}.mlp.inner", "model.layers.{}.mlp.inner", None)
    find_order(model, pairs)
    for layer in model.model.layers:
        layer.mlp.turned = True
    with pytest.raises(
        Refused, match=r"^model\.inputs: there are no activations at 'model\.layers\.0\.mlp\.inner\.inp"
    ):
        find_order(model, pairs)
    with pytest.raises(Refused, match=r"model\.outputs: .*\.inner|^model\.outputs: found no MLPs"):
        find_order(model, find_sites(model, None, "model.layers.{}.mlp.inner", None))


# -- every class ----------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_its_json_and_nothing_in_it_is_wrong() -> None:
    verdicts = [Verdict(**entry) for entry in json.loads(JSON.read_text())]
    body = TABLE.read_text().partition("| --- |")[2]
    assert body == table(verdicts).partition("| --- |")[2]
    assert not [verdict for verdict in verdicts if verdict.outcome not in ("right", "refused", "not built")]
    assert sum(verdict.outcome == "right" for verdict in verdicts) > 113
    assert all(
        verdict.error is not None and verdict.error < SMALLEST for verdict in verdicts if verdict.outcome == "right"
    )


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_no_class_of_transformers_gives_another_target(model_type: str) -> None:
    verdict = examine(model_type)
    assert verdict.outcome in ("right", "refused", "not built"), verdict
    if verdict.outcome == "refused":
        assert re.match(r"model\.\w+: .+", verdict.detail)

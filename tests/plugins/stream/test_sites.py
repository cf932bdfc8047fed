"""Finding the MLPs of a model, or what its owner names instead."""

from __future__ import annotations

import pytest
import torch
import transformers

from clt_plugins import Refused
from clt_stream.sites import find_sites
from tests.support.language_models import CONFIGS


def model_of(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()


def paths(*args: object) -> list[tuple[str, str]]:
    return [(str(one), str(two)) for one, two in find_sites(*args)]  # type: ignore[arg-type]


def test_the_language_model_is_found_beside_a_vision_tower() -> None:
    config = transformers.Gemma3Config(
        text_config={**CONFIGS["gemma3"]().to_dict()},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    ((first, _), *_) = paths(model, None, None, None)
    assert "language_model" in first
    assert first.endswith("layers.0.mlp.input")


def test_templates_and_layers_choose_sites() -> None:
    model = model_of("gemma2")
    found = paths(model, "model.layers.{}.mlp", "model.layers.{}.post_feedforward_layernorm", [0, 2])
    assert found == [
        ("model.layers.0.mlp.input", "model.layers.0.post_feedforward_layernorm.output"),
        ("model.layers.2.mlp.input", "model.layers.2.post_feedforward_layernorm.output"),
    ]
    assert paths(model, "model.layers.{}.pre_feedforward_layernorm.output", None, [1]) == [
        ("model.layers.1.pre_feedforward_layernorm.output", "model.layers.1.post_feedforward_layernorm.output")
    ]


@pytest.mark.parametrize(
    ("inputs", "outputs", "layers", "message"),
    [
        ("transformer.h.{}.mpl", None, None, r"no module .*mpl'; 'transformer\.h\.0' has ln_1, attn, ln_2, mlp$"),
        (None, "model.layers.{}.mlp", None, r"^model\.outputs: no .*; GPT2LMHeadModel has transformer, lm_head$"),
        ("transformer.h.0.mlp", None, None, r"^model\.inputs: expected one \{\} for the layer"),
        (None, None, [3], r"^model\.layers: expected ascending numbers below 3, got \[3\]$"),
        (None, None, [1, 0], r"^model\.layers: expected ascending numbers below 3, got \[1, 0\]$"),
    ],
)  # fmt: skip
def test_an_unknown_site_is_named_with_what_is_there(
    inputs: str | None, outputs: str | None, layers: list[int] | None, message: str
) -> None:
    with pytest.raises(Refused, match=message):
        find_sites(model_of("gpt2"), inputs, outputs, layers)

"""What a plan knows of `stream`: by a configuration alone, where the model is not at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import Refused, load_plugins, read_recipe
from clt_plugins.model.assemble import assemble, make_context
from clt_stream.known import KNOWN, known
from clt_stream.outline import find
from tests.support.language_models import save_model, save_text

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "pythia-70m": 70_426_624,
    "pythia-1.4b": 1_414_647_808,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b": 7_241_732_096,
}
"""Parameters that the models' pages state."""


def recipe(tmp_path: Path, model: dict[str, Any], **train: int) -> Any:
    tables = {
        "name": "outlined",
        "model": model,
        "source": {"name": "stream", "text": str(tmp_path / "text.jsonl"), "context": 32, "buffer_tokens": 200},
        "transcoder": {"features": 16, "device": "cpu"},
        "activation": {"name": "topk", "k": 4},
        "train": {"steps": 10, "batch_tokens": 64, "eval_tokens": 50} | train,
    }
    return read_recipe(tables, plugins=load_plugins())


def outlined(recipe: Any, n_layers: int = 0, d_model: int = 0) -> Any:
    import attrs

    context = attrs.evolve(make_context(recipe, device=torch.device("meta")), n_layers=n_layers, d_model=d_model)
    return recipe.source.spec.outline(recipe.source.config, context)


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_sizes_give_the_published_number_of_parameters(name):
    # Left out are norms, biases, and GPT-2's learned positions.
    assert KNOWN[name].parameters == pytest.approx(PUBLISHED[name], rel=0.01)


def test_known_models_are_found_by_the_ends_of_their_names():
    assert known("openai-community/gpt2") == known("gpt2") == KNOWN["gpt2"]
    assert known("meta-llama/Llama-3.1-8B-Instruct") == known("meta-llama/Meta-Llama-3.1-8B") == KNOWN["llama-3.1-8b"]
    assert known("google/gemma-2-2b-it") == KNOWN["gemma-2-2b"]
    assert known("EleutherAI/pythia-70m-deduped") == KNOWN["pythia-70m"]
    assert known("mistralai/Mistral-7B-v0.1") == KNOWN["mistral-7b"]
    assert known("someone/gpt2-finetuned") is None


def test_it_is_what_the_built_source_says(tmp_path):
    save_model(tmp_path / "model")
    save_text(tmp_path / "text.jsonl", 200)
    settings = recipe(tmp_path, {"path": str(tmp_path / "model")})
    told, source = outlined(settings), assemble(settings).source
    assert (told.n_layers, told.d_model) == (source.n_layers, source.d_model)
    assert told.buffer_bytes == source.buffer_bytes()
    batch, model = source.next(), source.model
    assert told.row_bytes * 64 == batch.inputs.nbytes + batch.targets.nbytes
    assert told.model_bytes == 4 * sum(p.numel() for p in model.parameters())
    ends = {id(p): p.numel() for end in (model.get_input_embeddings(), model.lm_head) for p in end.parameters()}
    assert told.model_parameters == told.model_bytes // 4 - sum(ends.values())


def test_no_weights_are_read(tmp_path):
    save_model(tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    told = outlined(recipe(tmp_path, {"path": str(tmp_path / "model"), "layers": [0]}))
    assert told.n_layers == 1
    whole = outlined(recipe(tmp_path, {"path": str(tmp_path / "model")}))
    assert told.model_parameters == whole.model_parameters / whole.n_layers, "layers above the last one are not run"


def test_a_model_that_is_nowhere_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    unknown = recipe(tmp_path, {"path": "nobody/nothing"})
    with pytest.raises(Refused, match=r"model.path: cannot get 'nobody/nothing'.*; or give --n-layers and --d-model"):
        outlined(unknown)
    told = outlined(unknown, 5, 40)
    assert (told.n_layers, told.d_model, told.model_parameters) == (5, 40, 0)
    assert told.buffer_bytes["auto"] == (192 + 50 + 2 * 16 * 32) * 2 * 5 * 40 * 4


def test_a_configuration_without_sizes_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "resnet"}))
    settings = recipe(tmp_path, {"path": str(tmp_path / "model")})
    with pytest.raises(Refused, match="its ResNetConfig does not say layers and width: give --n-layers and --d-model"):
        find(settings.model)


def test_settings_that_a_run_would_refuse_are_refused(tmp_path):
    known_model = {"path": "openai-community/gpt2"}
    with pytest.raises(Refused, match=r"source.buffer_tokens: 200 is less than a batch of 256 tokens"):
        outlined(recipe(tmp_path, known_model, batch_tokens=256))
    with pytest.raises(Refused, match=r"model.layers: expected ascending numbers below 12, got \[3, 12\]"):
        outlined(recipe(tmp_path, {**known_model, "layers": [3, 12]}))

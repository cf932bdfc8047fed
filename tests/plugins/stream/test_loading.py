"""A model is the one in its checkpoint, with a tokenizer, or it is refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from clt_plugins import Refused
from tests.support.helpers import read_tensors
from tests.support.language_models import COMMON, save_model
from tests.support.streams import build

Weights = dict[str, Tensor]


def change(folder: Path, weights: Callable[[Weights], Weights], **config: Any) -> Path:
    """Change the weights in a model's folder, and settings of its config."""
    file = folder / "model.safetensors"
    save_file(weights(read_tensors(file)), file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def same(weights: Weights) -> Weights:
    return weights


def with_biases(weights: Weights) -> Weights:
    """As if its queries had biases."""
    queries = {name: weight for name, weight in weights.items() if name.endswith("q_proj.weight")}
    return weights | {name.replace("weight", "bias"): weight[:, 0].clone() for name, weight in queries.items()}


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        (without("layers.1.mlp"), {}, r"lacks the tensors model\.layers\.1\.mlp\.down_proj\.weight, .*gate_proj"),
        (without("layers.2.mlp.up_proj"), {}, r"lacks the tensor model\.layers\.2\.mlp\.up_proj\.weight: "),
        (without("embed_tokens"), {}, r"lacks the tensor model\.embed_tokens\.weight: "),
        (without(""), {}, r"lacks \d+ tensors \(model\.embed_tokens\.weight, model\.layers\.0\."),
        (lambda weights: {f"x.{name}": weight for name, weight in weights.items()}, {}, r"lacks \d+ tensors \("),
        (same, {"num_hidden_layers": 4}, r"lacks \d+ tensors \(model\.layers\.3\.input_layernorm\.weight, "),
        (same, {"num_hidden_layers": 2}, r"holds \d+ tensors \(model\.layers\.2\..*LlamaForCausalLM has no place for"),
        (with_biases, {}, r"holds the tensors model\.layers\.0\.self_attn\.q_proj\.bias, .* has no place for that"),
        (same, {"intermediate_size": 40}, r"has \d+ tensors \(model\.layers\.0\.mlp\..*in other shapes than its"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused_with_the_names_of_the_weights(
    weights: Callable[[Weights], Weights], config: dict[str, Any], message: str, text: Path, tmp_path: Path
) -> None:
    folder = change(save_model(tmp_path / "model", "llama"), weights, **config)
    with pytest.raises(Refused, match=rf"^model\.path: '.*model' {message}") as raised:
        build(folder, text)
    assert len(str(raised.value)) < 600


def test_only_the_output_head_may_be_missing(text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_model(tmp_path / "model", "llama")
    whole = build(folder, text).next()
    change(folder, without("lm_head"))
    with caplog.at_level(logging.WARNING, "clt_stream"):
        found = build(folder, text).next()
    assert torch.equal(found.targets, whole.targets)
    assert "has no output head (the tensor lm_head.weight)" in caplog.text


def test_a_head_that_is_tied_to_the_embedding_is_not_missing(
    text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(tmp_path / "model", "gpt2")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        build(folder, text).next()
    # Nor does the model look for padding where there is no mask.
    assert not [record for record in caplog.records if "head" in record.message or "attention_mask" in record.message]


def test_masks_of_old_checkpoints_are_passed_over(gpt2: Path, text: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "gpt2")
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64), "transformer.h.1.attn.masked_bias": torch.ones(1)}
    change(folder, lambda weights: weights | masks)
    assert torch.equal(build(folder, text).next().targets, build(gpt2, text).next().targets)


def test_a_gguf_file_without_tensors_is_refused(text: Path, tmp_path: Path, gpt2: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(320)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(Refused, match=r"^model\.path: '.*m\.gguf' lacks \d+ tensors \("):
        build(tmp_path / "m.gguf", text, {"tokenizer": str(gpt2)})


# -- tokenizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2", "gemma", "llama", "mistral"])
@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)])
def test_a_folder_without_a_tokenizer_names_the_setting(
    family: str, kept: tuple[str, ...], text: Path, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", family)
    for name in {"tokenizer.json", "tokenizer_config.json"} - set(kept):
        (folder / name).unlink()
    if kept:
        (folder / kept[0]).write_text("{}")
    with pytest.raises(Refused, match=r"^model\.path: '.*model' has no tokenizer: set model\.tokenizer$"):
        build(folder, text)


@pytest.mark.parametrize("alphabet", ["0123456789+=", "ACGT", "абв"])
def test_a_small_alphabet_is_a_tokenizer(gpt2: Path, tmp_path: Path, alphabet: str) -> None:
    """It was taken for none: it knows no English word."""
    words = ["<unk>", "<eos>", "<pad>", *alphabet]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    named = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(tmp_path / "own")
    texts = [alphabet[number % len(alphabet) :] + alphabet * 4 for number in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = build(gpt2, tmp_path / "text.jsonl", {"tokenizer": str(tmp_path / "own")})
    assert {token for _ in range(8) for token in source.next().token_ids.tolist()} == set(range(3, len(words)))


def test_a_folder_that_is_named_as_tokenizer_and_has_none(gpt2: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match=r"^model\.tokenizer: '.*empty' has no tokenizer: name a folder or hub id"):
        build(gpt2, text, {"tokenizer": str(tmp_path / "empty")})


# -- configs and modules of all kinds -------------------------------------------------------------------------------


def test_a_config_that_checks_its_types_is_read(gpt2: Path, text: Path, tmp_path: Path) -> None:
    settings = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
    config = transformers.ModernBertDecoderConfig(
        **settings, bos_token_id=0, eos_token_id=1, pad_token_id=2, cls_token_id=0, sep_token_id=1
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    source = build(tmp_path / "model", text, {"tokenizer": str(gpt2)})
    assert source.model.config.pad_token_id == 2
    assert source.next().tokens == 32


def test_sites_behind_modules_called_output_or_input_are_read(gpt2: Path, text: Path, tmp_path: Path) -> None:
    """`output` and `input` are also nnsight's names."""
    settings = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
    config = transformers.BertConfig(**settings, is_decoder=True, pad_token_id=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    layer = "bert.encoder.layer.{}"
    named = {"inputs": f"{layer}.intermediate", "outputs": f"{layer}.output.dense", "tokenizer": str(gpt2)}
    source = build(tmp_path / "model", text, named, pack=False)
    batch = source.next()
    mlp = source.model.bert.encoder.layer[1]
    expected = mlp.output.dense(mlp.intermediate(batch.inputs[:, 1]))
    torch.testing.assert_close(batch.targets[:, 1], expected, atol=1e-5, rtol=1e-5)  # float32 sums
    whole = {**named, "outputs": f"{layer}.output"}
    assert build(tmp_path / "model", text, whole, pack=False).next().tokens == 32


# -- numbers that are not finite ------------------------------------------------------------------------------------


def test_activations_that_overflow_are_refused_with_layer_type_and_remedy(text: Path, tmp_path: Path) -> None:
    def larger(weights: Weights) -> Weights:
        return {name: weight * 300 if "layers.1.mlp" in name else weight for name, weight in weights.items()}

    folder = change(save_model(tmp_path / "model", "llama"), larger)
    line = "model.dtype: an activation of layer 1 is not a finite number in float16: set model.dtype = bfloat16"
    with pytest.raises(Refused) as raised:
        build(folder, text, {"dtype": "float16"})
    assert str(raised.value) == line
    assert build(folder, text, {"dtype": "bfloat16"}).next().tokens == 32


def test_weights_that_are_not_numbers_are_refused_with_the_layer(text: Path, tmp_path: Path) -> None:
    def broken(weights: Weights) -> Weights:
        weights["model.layers.2.mlp.down_proj.weight"][3, 4] = torch.nan
        return weights

    folder = change(save_model(tmp_path / "model", "llama"), broken)
    with pytest.raises(Refused, match=r"^model\.path: an activation of layer 2 is not a finite number in float32: "):
        build(folder, text)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_token_with_activations_that_are_not_finite_is_refused_when_it_comes(
    held_out: bool, text: Path, tmp_path: Path
) -> None:
    """The few tokens of the trials at the start are not it."""
    folder = save_model(tmp_path / "model", "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (token,) = tokenizer(" stands", add_special_tokens=False)["input_ids"][-1:]

    def broken(weights: Weights) -> Weights:
        weights["model.embed_tokens.weight"][token] = torch.inf
        return weights

    change(folder, broken)
    source = build(folder, text, {"layers": [1, 2]})
    with pytest.raises(Refused, match=r"^model\.path: an activation of layer 1 is not a finite number in float32: "):
        list(source.held_out(2000)) if held_out else [source.next() for _ in range(100)]

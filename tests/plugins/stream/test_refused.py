"""Users' errors in `[model]` and `[source]`: each is one line that names the setting."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clt_plugins import Refused
from clt_stream import StreamConfig, clt_check
from clt_stream.sites import Site
from clt_stream.taps import find_order
from tests.support.language_models import save_model
from tests.support.streams import build, trained


def test_a_missing_model_folder(text: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"^model\.path: no folder '.*nowhere'$"):
        build(tmp_path / "nowhere", text)


def test_a_folder_without_a_model(text: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"^model\.path: '.*' holds no model: there is no config\.json in it$"):
        build(tmp_path, text)


def test_a_missing_gguf_file(gpt2: Path, text: Path) -> None:
    with pytest.raises(Refused, match=r"^model\.gguf_file: no file 'x\.gguf' in "):
        build(gpt2, text, {"gguf_file": "x.gguf"})


def test_a_truncated_model_file(text: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Refused, match=r"^model\.path: cannot load '.*model': .+$"):
        build(model, text)


def test_a_hub_model_while_offline(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Refused, match=r"^model\.path: cannot get 'nobody/nothing': .* is the network there") as raised:
        build("nobody/nothing", text)  # type: ignore[arg-type]
    assert len(str(raised.value).splitlines()) == 1


def test_a_batch_larger_than_the_data(gpt2: Path, text: Path) -> None:
    with pytest.raises(
        Refused, match=r"^train\.batch_tokens: a batch of 9999 tokens is larger than the data: .* has \d+$"
    ):
        build(gpt2, text, {"batch_tokens": 9999}, buffer_tokens=9999)


def test_a_buffer_smaller_than_a_batch(gpt2: Path, text: Path) -> None:
    with pytest.raises(Refused, match=r"^source\.buffer_tokens: 16 is less than a batch of 32 tokens$"):
        build(gpt2, text, buffer_tokens=16)


def test_a_batch_that_ranks_cannot_share(gpt2: Path, text: Path) -> None:
    with pytest.raises(Refused, match=r"^train\.batch_tokens: 32 cannot be divided among 3 data ranks$"):
        build(gpt2, text, {"ranks": 3})


def test_a_context_longer_than_the_model(gpt2: Path, text: Path) -> None:
    with pytest.raises(Refused, match=r"^source\.context: 65 is longer than the model's 64 positions$"):
        build(gpt2, text, context=65)


def test_a_text_of_empty_documents(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 3)
    with pytest.raises(
        Refused, match=r"^source\.text: '.*empty\.jsonl' holds no text to train on: all 3 documents are empty$"
    ):
        build(gpt2, tmp_path / "empty.jsonl", held_out=0.0)


def test_nothing_held_out(gpt2: Path, text: Path) -> None:
    with pytest.raises(Refused, match=r"^source\.held_out: no held-out text in '.*' at a share of 0: raise the share"):
        list(build(gpt2, text, held_out=0.0).held_out(10))


def test_one_document_of_which_none_can_be_held_out(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a feature of a layer writes to each later one " * 100)
    share = 0.9 if trained([(tmp_path / "one.txt").read_text()], 0.9) else 1e-9
    with pytest.raises(Refused, match=r"^source\.held_out: no held-out text in '.*one\.txt' at a share of "):
        build(gpt2, tmp_path / "one.txt", held_out=share)


def test_a_device_that_is_not_there(gpt2: Path, text: Path) -> None:
    with pytest.raises(Refused, match=r"^source\.buffer_device: 'gpu' cannot be used here: "):
        build(gpt2, text, buffer_device="gpu")
    with pytest.raises(Refused, match=r"^model\.device: 'gpu' cannot be used here: "):
        build(gpt2, text, {"device": "gpu"})


def test_a_recipe_without_a_model_or_with_nothing_left_of_a_context() -> None:
    config = StreamConfig(context=8, skip_first=8)
    recipe = SimpleNamespace(source=SimpleNamespace(config=config), model=None)
    assert [fault.partition(":")[0] for fault in clt_check(recipe)] == ["model", "source.skip_first"]


def test_a_tokenizer_of_another_model(gpt2: Path, text: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    small = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=8, n_layer=1, n_head=1))
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(
        Refused, match=r"^model\.tokenizer: gives token \d+, but the model has 100: name the right one$"
    ):
        build(tmp_path / "small", text, {"tokenizer": str(gpt2)})


def test_bos_always_without_a_bos_token(text: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(Refused, match=r"^source\.bos: the tokenizer has no beginning-of-sequence token"):
        build(model, text, bos="always")


# -- what cannot be read here ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["model.path", "model.gguf_file"])
def test_a_gguf_file_without_its_package_names_the_extra(
    setting: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    path, settings = (tmp_path / "m.gguf", {}) if setting == "model.path" else (tmp_path, {"gguf_file": "m.gguf"})
    with pytest.raises(Refused) as raised:
        build(path, text, settings)
    line = f"{setting}: a GGUF file is read with the package gguf: pip install 'clt-plugins[gguf]'"
    assert str(raised.value) == line


def test_models_in_other_formats_do_not_need_the_package_for_gguf(
    gpt2: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert build(gpt2, text).next().tokens == 32


def test_a_file_that_is_no_gguf_file(text: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUFnonsense")
    with pytest.raises(Refused, match=r"^model\.path: cannot load the tokenizer of '.*m\.gguf': .+$"):
        build(tmp_path / "m.gguf", text)
    with pytest.raises(Refused, match=r"^model\.path: no file 'other\.gguf' in "):
        build(tmp_path / "other.gguf", text)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", r"^model\.path: cannot load the tokenizer of '.*': .*not a valid JSON file"),
        ("config.json", '{"model_type": "none"}', r"^model\.path: cannot load '.*': .*model type `none`"),
        ("config.json", '{"model_type": "t5"}', r"^model\.path: cannot load '.*': .*T5Config"),
        ("tokenizer.json", "{}", r"^model\.path: cannot load the tokenizer of '.*': KeyError: "),
    ],
)
def test_a_damaged_folder(file: str, content: str, message: str, text: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / file).write_text(content)
    with pytest.raises(Refused, match=message) as raised:
        build(model, text)
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_tokenizer(gpt2: Path, text: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).unlink()
    with pytest.raises(Refused, match=r"^model\.path: '.*model' has no tokenizer: set model\.tokenizer$"):
        build(model, text)
    with pytest.raises(Refused, match=r"^model\.tokenizer: no folder '.*nowhere'$"):
        build(model, text, {"tokenizer": str(tmp_path / "nowhere")})
    assert build(model, text, {"tokenizer": str(gpt2)}).next().tokens == 32


def test_a_block_larger_than_the_memory(gpt2: Path, text: Path) -> None:
    source = build(gpt2, text, buffer_tokens=10**14)
    with pytest.raises(Refused, match=r"^source\.buffer_tokens: \d+ rows need \d+\.\d GB, more than cpu has free$"):
        source.next()


# -- sites ----------------------------------------------------------------------------------------------------------


def test_sites_of_different_widths(gpt2: Path, text: Path) -> None:
    with pytest.raises(Refused, match=r"^model\.inputs: the sites have different widths \(.* 32, .* 128\): "):
        build(gpt2, text, {"outputs": "transformer.h.{}.mlp.c_fc"})


def test_a_site_that_a_forward_pass_does_not_reach(text: Path, tmp_path: Path) -> None:
    """The model calls each layer in turn, and never the list of them."""
    model = save_model(tmp_path / "model")
    source = build(model, text)
    unused = [(Site("transformer.h", "input"), Site("transformer.h.0.mlp", "output"))]
    with pytest.raises(Refused, match=r"^model\.inputs: a forward pass never reaches 'transformer\.h\.input'$"):
        find_order(source.model, unused)


def test_a_site_without_activations(gpt2: Path, text: Path) -> None:
    source = build(gpt2, text)
    ids = [(Site("transformer.wte", "input"), Site("transformer.h.0.mlp", "output"))]
    with pytest.raises(Refused, match=r"^model\.inputs: there are no activations at 'transformer\.wte\.input': "):
        find_order(source.model, ids)


def test_a_site_that_a_forward_pass_reaches_twice(gpt2: Path, text: Path) -> None:
    source = build(gpt2, text)
    source.model.transformer.h[1].mlp = source.model.transformer.h[0].mlp
    with pytest.raises(Refused, match=r"^model\.inputs: a forward pass reaches 'transformer\.h\.0\.mlp\.input' more"):
        find_order(source.model, [(Site("transformer.h.0.mlp", "input"), Site("transformer.h.0.mlp", "output"))])


def test_a_model_that_cannot_read_text(gpt2: Path, text: Path) -> None:
    source = build(gpt2, text)

    def fail(*_: Any) -> None:
        raise RuntimeError("not implemented\nfor 'Half'")

    source.model.transformer.ln_f.register_forward_pre_hook(fail)
    with pytest.raises(Refused, match=r"^model\.path: GPT2LMHeadModel cannot read text on cpu: not implemented for '"):
        find_order(source.model, [(Site("transformer.h.0.mlp", "input"), Site("transformer.h.0.mlp", "output"))])


def test_an_output_that_is_computed_before_the_input_cannot_be_replaced(gpt2: Path, text: Path) -> None:
    """It can be read all the same."""
    swapped = {"inputs": "transformer.h.{}.mlp.output", "outputs": "transformer.h.{}.mlp.input"}
    source = build(gpt2, text, swapped)
    model = source.language_model()
    (held_out, *_) = model.held_out(20)
    assert model.run(held_out).shape == (20, 320)
    with pytest.raises(Refused, match=r"^model\.outputs: 'transformer\.h\.0\.mlp\.input' is computed before the trans"):
        model.run(held_out, lambda layer, read, written: None)


@pytest.mark.parametrize(("setting", "value"), [("split", "test"), ("subset", "en")])
@pytest.mark.parametrize("stored", [True, False])
def test_a_part_of_a_hub_data_set_is_refused_for_texts_of_this_disk(
    gpt2: Path, text: Path, setting: str, value: str, stored: bool
) -> None:
    """It was ignored: all files of a folder were read."""
    with pytest.raises(Refused, match=rf"^source\.{setting}: is for data sets of the hub"):
        build(gpt2, text if stored else "python-stdlib", **{setting: value})

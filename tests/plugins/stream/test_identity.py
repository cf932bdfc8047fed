"""A position is one in a text, a tokenizer and a model: other ones are refused by name, copies elsewhere go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from clt_plugins import Refused
from tests.support.helpers import read_tensors
from tests.support.language_models import save_model, save_text
from tests.support.streams import build, equal

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model that a test may change."""
    return save_model(tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    save_text(tmp_path / "text.jsonl", 40)
    return tmp_path / "text.jsonl"


def change(folder: Path, name: str, how: Any) -> None:
    """Change one parameter of a saved model."""
    tensors = read_tensors(folder / WEIGHTS)
    how(tensors[name])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def saved(model: Path, text: Path) -> Any:
    source = build(model, text)
    source.next()
    return json.loads(json.dumps(source.state()))


def test_a_moved_model_and_text_are_the_same(model: Path, text: Path, tmp_path: Path) -> None:
    state = saved(model, text)
    shutil.copytree(model, tmp_path / "elsewhere")
    shutil.copy(text, tmp_path / "other.jsonl")
    first, second = build(model, text), build(tmp_path / "elsewhere", tmp_path / "other.jsonl")
    assert first.identity() == second.identity()
    first.load_state(state)
    second.load_state(state)
    assert equal(first.next(), second.next())


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("transformer.h.0.mlp.c_fc.weight", lambda x: x.mul_(1.5)),
        ("transformer.h.1.mlp.c_proj.bias", lambda x: x[3].add_(1e-3)),
        ("transformer.wte.weight", lambda x: x[7, 5].add_(1e-6)),
    ],
)
def test_other_weights_are_refused(model: Path, text: Path, name: str, how: Any) -> None:
    state = saved(model, text)
    change(model, name, how)
    with pytest.raises(Refused, match=r"^model\.path: not the data that the state was saved with"):
        build(model, text).load_state(state)


def test_another_setting_of_the_model_is_refused(model: Path, text: Path) -> None:
    """The weights are the same, and the activations are not."""
    state = saved(model, text)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    with pytest.raises(Refused, match=r"^model\.path: "):
        build(model, text).load_state(state)


def test_another_tokenizer_is_refused(model: Path, text: Path) -> None:
    state = saved(model, text)
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-5]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(Refused, match=r"^model\.tokenizer: not the data that the state was saved with"):
        build(model, text).load_state(state)


@pytest.mark.parametrize("lines", [slice(0, 30), slice(1, None), slice(None, None, -1)])
def test_another_text_is_refused(model: Path, text: Path, lines: slice) -> None:
    """A shorter one, and the same documents in another order."""
    state = saved(model, text)
    documents = text.read_text().splitlines(keepends=True)
    text.write_text("".join(documents[lines]))
    with pytest.raises(Refused, match=r"^source\.text: not the data that the state was saved with"):
        build(model, text).load_state(state)


def test_other_sites_are_refused_and_the_same_ones_may_be_named(model: Path, text: Path) -> None:
    state = saved(model, text)
    named = {"inputs": "transformer.h.{}.mlp.input", "outputs": "transformer.h.{}.mlp.output"}
    build(model, text, run=named).load_state(state)
    with pytest.raises(Refused, match=r"^model\.inputs: not the data that the state was saved with"):
        build(model, text, run={**named, "inputs": "transformer.h.{}.ln_2.input"}).load_state(state)

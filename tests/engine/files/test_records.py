"""Records to JSON and back, and what is wrong with a file in one line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from clt_plugins import CrossLayerTranscoder, run
from clt_plugins.files.folders import MANIFEST
from clt_plugins.files.records import MEMORY_ONLY, as_data, defined, from_data, json_text, read_json, write_json
from tests.support.helpers import parts, tables


@attrs.frozen(kw_only=True)
class Inner:
    n_layers: int = attrs.field(alias="layers")
    share: float | None = None


@attrs.frozen(kw_only=True, eq=False)
class Outer:
    scores: list[float | None]
    weights: Tensor
    path: Path
    free: dict[str, Any]
    inner: Inner | None = None
    by_name: dict[str, Inner]
    only_here: Tensor | None = attrs.field(default=None, metadata=MEMORY_ONLY)


def example() -> Outer:
    return Outer(
        scores=[1.0, None, 0.1],
        weights=torch.tensor([[1.5, 2.0], [-0.25, 1e-8]]),
        path=Path("some/where"),
        free={"any": [None, {"thing": "é"}]},
        inner=Inner(layers=3),
        by_name={"a": Inner(layers=1, share=0.5)},
        only_here=torch.ones(2),
    )


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = example()
    write_json(tmp_path / "r.json", record)
    again = read_json(tmp_path / "r.json", Outer)
    assert again.only_here is None and torch.equal(again.weights, record.weights)
    for name in ("scores", "path", "free", "inner", "by_name"):
        assert getattr(again, name) == getattr(record, name)


def test_keys_are_aliases_in_the_order_of_the_fields_and_none_is_null():
    data = json.loads(json_text(example()))
    assert list(data) == ["scores", "weights", "path", "free", "inner", "by_name"]
    assert data["inner"] == {"layers": 3, "share": None}
    assert data["path"] == "some/where" and data["scores"] == [1.0, None, 0.1]


def test_plain_data_is_written_as_it_is():
    assert json.loads(json_text({"a": [1, None, "x"]})) == {"a": [1, None, "x"]}


def test_a_number_that_is_not_defined_must_be_none():
    assert defined(torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])) == [1.0, None, None, None]
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"x": float("nan")})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"scorse": 1}, "scorse: unknown key, did you mean 'scores'?"),
    "type": ({"inner": {"layers": "three"}}, 'inner.layers: expected int, got "three"'),
    "in a list": ({"scores": [1.0, "x"]}, r'scores[1]: expected float, got "x"'),
    "in a dictionary": ({"by_name": {"a": {}}}, "by_name.a.layers: required, but missing"),
    "no table": ({"by_name": 3}, "by_name: expected "),
    "no numbers": ({"weights": ["x"]}, "weights: expected lists of numbers"),
    "ragged": ({"weights": [[1.0], [1.0, 2.0]]}, "weights: expected lists of numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_with_the_file_and_the_key(case, tmp_path):
    change, text = WRONG[case]
    file = tmp_path / "r.json"
    file.write_text(json.dumps({**as_data(example()), **change}))
    with pytest.raises(ValueError, match=r"r\.json") as error:
        read_json(file, Outer)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{file}: {text}"), line


def test_a_missing_key_and_no_table_at_all():
    data = as_data(example())
    del data["weights"]
    with pytest.raises(ValueError, match=r"^r\.json: weights: required, but missing$"):
        from_data(Outer, data, "r.json")
    with pytest.raises(ValueError, match=r"^r\.json: expected a table, got 3$"):
        from_data(Outer, 3, "r.json")


@pytest.mark.parametrize("text", ["", "{", "[1, 2", b"\xff\xfe"])
def test_a_file_that_is_no_json_is_named(text, tmp_path):
    file = tmp_path / "r.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"^{file}: not a readable JSON file") as error:
        read_json(file, Outer)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r"none\.json: missing"):
        read_json(tmp_path / "none.json", Outer)


def changed(folder: Path, name: str, change: dict[str, Any]) -> None:
    """Change a JSON file of a folder; the folder's manifest agrees with it."""
    file = folder / name
    data = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({key: value for key, value in data.items() if value != "DELETE"}))
    manifest = json.loads((folder / MANIFEST).read_text())
    content = file.read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


TRANSCODERS: dict[str, tuple[dict[str, Any], str]] = {
    "another version": ({"format": 3}, "written in format 3, this version reads 1"),
    "missing": ({"d_model": "DELETE"}, "d_model: required, but missing"),
    "unknown": ({"d_modell": 6}, "d_modell: unknown key, did you mean 'd_model'?"),
    "type": ({"layers": 3.5}, "layers: expected int, got 3.5"),
    "dtype": ({"dtype": "float33"}, "dtype: must be a type of torch, such as float32: 'float33'"),
    "choice": ({"activation": {"name": "batchtop", "k": 5}}, "activation: unknown name 'batchtop', did you mean 'b"),
    "setting": ({"activation": {"name": "batchtopk", "k": -5}}, "activation.k: "),
}


@pytest.mark.parametrize("case", TRANSCODERS)
def test_a_transcoder_json_with_a_mistake_is_told_by_file_and_key(case, tmp_path):
    change, text = TRANSCODERS[case]
    parts().transcoder.save(tmp_path / "t")
    changed(tmp_path / "t", "transcoder.json", change)
    with pytest.raises(ValueError, match=r"transcoder\.json") as error:
        CrossLayerTranscoder.load(tmp_path / "t")
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{tmp_path}/t/transcoder.json: {text}"), line


def test_a_training_json_with_a_mistake_is_told_by_file_and_key(tmp_path):
    run(tables(), out=tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step_000012"
    assert list(json.loads((checkpoint / "training.json").read_text()))[:4] == [
        "step",
        "tokens",
        "runs_dense",
        "source",
    ]
    changed(checkpoint, "training.json", {"step": "DELETE"})
    with pytest.raises(ValueError, match=rf"^{checkpoint}/training\.json: step: required, but missing; the one before"):
        run(tables(train={"steps": 16}), out=tmp_path / "run", resume="latest")

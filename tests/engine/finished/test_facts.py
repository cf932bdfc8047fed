"""What a run's folder tells of it: curves that are thinned, files that are missing, damaged or old."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from clt_plugins import Curve, Facts, read_facts, run_of
from clt_plugins.finished import curves as module
from clt_plugins.finished.curves import read_curves
from clt_plugins.finished.provenance import Origin


def lines(file: Path, entries: list[Any]) -> Path:
    file.write_text("".join(json.dumps(one) + "\n" for one in entries))
    return file


def test_curves_by_name(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "metrics.jsonl",
        [
            {"step": 10, "loss": 2.0, "by_layer": [1.0, None]},
            {"step": 20, "loss": None, "eval": 3, "note": "text", "flag": True, "table": [[1]]},
        ],
    )
    curves, notes = read_curves(file)
    assert curves == {
        "loss": Curve(step=[10, 20], value=[2.0, None]),
        "by_layer": Curve(step=[10], value=[[1.0, None]]),
        "eval": Curve(step=[20], value=[3]),
    }
    assert notes == []


@pytest.mark.parametrize("length", [1, 49, 50, 51, 100, 101, 12_345])
def test_a_long_curve_is_thinned_to_its_own_points_with_both_ends(tmp_path: Path, length: int) -> None:
    """Bounded, evenly spaced, and each point is one of the curve's."""
    file = lines(tmp_path / "m.jsonl", [{"step": 3 * n, "loss": float(n)} for n in range(length)])
    curve = read_curves(file, points=50)[0]["loss"]
    assert [3 * int(value) for value in curve.value] == curve.step == sorted(set(curve.step))
    assert curve.step[0] == 0 and curve.step[-1] == 3 * (length - 1)
    assert len(curve.step) == length if length < 50 else 25 <= len(curve.step) <= 50
    gaps = {b - a for a, b in zip(curve.step[:-2], curve.step[1:-1], strict=True)}
    assert len(gaps) <= 1


def test_steps_that_come_again_replace_those_from_before(tmp_path: Path) -> None:
    steps = [1, 2, 3, 4, 3, 4, 5]
    file = lines(tmp_path / "m.jsonl", [{"step": step, "loss": n} for n, step in enumerate(steps)])
    assert read_curves(file)[0]["loss"] == Curve(step=[1, 2, 3, 4, 5], value=[0, 1, 4, 5, 6])
    many = [{"step": step, "loss": step} for step in range(1, 40)]
    for after in ([1], [1, 2]):  # all over again, when the curve is thinned already
        again = lines(tmp_path / "n.jsonl", [*many, *({"step": step, "loss": -step} for step in after)])
        assert read_curves(again, 20)[0]["loss"] == Curve(step=after, value=[-step for step in after])


def test_what_cannot_be_read_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST", 200)
    monkeypatch.setattr(module, "NAMES", 2)
    file = tmp_path / "m.jsonl"
    good = b'{"step": 1, "loss": 1.0}\n'
    long = b'{"step": 2, "loss": ' + b" " * 500 + b"2.0}\n"
    names = json.dumps({"step": 3, "loss": 3.0, "a": 1, "b": 1, "c": 1}).encode() + b"\n"
    file.write_bytes(good + b"\xff\n" + b"[1]\n" + b'{"step": true}\n' + long + names + b'{"step": 4, "lo')
    curves, notes = read_curves(file)
    assert curves == {"loss": Curve(step=[1, 3], value=[1.0, 3.0]), "a": Curve(step=[3], value=[1])}
    assert notes == ["m.jsonl: 4 lines could not be read", "m.jsonl: 2 of 4 curves are left out"]


def test_the_last_line_that_was_not_finished_is_no_damage(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert read_curves(file) == ({"loss": Curve(step=[1], value=[1.0])}, [])


ORIGIN = Origin(folder="transcoder", sha256="a" * 64, step=5, tokens=50)
EVALUATION = {"nmse": 0.5, "made_from": {"transcoder": {"folder": "transcoder", "sha256": "a" * 64}, "settings": {}}}


def run_folder(folder: Path) -> Path:
    (folder / "evaluation").mkdir(parents=True)
    (folder / "recipe.toml").write_text('name = "mine"\n[model]\npath = "gpt2"\n')
    (folder / "versions.json").write_text('{"clt_plugins": "0.1.0"}')
    (folder / "history.jsonl").write_text('{"step": 0}\n{"step": 3}\n{"st')
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(EVALUATION))
    lines(folder / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    return folder


def test_a_whole_run(tmp_path: Path) -> None:
    facts = read_facts(run_folder(tmp_path / "run"), ORIGIN)
    assert (facts.name, facts.folder, facts.transcoder) == ("mine", "run", ORIGIN)
    assert facts.recipe == {"name": "mine", "model": {"path": "gpt2"}}
    assert facts.recipe_text == 'name = "mine"\n\n[model]\npath = "gpt2"\n'
    assert facts.versions == {"clt_plugins": "0.1.0"}
    assert facts.history == [{"step": 0}, {"step": 3}]
    assert facts.curves == {"loss": Curve(step=[1], value=[1.0])}
    assert facts.evaluation == EVALUATION and facts.notes == []


def test_no_run_and_an_empty_one(tmp_path: Path) -> None:
    assert read_facts(None) == Facts()
    assert read_facts(None, ORIGIN) == Facts(name="transcoder", transcoder=ORIGIN)
    (tmp_path / "old").mkdir()
    assert read_facts(tmp_path / "old") == Facts(name="old", folder="old")


@pytest.mark.parametrize(
    ("name", "content", "field", "empty"),
    [
        ("recipe.toml", b"= broken", "recipe", {}),
        ("recipe.toml", b"\xff", "recipe_text", ""),
        ("versions.json", b"{", "versions", {}),
        ("evaluation/evaluation.json", b"[" * 100_000, "evaluation", None),
        ("evaluation/evaluation.json", b'{"made_from": 3}', "evaluation", {"made_from": 3}),
    ],
)
def test_a_damaged_file_is_left_out_and_named(
    tmp_path: Path, name: str, content: bytes, field: str, empty: Any
) -> None:
    run = run_folder(tmp_path / "run")
    (run / name).write_bytes(content)
    facts = read_facts(run, ORIGIN)
    assert getattr(facts, field) == empty
    assert facts.curves and facts.history
    if empty in ({}, "", None):
        (note,) = facts.notes
        assert name.split("/")[-1] in note


def test_a_fifo_in_the_place_of_a_log_does_not_block(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    facts = read_facts(run)
    assert facts.curves == {} and "not a regular file" in facts.notes[0]


def test_a_file_that_cannot_be_read_at_the_moment_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path / "run")

    def refused(path: Path, *_: Any) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("clt_plugins.files.untrusted.open_regular", refused)
    with pytest.raises(PermissionError, match=r"versions\.json|recipe\.toml"):
        read_facts(run)


def test_an_evaluation_of_another_transcoder_is_left_out(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    facts = read_facts(run, Origin(folder="converted", sha256="b" * 64))
    assert facts.evaluation is None
    assert facts.notes == ["evaluation/evaluation.json is of another transcoder than converted, and left out"]


def test_the_run_that_a_folder_lies_in(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    assert run_of(run / "collected") == run == run_of(run / "stages" / "step_1" / "collected")
    assert run_of(tmp_path) is None

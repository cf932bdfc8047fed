"""The logger `jsonl`, read by the standard library's JSON."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import Context, Refused
from tests.support.logged import (
    RECIPE,
    evaluation,
    lines,
    log_steps,
    logger,
    metrics,
)


def test_each_call_is_a_json_object_with_values_by_layer_as_lists(context, tmp_path):
    sink = logger("jsonl", context, tmp_path)
    sink.start(RECIPE, 0)
    sink.log(2, metrics(2))
    sink.log(2, evaluation(2) | {"eval/l0": torch.tensor(3.5)})
    sink.close("finished")
    assert lines(tmp_path) == [
        {"step": 2, "tokens": 32, "loss/total": 0.5, "train/nmse_by_layer": [0.25, 0.125]},
        {"step": 2, "eval/nmse": 0.046875, "eval/nmse_by_layer": [0.03125, 0.0625], "eval/l0": 3.5},
    ]


def test_numbers_that_json_does_not_have_are_null(context, tmp_path):
    sink = logger("jsonl", context, tmp_path)
    sink.start(RECIPE, 0)
    by_layer = torch.tensor([1.0, math.nan, -math.inf])
    sink.log(1, {"a": math.nan, "b": math.inf, "c": by_layer, "d": torch.tensor(math.nan)})
    sink.close("failed")
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": [1.0, None, None], "d": None}]


def unbroken(context: Context, folder: Path) -> bytes:
    folder.mkdir()
    sink = logger("jsonl", context, folder)
    sink.start(RECIPE, 0)
    log_steps(sink, 1, 8)
    sink.close("finished")
    return (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("torn", [0, 1, 2, 30])
def test_the_file_of_a_resumed_run_is_that_of_an_unbroken_one(context, tmp_path, torn):
    whole = unbroken(context, tmp_path / "whole")
    sink = logger("jsonl", context, tmp_path)
    sink.start(RECIPE, 0)
    log_steps(sink, 1, 7)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[: -torn or None])
    sink = logger("jsonl", context, tmp_path)
    sink.start(RECIPE, 4)
    log_steps(sink, 5, 8)
    sink.close("finished")
    assert file.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "whole"]


@pytest.mark.parametrize("torn", [1, 2, 30])
def test_a_line_torn_by_a_crash_is_mended_even_where_no_step_comes_again(context, tmp_path, torn):
    whole = unbroken(context, tmp_path / "run")
    file = tmp_path / "run/metrics.jsonl"
    file.write_bytes(whole[:-torn])
    sink = logger("jsonl", context, tmp_path / "run")
    sink.start(RECIPE, 8)
    sink.close("finished")
    # Without its line end the last line is still whole; with less it is gone.
    assert file.read_bytes() == (whole if torn == 1 else b"".join(whole.splitlines(keepends=True)[:7]))


def test_a_crash_while_lines_are_dropped_leaves_the_old_file(context, tmp_path, monkeypatch):
    whole = unbroken(context, tmp_path / "run")

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        logger("jsonl", context, tmp_path / "run").start(RECIPE, 3)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == whole
    monkeypatch.undo()
    logger("jsonl", context, tmp_path / "run").start(RECIPE, 3)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("foreign", ["not JSON", "[1, 2]", '{"loss": 1}'])
def test_a_file_that_is_no_log_is_left_alone(context, tmp_path, foreign):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{foreign}\n{{"step": 2}}\n')
    with pytest.raises(Refused, match=r"metrics\.jsonl: line 2 is not one of this log"):
        logger("jsonl", context, tmp_path).start(RECIPE, 1)
    assert foreign in (tmp_path / "metrics.jsonl").read_text()


def test_a_fifo_in_the_place_of_the_file_does_not_block(context, tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(Refused, match=r"metrics\.jsonl: not a regular file"):
        logger("jsonl", context, tmp_path).start(RECIPE, 1)


def test_a_file_that_cannot_be_read_is_named(context, tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')

    def fails(path):
        raise OSError(5, "Input/output error")  # as a read does: only opening names the file

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        logger("jsonl", context, tmp_path).start(RECIPE, 1)

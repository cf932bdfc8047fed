"""The logger `console`: what appears on stderr."""

from __future__ import annotations

import re
import sys
from weakref import WeakSet

import torch
from tqdm import tqdm

from tests.support.logged import (
    RECIPE,
    evaluation,
    logger,
    metrics,
)

LOGGED = {"tokens": 32000, "loss/total": 0.43211, "optim/lr": 1e-3, "time/tokens_per_s": 4096.4, "loss/mse": 0.4}
HELD_OUT = {"tokens": 32000, "eval/nmse": 0.1234567, "eval/l0": 31.96, "eval/dead_fraction": 0.0123}


def squeezed(text: str) -> list[str]:
    return [re.sub(r" +", " ", line) for line in text.splitlines()]


def test_a_line_for_training_and_one_for_evaluation_without_columns_that_are_absent(context, tmp_path, capsys):
    sink = logger("console", context, tmp_path)
    sink.start(RECIPE, 0)
    sink.log(500, LOGGED)
    sink.log(500, HELD_OUT | {"eval/nmse_by_layer": torch.ones(3)})
    out, err = capsys.readouterr()
    assert out == "", "stdout is for results"
    assert squeezed(err) == [
        "step 500 tokens 32,000 loss 0.4321 lr 0.001 tokens/s 4,096",
        "step 500 tokens 32,000 held-out NMSE 0.1235 L0 31.96 dead 1.2%",
    ]


def test_columns_can_be_chosen(context, tmp_path, capsys):
    sink = logger("console", context, tmp_path, metrics=["loss/mse", "train/nmse_by_layer", "eval/density"])
    sink.start(RECIPE, 0)
    sink.log(1, LOGGED | metrics(2) | evaluation(2))
    sink.log(2, {"tokens": 3})
    assert squeezed(capsys.readouterr().err) == ["step 1 loss/mse 0.4 train/nmse_by_layer [0.25 0.125]"]


def test_a_line_without_columns_shows_what_was_logged(context, tmp_path, capsys):
    sink = logger("console", context, tmp_path)
    own = {"callbacks/scaled": 3, "callbacks/by_layer": torch.ones(3), "callbacks/norm": torch.tensor(0.5)}
    sink.log(7, {"tokens": 112, **own})
    sink.log(8, {"tokens": 128, **{f"mine/{n}": n for n in range(9)}})
    assert squeezed(capsys.readouterr().err) == [
        "step 7 tokens 112 callbacks/scaled 3 callbacks/norm 0.5",
        "step 8 tokens 128 " + " ".join(f"mine/{n} {n}" for n in range(6)),
    ]
    only = logger("console", context, tmp_path, metrics=["tokens"])
    only.log(7, {"tokens": 112, **own})
    assert squeezed(capsys.readouterr().err) == ["step 7 tokens 112"], "as chosen"


def test_lines_stand_aligned_below_each_other(context, tmp_path, capsys):
    sink = logger("console", context, tmp_path)
    sink.log(1, LOGGED)
    sink.log(20000, LOGGED | {"tokens": 1_280_000, "loss/total": 0.1})
    first, second = capsys.readouterr().err.splitlines()
    assert [m.start() for m in re.finditer("[a-z/]+ ", first)] == [m.start() for m in re.finditer("[a-z/]+ ", second)]


def test_a_progress_bar_is_lifted_out_of_the_way(context, tmp_path, capsys, monkeypatch):
    # A library's bar that another test broke off may live on: this one would be drawn a line below it.
    monkeypatch.setattr(tqdm, "_instances", WeakSet())
    sink = logger("console", context, tmp_path)
    with tqdm(total=10, file=sys.stderr, mininterval=0, ncols=60) as bar:
        bar.update(3)
        sink.log(3, LOGGED)
        bar.update(3)
    shown = capsys.readouterr().err
    assert re.search(r"\rstep +3   tokens[^\r]*4,096\n", shown), "on a line of its own"
    assert "60%" in shown.split("4,096\n")[1], "and the bar goes on below"

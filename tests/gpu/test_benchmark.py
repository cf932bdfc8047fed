"""The benchmark for machines with a GPU, tried on a CPU at small sizes; and that it notices what is wrong."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from clt_plugins.registry.plugins import load_plugins
from tests.benchmarks.gpu import __main__ as benchmark
from tests.benchmarks.gpu import right
from tests.benchmarks.gpu.table import table

CPU = torch.device("cpu")


def test_its_figures_are_one_json_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--json", "-", "--only", "ceilings", "--only", "shapes"]
    monkeypatch.setattr(sys, "argv", ["gpu", *flags])
    benchmark.main()
    figures = json.loads(capsys.readouterr().out)
    shape = figures["shapes: tiny"]
    assert shape["step_ms"] > 0 and figures["ceilings"]["copy_bytes_per_s"] > 0
    assert {"selection", "decode", "optimizer"} <= shape["pieces_ms"].keys()
    assert "ms a step" in table(figures)


def test_a_section_that_fails_is_told_and_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(right, "selection", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--only", "selection", "--only", "ceilings"])
    with pytest.raises(SystemExit, match="1"):
        benchmark.main()
    assert "selection: failed: ZeroDivisionError" in capsys.readouterr().out


def test_a_wrong_selection_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = load_plugins()
    assert right.selection(CPU, plugins, "torch", small=True)["failed"] == []
    sort = right.by_sorting
    monkeypatch.setattr(right, "by_sorting", lambda pre, k, per: sort(pre, k - 1, per))
    assert len(right.selection(CPU, plugins, "torch", small=True)["failed"]) == 6


def test_runs_that_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(right, "RECIPES", {"one": right.RECIPES["batchtopk, AuxK"]})
    plugins = load_plugins()
    assert right.steps(CPU, plugins)["one"]["two_runs_equal"]
    take, number = right.Step.take, iter(range(100))

    def disturbed(self: Any, steps: int, after: Any = None) -> None:
        take(self, steps, after)
        with torch.no_grad():
            self.parts.transcoder.encoder.b_enc += 1e-6 * next(number)

    monkeypatch.setattr(right.Step, "take", disturbed)
    assert not right.steps(CPU, plugins)["one"]["two_runs_equal"]

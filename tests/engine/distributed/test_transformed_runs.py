"""Runs with transforms: resumed bit for bit, refused by name, and planned."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clt_plugins import PluginError, load_plugins, run
from clt_plugins.distributed.transformed import TransformedSource
from clt_plugins.training.plan.build import plan
from tests.engine.training.test_run import assert_bit_identical
from tests.support.helpers import parts, plugins, recipe, tables


def test_a_run_resumes_bit_for_bit_with_rows_left_over(tmp_path: Any) -> None:
    chosen = [{"name": "subsample", "share": 0.8}, {"name": "drop_outliers", "factor": 6.0}, "noise"]
    data = tables(transforms=chosen, metrics=["training", "held_out", "cosine"])
    run(data, out=tmp_path / "whole")
    run(data, out=tmp_path / "other")
    run(data, out=tmp_path / "other", resume="step_000004")
    for step in ("step_000008", "step_000012"):
        assert_bit_identical(tmp_path / "whole/checkpoints" / step, tmp_path / "other/checkpoints" / step)
    state = json.loads((tmp_path / "whole/checkpoints/step_000004/training.json").read_text())["source"]
    assert state["left"] > 0
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert all(line["transforms/subsample_dropped"] > 0 for line in lines if "loss/total" in line)
    assert lines[-1]["tokens"] == 12 * 16


def test_transforms_that_came_or_went_are_refused_and_accepted_by_name(tmp_path: Any) -> None:
    with_some, without = tables(transforms=["subsample"]), tables()
    for name, first, second in (("went", with_some, without), ("came", without, with_some)):
        run(first, out=tmp_path / name)
        with pytest.raises(Exception, match="transforms: differs from the run"):
            run(second, out=tmp_path / name, resume="step_000004")
        run(second, out=tmp_path / name, resume="step_000004", accept=["transforms"])


def test_a_plan_counts_the_rows_that_are_put_together() -> None:
    sizes = [plan(recipe(transforms=chosen), plugins()).bytes.source for chosen in ([], ["noise"], ["subsample"])]
    assert sizes[0] == sizes[1]
    assert sizes[2] - sizes[0] == 2 * 16 * (2 * 3 * 6 * 4)


def test_no_transform_is_no_wrapper() -> None:
    assert not isinstance(parts().source, TransformedSource)
    assert isinstance(parts(transforms=["noise"]).source, TransformedSource)


def test_a_tensor_that_a_transform_changes_is_refused_by_name(distributions: Any, tmp_path: Any) -> None:
    distributions.module(
        "clt_running",
        """
import torch
from attrs import frozen
from clt_plugins import Batch, Spec, hookimpl

@frozen(kw_only=True)
class Config:
    '''Subtract a running mean.'''

class Running:
    held_out, drops = False, False

    def __init__(self, config, context):
        self.mean = torch.zeros(context.n_layers, context.d_model)

    def __call__(self, batch, number):
        self.mean = 0.9 * self.mean + 0.1 * batch.inputs.mean(0)
        return Batch(batch.inputs - self.mean, batch.targets, batch.token_ids, batch.positions)

@hookimpl
def clt_transforms():
    return [Spec("running", Config, Running)]
""",
    )
    with pytest.raises(PluginError, match=r"transforms\[0\]: 'running' .*`mean` changes .*: give it by `state`"):
        run(tables(transforms=["running"]), out=tmp_path / "run", plugins=load_plugins(extra=["clt_running"]))

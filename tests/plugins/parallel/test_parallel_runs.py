"""Runs on two ranks: one is lost; what is refused; and the stages after training, started by `torchrun`."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clt_plugins import run
from clt_plugins.errors import ExitCode
from clt_plugins.files.folders import check_folder
from clt_plugins.files.sliced import SlicedTensors
from clt_plugins.recipe.read import as_toml, read_recipe
from clt_plugins.registry.plugins import load_plugins
from clt_plugins.toml import toml_text
from tests.support.commands import on_ranks, python
from tests.support.helpers import SMALL, tables
from tests.support.rank_runs import RUN

INTERRUPTING = "tests.support.interrupting"


def run_on_two(recipe: Path, out: Path, *flags: str, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    command = ["-m", "clt_plugins", "run", recipe, "--out", out, "-p", INTERRUPTING, *flags]
    return on_ranks(2, *command, **environment)


def test_a_rank_that_dies_ends_the_run_with_a_message_and_the_resumed_run_is_the_undisturbed_one(tmp_path):
    changes = {**RUN, "losses": [*RUN["losses"], {"name": "dying"}], "parallel": {"name": "tensor"}}
    typed = read_recipe(tables(**changes), plugins=load_plugins(extra=[INTERRUPTING]))
    recipe = tmp_path / "r.toml"
    recipe.write_text(as_toml(typed))
    at = random.Random(0).randrange(5, 12)
    left, died = run_on_two(recipe, tmp_path / "run", DIE_RANK="1", DIE_AT=str(at))
    assert died.returncode == -signal.SIGKILL
    assert left.returncode == ExitCode.FAILED
    assert "rank 0: another of the 2 ranks died or hangs" in left.stderr, left.stderr
    assert "start all ranks again with --resume" in left.stderr
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"step_{step:06}" for step in (4, 8) if step <= at], "only complete ones"
    for out, flags in (("run", ["--resume"]), ("whole", [])):
        ranks = run_on_two(recipe, tmp_path / out, *flags)
        assert [rank.returncode for rank in ranks] == [0, 0], ranks
        printed = ["transcoder saved in" in rank.stderr for rank in ranks]
        assert printed == [True, False], "only rank 0 prints"
    for stem in ("transcoder", "training"):
        one, other = (
            SlicedTensors.find(tmp_path / name / "checkpoints/step_000012", stem) for name in ("run", "whole")
        )
        assert one.shapes == other.shapes
        for name in one.shapes:
            assert torch.equal(one.read(name), other.read(name)), name
    # Checksums are shared by the ranks: that of the second file is the second rank's.
    newest = tmp_path / "run/checkpoints/step_000012"
    second = newest / [*json.loads((newest / "manifest.json").read_text())["files"]][1]
    content = second.read_bytes()
    second.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    ranks = run_on_two(recipe, tmp_path / "run", "--resume")
    assert [rank.returncode for rank in ranks] == [ExitCode.USAGE] * 2
    assert f"{second.name}: damaged" in ranks[0].stderr and "complete: --resume step_000008" in ranks[0].stderr


@pytest.mark.parametrize(
    "parallel, started, text",
    [
        ({"name": "tensor", "tensor": 3}, "2", "parallel: tensor 3 × data 1 is 3 ranks, but 2 were started"),
        ({"name": "tensor", "data": 2}, "3", "parallel: tensor 1 × data 2 is 2 ranks, but 3 were started"),
        ({"name": "tensor", "backend": "nccl"}, "1", 'parallel.backend: "nccl" is for GPUs'),
        ({"name": "single"}, "2", 'parallel: "single" is 1 process, but 2 were started: choose parallel = "tensor"'),
        ({"name": "tensor", "tensor": 3}, None, "start them by `torchrun --nproc-per-node 3 -m clt_plugins run"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch, parallel, started, text):
    if started is not None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(ValueError, match=re.escape(text)):
        run(tables(parallel=parallel), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_stages_after_training_come_out_of_two_tensor_ranks_as_of_one_process(tmp_path):
    stages = {
        "convert": {"tokens": 512, "calibration_tokens": 512, "tolerance": 0.05},
        "evaluate": {"tokens": 256},
        "exports": [{"name": "circuit-tracer", "model_name": "none"}, {"name": "safetensors"}],
    }
    # With noise, no two tokens are alike, and any L0 can be reached.
    source = {**SMALL["source"], "noise": 0.1}
    changes = {**RUN, "source": source, "loggers": [{"name": "jsonl"}], **stages}
    recipe = tmp_path / "r.toml"
    recipe.write_text(as_toml(read_recipe(tables(**changes, parallel={"name": "tensor"}), plugins=load_plugins())))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command += ["-m", "clt_plugins", "run", recipe, "--out", tmp_path / "two"]
    done = python(*command, env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(": written by stages[") == 4, "only rank 0 prints"
    run(tables(**changes), out=tmp_path / "one")
    for name in ("converted/convert.json", "evaluation/evaluation.json"):
        one, two = (json.loads((tmp_path / each / name).read_text()) for each in ("one", "two"))
        assert one.keys() == two.keys()
        for table in ("before", "after") if "after" in one else ("by_layer",):
            for key, values in one[table].items():
                assert two[table][key] == pytest.approx(values, rel=1e-5), (table, key)
    for export in ("exports/circuit-tracer/W_dec_0.safetensors", "exports/safetensors/clt.safetensors"):
        one_file, two_file = (load_file(tmp_path / each / export) for each in ("one", "two"))
        assert one_file.keys() == two_file.keys()
        for name, value in one_file.items():
            assert torch.allclose(two_file[name], value, rtol=1e-5, atol=1e-6), name


TOTAL = '''
from attrs import field, frozen
from clt_plugins import FREE_ON_RESUME, Spec, StageInfo, hookimpl, score

@frozen(kw_only=True)
class Config:
    """A number of all ranks."""
    ranks: str = "all"
    """Who."""
    needs: str = "source"
    """What."""
    every: int | None = field(default=None, metadata=FREE_ON_RESUME)
    """How often."""

class Total:
    def __init__(self, config):
        folder = f"total-{config.ranks}"
        self.info = StageInfo(folder=folder, ranks=config.ranks, needs=config.needs, every=config.every)

    def check(self, job):
        pass

    def run(self, job):
        parallel = job.context.parallel
        total = float(parallel.total(job.transcoder.W_enc.detach().double().abs().sum()))
        l0 = score(job.transcoder, job.source.held_out(64)).l0 if job.source is not None else 0.0
        if parallel.rank == 0:
            (job.folder / "total.txt").write_text(f"{parallel.world} {total} {l0}")
        job.log({"total/sum": total})

@hookimpl
def clt_stages():
    return [Spec("total", Config, lambda config, context: Total(config))]
'''


def test_stages_on_all_ranks_and_on_one_also_run_at_checkpoints(tmp_path):
    (tmp_path / "total_stage.py").write_text(TOTAL)
    stages = [{"name": "total", "every": 4}, {"name": "total", "ranks": "one", "needs": "transcoder", "every": 4}]
    changes = {**RUN, "loggers": ["jsonl"], "train": {**RUN.get("train", {}), "steps": 8, "checkpoint_every": 4}}
    paths = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])

    def run_on(ranks: int, name: str, **more: Any) -> list[subprocess.CompletedProcess[str]]:
        (tmp_path / f"{name}.toml").write_text(toml_text({**tables(**changes), **more}))
        command = ["-m", "clt_plugins", "run", tmp_path / f"{name}.toml", "-p", "total_stage", "--out", tmp_path / name]
        return on_ranks(ranks, *command, PYTHONPATH=paths)

    tensor = {"parallel": {"name": "tensor"}}
    for ranks, name, more in ((1, "one", {}), (2, "two", tensor), (2, "plain", {**tensor, "stages": []})):
        for done in run_on(ranks, name, **{"stages": stages, **more}):
            assert done.returncode == 0, done.stderr
    for place in ("", "stages/step_000004/"):
        for who, world in (("all", "2"), ("one", "1")):
            read = [(tmp_path / run / place / f"total-{who}/total.txt").read_text().split() for run in ("one", "two")]
            assert [read[0][0], read[1][0]] == ["1", world]
            for one, other in zip(read[0][1:], read[1][1:], strict=True):
                assert float(one) == pytest.approx(float(other), rel=1e-5), (place, who)
            check_folder(tmp_path / "two" / place / f"total-{who}")
    for file in sorted((tmp_path / "plain/transcoder").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "two/transcoder" / file.name).read_bytes(), "training is the same"
    logged = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "total/sum" in line] == [4, 4]
    refused, _ = run_on(2, "no", **tensor, stages=[{"name": "total", "ranks": "one", "every": 4}])
    assert refused.returncode == ExitCode.USAGE
    assert "stages[0].every: 'total' runs on one rank, but during training 2 read the source" in refused.stderr

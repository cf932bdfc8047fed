"""One training, and its figures: a process of its own, started by a lot (`lot`) with its job as JSON on stdin.

Everything that it stores is in a folder that is gone afterwards; its result is one file, written atomically.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tests.benchmarks.quality.data import Stored
from tests.benchmarks.quality.setups import ROOT, Setup

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins import CrossLayerTranscoder

BUSY = 75
"""The exit status where another process does this job."""
WORKER = Path(__file__).parents[1] / "peers" / "decode_clt_train.py"


@attrs.frozen(kw_only=True)
class Job:
    """What a process does."""

    setup: Setup
    folder: Path
    """The lot's."""
    key: str
    recipe: str
    seed: int
    tables: dict[str, Any]
    """Of our recipe; of the peer, what its worker is told."""
    peer_python: str = ""
    """The interpreter that has decode-clt: then it is trained."""
    threads: int = 1

    @property
    def digest(self) -> str:
        """Of the setup, the recipe and the seed."""
        return self.key.rpartition("-")[2]

    @property
    def result(self) -> Path:
        """The file with its figures; another recipe with the same tables may have written it."""
        path = self.folder / "results" / f"{self.key}.json"
        same = path.parent.glob(f"*-{self.digest}.json")
        return next((file for file in sorted(same) if not file.name.startswith(".")), path)


def main() -> None:
    from clt_plugins import Lock, write_json

    told = json.load(sys.stdin)
    setup = Setup(**told.pop("setup"))
    job = Job(**{**told, "setup": setup, "folder": Path(told["folder"])})
    runs = job.folder / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    lock = Lock(runs / f"{job.key.replace('/', '-')}.lock")
    if lock.try_acquire() is not None:
        sys.exit(BUSY)
    try:
        with tempfile.TemporaryDirectory(dir=runs, prefix=f"{job.key.replace('/', '-')}.") as work:
            stored = Stored(setup, job.folder)
            figures = peer(job, stored) if job.peer_python else own(job, stored, Path(work) / "run")
        job.result.parent.mkdir(parents=True, exist_ok=True)
        about = {"setup": setup.name, "recipe": job.recipe, "seed": job.seed, "threads": job.threads}
        partial = job.result.with_name(f".{job.result.name}.partial")
        write_json(partial, {**about, "commit": commit(), **figures})
        partial.replace(job.result)
    finally:
        lock.release()


def own(job: Job, stored: Stored, out: Path) -> dict[str, Any]:
    """Train ours, and judge it."""
    import torch

    from clt_plugins import run, score

    torch.set_num_threads(job.threads)
    tables = {**job.tables}
    if tables["source"]["name"] == "local":
        tables["source"] = {**tables["source"], "path": str(stored.train)}
    before = time.process_time()
    transcoder = run(tables, out=out)
    cpu_s = time.process_time() - before
    before = time.process_time()
    scores = {which: score(transcoder, stored.batches(which)) for which in ("choose", "report")}
    inside = in_model(transcoder, stored, scores["report"].target_mean)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    spent = [line for line in lines if "time/step_s" in line]
    recipe = tomllib.loads((out / "recipe.toml").read_text())
    return {
        **{
            f"{name}_{which}": getattr(of_set, name)
            for which, of_set in scores.items()
            for name in ("nmse", "l0", "dead_fraction")
        },
        "nmse_by_layer_report": scores["report"].nmse_by_layer.tolist(),
        "l0_by_layer_report": scores["report"].l0_by_layer.tolist(),
        # Not active on the last tokens of training: a twentieth of the run's.
        "dead_fraction_training": spent[-1]["train/dead_fraction"],
        **inside,
        # Lines come at even intervals, so this is the mean of all steps but those of the first line, in which kernels
        # are compiled or loaded. A run of one line has no other.
        "step_s": statistics.fmean(line["time/step_s"] + line["time/data_s"] for line in spent[1:] or spent),
        "cpu_step_s": cpu_s / recipe["train"]["steps"],
        "judged_cpu_s": time.process_time() - before,
        "steps": recipe["train"]["steps"],
        "batch": recipe["train"]["batch_tokens"],
        "lr": recipe["train"]["lr"],
        "settings": portable(recipe),
    }


def in_model(transcoder: CrossLayerTranscoder, stored: Stored, target_mean: Tensor) -> dict[str, Any]:
    """What the language model says with the transcoder in the place of its MLPs; {} where a setup has no tokens for
    it, which spares a third of a short run's time."""
    from clt_stages.in_model import evaluate_in_model

    if not stored.setup.model_tokens:
        return {}
    model = stored.reporting_source().language_model()  # type: ignore[attr-defined]
    found = evaluate_in_model(transcoder, model, stored.setup.model_tokens, target_mean)
    return {
        "ce_recovered": found.ce_recovered,
        "kl": found.kl.transcoder,
        "top1": found.top1.transcoder,
        "model_tokens": found.tokens,
    }


def peer(job: Job, stored: Stored) -> dict[str, Any]:
    """Train decode-clt in its own environment."""
    told = {"data": stored.train, "threads": job.threads, "seed": job.seed, **job.tables}
    told |= {which: stored.held_out(which) for which in ("choose", "report")}
    command = [job.peer_python, str(WORKER), *(f"--{name}={value}" for name, value in told.items())]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return {**figures, "settings": job.tables}


def portable(recipe: dict[str, Any]) -> dict[str, Any]:
    """A run's recipe without paths of this machine."""
    out = {**recipe, "source": {name: value for name, value in recipe["source"].items() if name != "path"}}
    if "model" in out:
        out["model"] = {**out["model"], "path": Path(out["model"]["path"]).name}
    return out


def commit() -> str:
    """Of the project, with a mark where files differ from it."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
    )
    return told.stdout.strip()


if __name__ == "__main__":
    main()

"""Tensor parallel = single: a rank's side. Takes jobs as lines of JSON on stdin, answers on stdout; see `ranks`."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from clt_plugins.model.assemble import assemble
from clt_plugins.recipe.read import read_recipe
from clt_plugins.registry.plugins import Plugins, load_plugins
from clt_plugins.testing.bench import FEATURES, Bench
from clt_plugins.testing.ranks import results, weights_of, write_tensors
from clt_plugins.testing.report import place


def do_step(job: dict[str, Any], plugins: Plugins) -> dict[str, Any]:
    """A training step with the parent's weights, in `rank<N>.safetensors`."""
    folder, rank = Path(job["folder"]), int(os.environ["RANK"])
    parts = assemble(read_recipe(job["recipe"], plugins=plugins), folder, torch.device("cpu"))
    try:
        bench = Bench(plugins, job["slot"], "", {}, {}, None, folder)
        transcoder = parts.transcoder
        axes = {name: axis for name, (_, _, axis) in transcoder.views().items()}
        shard = parts.context.parallel.shard(FEATURES)
        own = {name: x for name, x in transcoder.tensors().items() if name in axes}
        found = {f"first/{name}": x.clone() for name, x in own.items()}
        with torch.no_grad():
            for name, value in weights_of(folder, shard, axes).items():
                own[name].copy_(value)
        found |= results(parts, bench)
        write_tensors(folder / f"rank{rank}.safetensors", found)
        return {"axes": axes, "shard": [shard.start, shard.stop]}
    finally:
        parts.context.parallel.close()


def do_parallel(job: dict[str, Any], plugins: Plugins) -> dict[str, Any]:
    """The collectives of a `[parallel]` choice, and this rank's place."""
    from clt_plugins.testing.parallels import exercise

    spec = plugins.pick("parallel", job["choice"]).spec
    parallel = spec.build(spec.config(**job["settings"]), torch.device("cpu"))
    try:
        return exercise(parallel)
    finally:
        parallel.close()


def main() -> None:
    """Answer each line until stdin closes."""
    torch.set_num_threads(1)
    # What a plugin prints must not get between the answers.
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        os.environ["MASTER_PORT"] = str(job["port"])
        sys.path[:] = job["path"]
        try:
            if job["module"]:  # it may have been written anew since the last job
                for name in [each for each in sys.modules if f"{each}.".startswith(f"{job['module']}.")]:
                    del sys.modules[name]
                importlib.invalidate_caches()
            plugins = load_plugins(extra=[job["module"]] if job["module"] else [])
            answer = {"step": do_step, "parallel": do_parallel}[job["do"]](job, plugins)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            answer = {"error": f"rank {os.environ['RANK']}: {text}", "place": place(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

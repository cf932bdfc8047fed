"""Runs of the tables that are written already, as results of a lot's folder: another machine, or a folder that is gone,
did them.

A table has no settings, so a run is known by its setup, recipe, seed, steps, batch and learning rate. It counts as one
of today's settings: take runs only if no default changed since the commits that the table names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from clt_plugins import write_json
from tests.benchmarks.quality import tables
from tests.benchmarks.quality.lot import result, today
from tests.benchmarks.quality.one import Job

TABLES = ("ablation", "defaults", "quality")
ELSEWHERE = "elsewhere"
"""What marks a result whose times are not comparable with those of this folder's own runs."""


def take(jobs: Iterable[Job]) -> list[Job]:
    """Write a result for every job that has none and is a run of a table.

    Returns:
        The jobs that got one.
    """
    known = {_key(run): run for name in TABLES for run in tables.written(name)}
    taken = []
    for job in jobs:
        if result(job) is not None:
            continue
        settings = job.tables if job.peer_python else today(job)
        train = settings if job.peer_python else settings["train"]
        steps, batch = train["steps"], train["batch" if job.peer_python else "batch_tokens"]
        about = {"setup": job.setup.name, "recipe": job.recipe, "seed": job.seed}
        run = known.get(_key({**about, "steps": steps, "batch": batch, "lr": train["lr"]}))
        if run is not None:
            job.result.parent.mkdir(parents=True, exist_ok=True)
            partial = job.result.with_name(f".{job.result.name}.{os.getpid()}.partial")
            write_json(partial, {**run, ELSEWHERE: True, "settings": settings})
            partial.replace(job.result)
            taken.append(job)
    return taken


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run.get(name) for name in ("setup", "recipe", "seed", "steps", "batch", "lr"))

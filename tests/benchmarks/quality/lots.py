"""The lots: which runs each has, in which order, and the table that they make."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs

from tests.benchmarks.quality import tables
from tests.benchmarks.quality.defaults import Grids
from tests.benchmarks.quality.lot import Lot, result
from tests.benchmarks.quality.one import Job
from tests.benchmarks.quality.peer import Peer
from tests.benchmarks.quality.recipes import BASE, RECIPES
from tests.benchmarks.quality.setups import Setup


class Plan(Protocol):
    """A lot's runs."""

    def jobs(self) -> list[Job]:
        """All runs that can be named now; results may make others necessary."""

    def write(self) -> Path:
        """Write the results that are there as a table."""


@attrs.frozen
class Ablation:
    """Recipes at equal tokens, one seed of all before the next one."""

    lot: Lot
    setups: Sequence[Setup]
    seeds: Sequence[int]
    only: Collection[str]

    def jobs(self) -> list[Job]:
        return [
            self.lot.job(setup, name, seed, recipe.tables(setup, seed))
            for seed in self.seeds
            for setup in self.setups
            for name, recipe in RECIPES.items()
            if not self.only or name in self.only
        ]

    def write(self) -> Path:
        figures = ["nmse_report", "l0_report", "dead_fraction_report", "ce_recovered", "kl", "cpu_step_s"]
        rows, raw = [], []
        for setup in self.setups:
            found = {name: self._results(setup, name) for name in RECIPES}
            for name, runs in found.items():
                raw += runs
                if runs:
                    beside = "read from the model" if "kl" in name else BASE
                    over = tables.ratio(runs, found[beside])
                    cells = tables.cells(runs, figures)
                    rows.append([setup.about, name, RECIPES[name].source, str(len(runs)), cells[0], over, *cells[1:]])
        named = [tables.COLUMNS[name][0] for name in figures]
        columns = ["model", "recipe", "what it is", "seeds", named[0], "NMSE over the base's", *named[1:]]
        return tables.write("ablation", WHAT, f"{COMMAND} ablation {FOLDER} --write", columns, rows, raw)

    def _results(self, setup: Setup, name: str) -> list[dict[str, Any]]:
        jobs = [self.lot.job(setup, name, seed, RECIPES[name].tables(setup, seed)) for seed in self.seeds]
        return [figures for job in jobs if (figures := result(job)) is not None]


COMMAND = "python -m tests.benchmarks.quality"
FOLDER = "--folder FOLDER --model SmolLM2-135M.gguf"
WHAT = (
    "Recipes at equal tokens, each a change of the defaults with BatchTopK (the first row). Mean and half the range "
    "over seeds, on held-out documents by which nothing was chosen; a ratio is of runs with the same seed. Dead: "
    "never active on these documents. CE recovered and KL: all MLPs of the layers replaced at once."
)


def do(plan: Plan, lot: Lot) -> list[Job]:
    """Run what is missing, and what its results make necessary; returns the runs that failed."""
    failed: dict[str, Job] = {}
    while left := [job for job in lot.missing(plan.jobs()) if job.key not in failed]:
        failed |= {job.key: job for job in lot.run(left)}
    return list(failed.values())


LOTS: dict[str, Callable[[Lot, Sequence[Setup], Sequence[int], Collection[str]], Plan]] = {
    "ablation": Ablation,
    "defaults": Grids,
    "peer": Peer,
}

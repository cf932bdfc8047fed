"""decode-clt's own trainer beside our defaults, at equal tokens and at equal time.

Learning rates of both are chosen on the set `choose` with the first seed. Equal time: each of our recipes for as many
steps as the peer's processor time allows, with one thread. Ours is charged its whole run on stored activations, what
comes before and after the steps included; the peer its steps alone. These runs read more tokens than are stored, so
activations are read from the model; that pass is charged to neither.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import attrs

from tests.benchmarks.quality import tables
from tests.benchmarks.quality.earlier import ELSEWHERE
from tests.benchmarks.quality.lot import Lot, result
from tests.benchmarks.quality.one import Job
from tests.benchmarks.quality.recipes import BASE, RECIPES, Recipe
from tests.benchmarks.quality.setups import Setup

OURS = {
    BASE: "our defaults",
    "exemplar start": "with exemplar_start",
    "exemplar start, decoder fitted": "with exemplar_start and fit_decoder",
    "exemplar start, decoder fitted, skip": "with both and a skip path",
}
"""Recipes of the ablation, and what tables call them."""


@attrs.frozen
class Peer:
    """The lot `peer`."""

    lot: Lot
    setups: Sequence[Setup]
    seeds: Sequence[int]
    only: Collection[str]
    """Of "peer", "own", "equal time"."""

    def jobs(self) -> list[Job]:
        wanted = {"peer": "decode-clt", "own": "ours", "equal time": "equal time"}
        return [job for job in self._all() if not self.only or any(wanted[name] in job.recipe for name in self.only)]

    def _all(self) -> list[Job]:
        jobs: list[Job] = []
        for setup in self.setups:
            first = self.seeds[0]
            if self.lot.peer_python:
                jobs += [self._peer(setup, lr, first) for lr in setup.peer_lrs]
            jobs += [self._own(setup, lr, first) for lr in setup.lrs]
            jobs += [self._ours(setup, name, seed) for name in OURS for seed in self.seeds]
            for best, job in ((self._best_peer(setup), self._peer), (self._best_own(setup), self._own)):
                if best is not None:
                    jobs += [job(setup, best, seed) for seed in self.seeds[1:]]
            for name in OURS:
                if (times := self._times(setup, name)) is not None:
                    jobs.append(self._longer(setup, name, times))
        return jobs

    def write(self) -> Path:
        once = {job.digest: job for job in self._all()}
        raw = self._results([job for job in once.values() if job.recipe not in OURS])  # those are the ablation's
        if any(self._best_peer(setup) is None for setup in self.setups):
            return tables.keep("quality", raw)
        rows = []
        for setup in self.setups:
            peer_lr, own_lr = self._best_peer(setup), self._best_own(setup)
            theirs = [] if peer_lr is None else self._results([self._peer(setup, peer_lr, seed) for seed in self.seeds])
            lines = {
                f"{label}, same number of steps": [self._ours(setup, name, seed) for seed in self.seeds]
                for name, label in OURS.items()
            }
            if own_lr is not None:
                label = f"ours, lr {own_lr:g}, same number of steps"
                lines[label] = [self._own(setup, own_lr, seed) for seed in self.seeds]
            for name, label in OURS.items():
                if (times := self._times(setup, name)) is not None:
                    longer = self._longer(setup, name, times)
                    lines[f"{label}, {times:g} times the steps, in the time of decode-clt"] = [longer]
            if theirs:
                rows.append([f"{setup.about}: decode-clt, lr {peer_lr:g}", *self._row(theirs), ""])
            for label, jobs in lines.items():
                runs = self._results(jobs)
                if runs:
                    rows.append([label, *self._row(runs), tables.ratio(runs, theirs) if theirs else "-"])
        columns = ["trained by", "seeds", "NMSE", "never active", "processor s/step", "NMSE over that of decode-clt"]
        command = "python -m tests.benchmarks.quality peer --folder FOLDER --model SmolLM2-135M.gguf"
        return tables.write("quality", WHAT, f"{command} --peer-python PYTHON --write", columns, rows, raw)

    def _row(self, runs: list[dict[str, Any]]) -> list[str]:
        return [str(len(runs)), *tables.cells(runs, ["nmse_report", "dead_fraction_report", "cpu_step_s"])]

    # -- which runs ------------------------------------------------------------------------------------------------

    def _peer(self, setup: Setup, lr: float, seed: int) -> Job:
        told = {
            "features": setup.features,
            "batch": setup.batch,
            "k": setup.k,
            "steps": setup.tokens // setup.batch,
            "lr": lr,
            "loss": "own",
        }
        return self.lot.job(setup, f"decode-clt, lr {lr:g}", seed, told, peer=True)

    def _own(self, setup: Setup, lr: float, seed: int) -> Job:
        recipe = Recipe("", lambda _: {"train": {"lr": lr}})
        return self.lot.job(setup, f"ours, lr {lr:g}", seed, recipe.tables(setup, seed))

    def _ours(self, setup: Setup, name: str, seed: int) -> Job:
        # That of the ablation: trained once.
        return self.lot.job(setup, name, seed, RECIPES[name].tables(setup, seed))

    def _longer(self, setup: Setup, name: str, times: float) -> Job:
        """One seed: it costs as much as the peer, and the language model's pass besides."""
        changes = RECIPES[name].changes(setup)
        recipe = Recipe("", lambda _: {**changes, **setup.stream(), "data_seed": 0}, times)
        seed = self.seeds[0]
        return self.lot.job(setup, f"equal time, {name}", seed, recipe.tables(setup, seed))

    def _times(self, setup: Setup, name: str) -> float | None:
        """How many of a recipe's steps fit into one of the peer's, rounded down; by the first seed.

        Ours is the processor time of a whole run with all that comes before and after the steps, the peer's that of its
        steps alone. None while one is missing, or is of another place: remove such a result, and it is run here.
        """
        best = self._best_peer(setup)
        theirs = None if best is None else result(self._peer(setup, best, self.seeds[0]))
        ours = result(self._ours(setup, name, self.seeds[0]))
        if theirs is None or ours is None or ELSEWHERE in theirs or ELSEWHERE in ours:
            return None
        return max(1.0, int(10 * theirs["cpu_step_s"] / ours["cpu_step_s"]) / 10)

    def _best_peer(self, setup: Setup) -> float | None:
        return self._best([self._peer(setup, lr, self.seeds[0]) for lr in setup.peer_lrs], setup.peer_lrs)

    def _best_own(self, setup: Setup) -> float | None:
        return self._best([self._own(setup, lr, self.seeds[0]) for lr in setup.lrs], setup.lrs)

    def _best(self, jobs: list[Job], lrs: Sequence[float]) -> float | None:
        """The rate with the least NMSE on `choose`; None while a result is missing."""
        found = [result(job) for job in jobs]
        if any(run is None for run in found):
            return None
        return min(zip(lrs, found, strict=True), key=lambda pair: pair[1]["nmse_choose"])[0]  # type: ignore[index]

    def _results(self, jobs: list[Job]) -> list[dict[str, Any]]:
        return [run for job in jobs if (run := result(job)) is not None]


WHAT = (
    "Held-out NMSE on documents by which nothing was chosen; mean and half the range over seeds. At equal tokens, "
    "features, k and batch, on the same stored activations. Each has the best of four or five learning rates on other "
    "held-out documents, except for ours without a rate in their name. Rows with more steps have as many as the "
    "processor time of decode-clt allows, on more text, and one seed; there a step's seconds include the language "
    "model's pass, which is charged to neither."
)

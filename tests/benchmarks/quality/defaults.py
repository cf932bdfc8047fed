"""Defaults: grids around them, one seed for each value; then all seeds of the default and of what is best.

What is best is that of the least NMSE on the set `choose`; the figures that are told of it are of the set `report`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import attrs

from clt_plugins.contract.recipe import TrainConfig
from clt_plugins.training.optimizers.rate import with_rate
from tests.benchmarks.quality import tables
from tests.benchmarks.quality.lot import Lot, result
from tests.benchmarks.quality.one import Job
from tests.benchmarks.quality.recipes import Recipe
from tests.benchmarks.quality.setups import Setup

FACTORS = (0.5, 1.0, 1.41, 2.0)
"""Learning rates over 0.25 / sqrt(features of all layers); 1 only where it is not the default."""
BATCHES = (256, 512, 1024, 2048, 4096)
LONGER = {4: (0.25, 0.5, 1.0, 2.0), 16: (0.125, 0.25, 0.5, 1.0)}
"""Factors where a run has so many times the tokens: what suits a short run need not suit a longer one."""
DEAD = 0.02
"""The largest share of features never active with which a value can be the best."""


def _rate(factor: float, features: int) -> float:
    digits = 2 if factor == 1 else 3  # two are the default's
    return float(f"{factor * 0.25 * features**-0.5:.{digits}g}")


def grids(setup: Setup) -> dict[str, dict[str, dict[str, Any]]]:
    """Grid -> value -> changes of the base recipe; {} is the default itself. Two are no tables: `warmup` is the share
    of the steps, and `times` how many times the setup's tokens there are."""

    def rates(train: dict[str, Any], features: int | None = None, times: int = 1) -> dict[str, dict[str, Any]]:
        size: dict[str, Any] = {} if features is None else {"transcoder": {"features": features}}
        if times > 1:
            size |= {"times": times, **setup.stream(), "data_seed": 0}
        of_all = (features or setup.features) * setup.n_layers
        batch = train.get("batch_tokens", setup.batch)
        default = with_rate(TrainConfig(steps=setup.tokens * times // batch), of_all).lr
        found = {f"lr × {factor:g}": _rate(factor, of_all) for factor in LONGER.get(times, FACTORS)}
        return {"default": {**size, "train": train}} | {
            name: {**size, "train": {**train, "lr": lr}} for name, lr in found.items() if lr != default
        }

    def base(**changes: Any) -> dict[str, dict[str, Any]]:
        return {"default": {}} | changes

    def k(number: int) -> dict[str, Any]:
        return {"activation": {"k": number}}

    auxk = {
        f"k {share:g} × d_model": {
            "losses": [{"name": "mse"}, {"name": "auxk", "k": max(1, round(share * setup.d_model))}]
        }
        for share in (0.25, 1.0, 2.0)
    }
    auxk["no pull"] = {"losses": [{"name": "mse"}, {"name": "auxk", "pull": 0.0}]}
    return {
        **{f"batch {batch:,}": rates({"batch_tokens": batch}) for batch in BATCHES},
        **{
            f"batch {batch:,}, {times} times the tokens": rates({"batch_tokens": batch}, times=times)
            for batch, times in setup.longer
        },
        **{
            f"{features:,} features": rates({"batch_tokens": setup.batch}, features)
            for features in (setup.features // 2, setup.features * 2)
        },
        **{
            f"k {number}": {name: {**value, **k(number)} for name, value in rates({}).items()}
            for number in (setup.k // 2, setup.k * 2)
        },
        "auxk": base(**auxk),
        "betas": base(**{"0.9 and 0.999": {"optimizer": {"name": "adam", "betas": [0.9, 0.999]}}}),
        "warm-up": base(**{f"{share:g} of the steps": {"warmup": share} for share in (0.0, 0.05, 0.2)}),
        "annealing": base(
            **{
                f"from {start:g} k over {over:g}": {"activation": {"anneal_from": start, "anneal_over": over}}
                for start, over in ((1.0, 0.8), (2.0, 0.8), (5.0, 0.8), (3.0, 0.5), (3.0, 1.0))
            }
        ),
    }


@attrs.frozen
class Grids:
    """The lot `defaults`."""

    lot: Lot
    setups: Sequence[Setup]
    seeds: Sequence[int]
    only: Collection[str]
    """Grids by name."""

    def jobs(self) -> list[Job]:
        jobs = [self._job(*value, self.seeds[0]) for value in self._values()]
        for setup in self.setups:
            for grid in self._grids(setup):
                best = self._best(setup, grid)
                names = {"default"} | ({best} if best else set())
                jobs += [self._job(setup, grid, name, seed) for name in sorted(names) for seed in self.seeds[1:]]
        return jobs

    def write(self) -> Path:
        figures = ["nmse_choose", "nmse_report", "dead_fraction_report"]
        rows, raw = [], []
        for setup in self.setups:
            for grid, values in self._grids(setup).items():
                found = {name: self._results(setup, grid, name) for name in values}
                raw += [run for runs in found.values() for run in runs]
                best = self._best(setup, grid)
                for name, runs in found.items():
                    if runs:
                        mark = f"**{name}**" if name == best else name
                        over = tables.ratio(runs, found["default"])
                        rate = f"{runs[0]['lr']:.2g}"
                        rows.append([setup.about, grid, mark, rate, str(len(runs)), *tables.cells(runs, figures), over])
        self._write_rates()
        columns = ["model", "with", "value", "lr", "seeds", "NMSE, choose", "NMSE", "dead", "NMSE over the default's"]
        once = {(run["setup"], run["recipe"], run["seed"]): run for run in raw}  # the default is in several grids
        return tables.write("defaults", WHAT, COMMAND, columns, rows, once.values())

    def _write_rates(self) -> None:
        """Of the same runs those of other batches and lengths: a row for each, a column for each rate."""
        factors = sorted({*FACTORS, *(factor for some in LONGER.values() for factor in some)})
        names = {f"lr × {factor:g}": f"× {factor:g}" for factor in factors}
        rows: list[list[str]] = []
        raw: list[dict[str, Any]] = []
        for setup in self.setups:
            usual = _rate(1.0, setup.features * setup.n_layers)
            for grid in (grid for grid in self._grids(setup) if grid.startswith("batch")):
                cells = dict.fromkeys([*names.values(), "the default"], "")
                runs = {name: result(self._job(setup, grid, name, self.seeds[0])) for name in grids(setup)[grid]}
                there = {name: run for name, run in runs.items() if run is not None}
                for name, run in there.items():
                    told = f"{run['nmse_choose']:.3f}, {run['dead_fraction_choose']:.1%}"
                    if name != "default":
                        cells[names[name]] = told
                    elif run["lr"] == usual:
                        cells |= {"× 1": told, "the default": "× 1"}
                    else:
                        cells["the default"] = f"× {run['lr'] / usual:.2g}: {told}"
                    steps = f"{run['steps']:,} × {run['batch']:,}"
                if there:
                    rows.append([setup.about, steps, *cells.values()])
                    raw += there.values()
        columns = ["model", "steps × batch", *names.values(), "the default"]
        tables.write("learning-rates", RATES, COMMAND, columns, rows, raw)

    # -- which runs ------------------------------------------------------------------------------------------------

    def _grids(self, setup: Setup) -> dict[str, dict[str, dict[str, Any]]]:
        return {name: values for name, values in grids(setup).items() if not self.only or name in self.only}

    def _values(self) -> list[tuple[Setup, str, str]]:
        return [
            (setup, grid, name)
            for setup in self.setups
            for grid, values in self._grids(setup).items()
            for name in values
        ]

    def _job(self, setup: Setup, grid: str, name: str, seed: int) -> Job:
        changes = dict(grids(setup)[grid][name])
        share = changes.pop("warmup", None)
        if share is not None:
            steps = setup.tokens // setup.batch
            changes["schedule"] = {"name": "linear", "warmup_steps": round(share * steps)}
        times = changes.pop("times", 1)
        tables_ = Recipe("", lambda _: changes, times).tables(setup, seed)
        if share == 0.0:
            tables_["schedule"]["warmup_steps"] = 0
        # The table shows nothing of the language model, so its figures are not measured.
        return self.lot.job(attrs.evolve(setup, model_tokens=0), f"{grid}: {name}", seed, tables_)

    def _results(self, setup: Setup, grid: str, name: str) -> list[dict[str, Any]]:
        jobs = [self._job(setup, grid, name, seed) for seed in self.seeds]
        return [figures for job in jobs if (figures := result(job)) is not None]

    def _best(self, setup: Setup, grid: str) -> str | None:
        """The value with the least NMSE on `choose` among those with few dead features, by the first seed; None while
        one of them is missing."""
        found: dict[str, dict[str, Any]] = {}
        for name in grids(setup)[grid]:
            figures = result(self._job(setup, grid, name, self.seeds[0]))
            if figures is None:
                return None
            found[name] = figures
        alive = {name: run for name, run in found.items() if run["dead_fraction_choose"] <= DEAD} or found
        return min(alive, key=lambda name: alive[name]["nmse_choose"])


COMMAND = "python -m tests.benchmarks.quality defaults --folder FOLDER --model SmolLM2-135M.gguf --write"
RATES = (
    "Learning rates as multiples of 0.25 / √(features of all layers): held-out NMSE and the share of dead features on "
    "the set that chooses, first seed. Rows with more tokens are of the grids with a number of times in their name."
)
WHAT = (
    "Grids around the defaults at equal tokens, but for those that say how many times as many they have. The best "
    "value of each grid (bold) has the least NMSE on one held-out set among those with at most 2 % dead features "
    "there; NMSE without a name is of the other set, whose documents chose nothing. Mean and half the range over seeds."
)

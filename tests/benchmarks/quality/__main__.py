"""How good transcoders are: recipes compared, defaults, and decode-clt beside this project, on real activations.

    python -m tests.benchmarks.quality ablation --folder runs/quality
    python -m tests.benchmarks.quality --folder runs/quality --model SmolLM2-135M.gguf --peer-python PYTHON --write

Activations of a language model are stored once in the folder. Each run is a process, and its figures are one file in
`results/`; a lot that is started again does what is missing, and with --take what the written tables have is not
missing. Lots:

- `ablation`: the recipes of `recipes`, at equal tokens.
- `defaults`: learning rates by batch, tokens, features and k; AuxK; betas; warm-up; annealing (`defaults`).
- `peer`: decode-clt's own trainer, at equal tokens and at equal time (`peer`).

Two sets of held-out documents: `choose`, by which settings are chosen, and `report`, on which figures are reported.
Without --model only the shipped model is used; with a GGUF file of SmolLM2-135M its layers 12 to 17 too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from tests.benchmarks.quality import setups
from tests.benchmarks.quality.data import Stored
from tests.benchmarks.quality.defaults import Grids
from tests.benchmarks.quality.earlier import take
from tests.benchmarks.quality.lot import Lot, tell
from tests.benchmarks.quality.one import Job
from tests.benchmarks.quality.peer import Peer
from tests.benchmarks.quality.recipes import Ablation
from tests.benchmarks.quality.setups import Setup


class Plan(Protocol):
    """A lot's runs."""

    def jobs(self) -> list[Job]:
        """All runs that can be named now; results may make others necessary."""

    def write(self) -> Path:
        """Write the results that are there as a table."""


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


def main(arguments: Sequence[str] | None = None, chosen: Sequence[Setup] | None = None) -> int:
    """Do what the command asks for; returns its exit status.

    Args:
        chosen: setups, in place of those that the options name.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lot", nargs="?", choices=sorted(LOTS), help="all of them if not given")
    parser.add_argument("--folder", type=Path, required=True, help="of activations (up to 9 GB) and results")
    parser.add_argument("--model", type=Path, help="a GGUF file of SmolLM2-135M")
    parser.add_argument("--setup", choices=["shipped", "smollm2"], help="only this one")
    parser.add_argument("--peer-python", default="", help="interpreter that has decode-clt 0.0.1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this recipe; may be repeated")
    parser.add_argument("--list", action="store_true", help="only print what is left to run")
    parser.add_argument("--write", action="store_true", help="write tables into examples/measurements")
    parser.add_argument("--take", action="store_true", help="take the runs of the tables that are written as results")
    parser.add_argument("--no-run", action="store_true", help="of the results that are there")
    options = parser.parse_args(arguments)
    if chosen is None:
        chosen = [setups.shipped()] + ([setups.smollm2(options.model)] if options.model else [])
    chosen = [setup for setup in chosen if options.setup in (None, setup.name)]
    if not chosen:
        sys.exit("--setup smollm2 needs --model")
    lot = Lot(options.folder, options.threads, options.jobs, options.peer_python)
    failed = False
    for name in [options.lot] if options.lot else list(LOTS):
        plan = LOTS[name](lot, chosen, range(options.seeds), set(options.only or ()))
        while options.take and (taken := take(plan.jobs())):  # results make other runs necessary
            tell(f"{len(taken)} runs of written tables taken")
        if options.list:
            for job in lot.missing(plan.jobs()):
                print(job.key)
            continue
        if not options.no_run:
            for setup in chosen:
                Stored(setup, options.folder).prepare()
            failed |= bool(do(plan, lot))
        if options.write:
            tell(f"wrote {plan.write()}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

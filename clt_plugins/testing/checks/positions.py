"""More checks for `[source]`: a position means the same on every rank, with other ranks, and in other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from typing import Any
from unittest import SkipTest

from clt_plugins.contract.reading.source import Identified
from clt_plugins.errors import Refused
from clt_plugins.testing.bench import TOKENS, Bench
from clt_plugins.testing.checks.source import opened, rows
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import complain, expect, same

CHAIN = ((2, 1), (1, 2), (4, 1), (2, 1), (1, 0), (4, 2), (1, 1))
"""Data ranks, and the batches that they read before others go on."""
LIMIT = 32
"""So many batches are read to find the end of an epoch."""
PROCESS_BATCHES = 3


@check("source")
def epochs(bench: Bench) -> None:
    """Every batch up to the end of the data, and the one after it, has exactly the tokens of `train.batch_tokens`; a
    source that ends says so by `Refused`."""
    with opened(bench) as source:
        seen: set[Any] = set()
        for number in range(LIMIT):
            try:
                batch = source.next()
            except Refused as refused:
                raise SkipTest(f"it ends: {refused}") from refused
            except StopIteration:
                complain(f"batch {number}", "StopIteration", "`next`: a stream is endless, or `Refused` says where")
            expect(
                batch is not None and batch.tokens == TOKENS,
                f"batch {number} of {TOKENS} tokens",
                "none" if batch is None else f"{batch.tokens}",
                "`next`: a rest at the end of the data joins the first rows of the next epoch",
            )
            new = rows(batch)
            if seen & set(new):
                return  # the next epoch has begun
            seen |= set(new)


def _epoch(bench: Bench) -> set[Any]:
    """The rows of one epoch, or of the first `LIMIT` batches of a longer one."""
    seen: dict[Any, None] = {}
    with opened(bench) as source:
        for _ in range(LIMIT):
            try:
                new = rows(source.next())
            except Refused:
                break
            for row in new:
                if row in seen:
                    return set(seen)
                seen[row] = None
    return set(seen)


@check("source", needs=("resume", "exactly_once", "ranks"))
def other_ranks(bench: Bench) -> None:
    """A state that some data ranks saved continues with more or fewer of them: every row of an epoch comes once, or
    `load_state` refuses. The state is the same on each rank."""
    epoch, seen = _epoch(bench), set[Any]()
    look = "`state` and `load_state`: count the rows of all ranks; `clt_plugins.Deal` knows what is left of a group"
    with ExitStack() as stack:
        built: dict[int, list[Any]] = {}
        state = None
        for ranks, batches in (*CHAIN, (1, 4 * LIMIT)):
            if ranks not in built:
                built[ranks] = [stack.enter_context(opened(bench, rank, ranks)) for rank in range(ranks)]
            sources = built[ranks]
            if state is not None:
                try:
                    for source in sources:
                        source.load_state(json.loads(state))
                except Refused as refused:
                    raise SkipTest(f"it is refused: {refused}") from refused
            for _ in range(batches):
                try:
                    new = [row for source in sources for row in rows(source.next())]
                except Refused:
                    new = []  # the data have ended
                again = len(new) - len(set(new) - seen)
                seen |= set(new)
                if epoch <= seen:
                    return
                missing = f"{len(epoch - seen)} of {len(epoch)} rows have not come"
                expect(new, "every row of an epoch", f"the source ends, but {missing}", look)
                expect(not again, "no row twice before all rows came once", f"{again} came again; {missing}", look)
            states = [json.dumps(source.state(), sort_keys=True) for source in sources]
            expect(len(set(states)) == 1, "the same state on every data rank", " and ".join(states)[:300], look)
            state = states[0]
    complain(
        f"every row of an epoch within {4 * LIMIT} batches",
        f"{len(epoch - seen)} of {len(epoch)} rows have not come",
        f"{look}. If more rows are shuffled together, make that fewer by `settings`",
    )


@check("source", needs=("determinism",))
def other_process(bench: Bench) -> None:
    """Another process gives the same batches and states, and the same `identity`, whatever `hash` says there."""
    job = {
        "module": bench.module,
        "choice": bench.choice,
        "settings": dict(bench.settings),
        "tables": dict(bench.tables),
        "folder": str(bench.folder),
        "batches": PROCESS_BATCHES,
    }
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-m", "clt_plugins.testing.processes.source_reader", json.dumps(job)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": seed},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        complain("a process that reads the source", last, "`build`: does it depend on this process?")
    import torch

    other = torch.load(bench.folder / "rows.pt")
    said = json.loads((bench.folder / "said.json").read_text(encoding="utf-8"))
    look = "what differs between processes: `hash` of text (use `clt_plugins.generator`), unsorted files, `id`, time"
    with opened(bench) as source:
        for number in range(PROCESS_BATCHES):
            batch = source.next()
            for name in ("inputs", "targets"):
                # Another number of threads may add up in another order.
                same(other[number][name], getattr(batch, name), f"{name} of batch {number} elsewhere", look, 1e-4)
        state = json.loads(json.dumps(source.state()))
        expect(said["state"] == state, f"the state {state}"[:300], f"{said['state']}"[:300], look)
        if isinstance(source, Identified):
            identity = dict(source.identity())
            text = all(isinstance(each, str) and each for pair in identity.items() for each in pair)
            expect(identity and text, "an identity of texts by setting", repr(identity), "`identity`")
            expect(said["identity"] == identity, f"the identity {identity}", f"{said['identity']}", look)

"""Two ranks of one run: one dies, hangs, or cannot write; the other one must end, and the run must go on as before."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from typing import Any

from clt_plugins.errors import ExitCode
from clt_plugins.testing.processes.ports import free_port
from tests.faults import oracle
from tests.faults.bench import Bench
from tests.faults.folders import RUN
from tests.faults.forking import Ended
from tests.faults.inject import COUNT, INJECTIONS, MUTATING, calls
from tests.faults.tries import Result, Try

TIMEOUT_S = 8
"""How long ranks wait for another one."""
LONG_S = 90.0
SETTINGS = ("--set", "parallel.name=tensor", "--set", f"parallel.timeout_s={TIMEOUT_S}")
MOMENTS = {"killed at a random moment": signal.SIGKILL, "hangs at a random moment": signal.SIGSTOP}
AT_CALLS = ("killed before a call", "one call fails (EIO)", "disk full from one call on (ENOSPC)")
COMMAND = "run on two ranks"


def pairs() -> list[tuple[str, str]]:
    return [(f"one rank: {fault}", COMMAND) for fault in (*MOMENTS, *AT_CALLS)]


def details(bench: Bench, fault: str, command: str, draw: random.Random) -> Iterator[str]:
    """The rank, and a seed or the number of a call."""
    while bench.library is not None:
        yield f"{draw.randrange(2)} {draw.randrange(10**6)}"


def attempt(bench: Bench, one: Try) -> Result:
    """Run two ranks, let something happen to one, judge both, go on and compare."""
    if "ranks" not in bench.cache:
        bench.cache["ranks"] = _unbroken(bench)
    unbroken, numbers, seconds = bench.cache["ranks"]
    fault = one.fault.removeprefix("one rank: ")
    rank, seed = map(int, one.detail.split())
    draw = random.Random(seed)
    slot = bench.fresh("new")
    options: dict[int, dict[str, Any]] = {}
    if fault in INJECTIONS:
        injection = INJECTIONS[fault]
        at = draw.randint(1, max(1, numbers[rank]))
        options[rank] = {"fault": {"mode": injection.mode, "at": at, "number": injection.number, "kinds": MUTATING}}
        options[rank]["record"] = str(bench.record)
        bench.record.unlink(missing_ok=True)
    children = _start(bench, RUN, options)
    if fault in MOMENTS:
        time.sleep(draw.uniform(0, seconds))
        bench.zygote.signal(children[rank], MOMENTS[fault])
    ended = _wait(bench, children, stopped=rank if fault == "hangs at a random moment" else None)
    faults: list[str] = []
    for number, each in enumerate(ended):
        if number != rank:
            faults += oracle.ending(each, {ExitCode.OK, ExitCode.FAILED, ExitCode.USAGE})
            faults += [line for line in oracle.message(each, "", ()) if "stack" in line]
    faults += oracle.damaged(slot, ("r",))
    faults += _go_on(bench, unbroken)
    return Result(faults=faults, where=f"rank {rank}", ended=ended[1 - rank])


def _unbroken(bench: Bench) -> tuple[dict[str, str], list[int], float]:
    """What two ranks make, how many calls each makes, and how long it takes."""
    bench.unbroken("run")
    bench.fresh("new")
    records = [bench.outside / f"record-{rank}" for rank in range(2)]
    started = time.monotonic()
    counted = {rank: {"fault": {"mode": COUNT}, "record": str(records[rank])} for rank in range(2)}
    ended = _wait(bench, _start(bench, RUN, counted))
    assert [one.code for one in ended] == [0, 0], ended
    numbers = [len(calls(record)) for record in records]
    return oracle.content(bench.slot, ("r",)), numbers, time.monotonic() - started


def _go_on(bench: Bench, unbroken: dict[str, str]) -> list[str]:
    said = []
    for arguments in (RUN, (*RUN, "--resume")):
        ended = _wait(bench, _start(bench, arguments, {}))
        if [one.code for one in ended] == [0, 0]:
            break
        said.append(f"exits {[one.code for one in ended]}: {oracle.last(ended[0].said)}")
    faults = oracle.differences(oracle.content(bench.slot, ("r",)), unbroken)
    if faults and len(said) == 2:
        return [f"cannot go on: {said}", *faults[:3]]
    return [f"after going on: {line}" for line in faults]


def _start(bench: Bench, arguments: tuple[str, ...], options: dict[int, dict[str, Any]]) -> list[int]:
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        bench.zygote.start(
            [*arguments, *SETTINGS],
            bench.slot,
            environment={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **options.get(rank, {}),
        )
        for rank in range(2)
    ]


def _wait(bench: Bench, children: list[int], stopped: int | None = None) -> list[Ended]:
    """Wait for the ranks; one that was stopped is killed when the other one has ended."""
    ended: dict[int, Ended] = {}
    for rank in sorted(range(2), key=lambda rank: rank == stopped):
        if rank == stopped:
            bench.zygote.signal(children[rank], signal.SIGKILL)
        ended[rank] = bench.zygote.wait(children[rank], LONG_S)
    return [ended[rank] for rank in range(2)]

"""Processes for the ranks of one world size. They stay for the next call. `rank` is their side.

A `[parallel]` choice joins them exactly like those that `torchrun` starts: by RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from clt_plugins.testing.bench import Bench
from clt_plugins.testing.processes.ports import free_port
from clt_plugins.testing.processes.rank import Subject, call, start
from clt_plugins.testing.report import complain

RANKS = (2, 3)
"""The world sizes that the checks try."""
TIMEOUT_S = 240
"""Of one call: ranks that need longer wait for each other."""
START = "spawn"
"""How a process starts (see `multiprocessing`): with imports and a hash of text of its own, as `torchrun` starts it."""
GRACE_S = 1
"""How long the answers of other ranks are awaited after one failed."""


class Ranks:
    """One process for each rank."""

    def __init__(self, world: int):
        context = multiprocessing.get_context(START)
        self.executors = [ProcessPoolExecutor(1, context, start, (rank, world)) for rank in range(world)]
        self.pids = [executor.submit(os.getpid) for executor in self.executors]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank.

        Raises:
            Nonconformance: of the first rank that failed; or one died, or they wait for each other. All processes are
                killed then: a rank that failed may still be in a process group, and others may wait for it.
        """
        futures = [executor.submit(function, *arguments) for executor in self.executors]
        try:
            return self._results(futures)
        except BaseException:
            self.kill()
            raise

    def _results(self, futures: list[Future[Any]]) -> list[Any]:
        expected = f"the step to run on {len(futures)} ranks"
        try:
            failed = next((future for future in as_completed(futures, TIMEOUT_S) if future.exception()), None)
        except TimeoutError:
            waiting = [rank for rank, future in enumerate(futures) if not future.done()]
            got = f"ranks {waiting} did not answer in {TIMEOUT_S} s"
            complain(expected, got, "collectives that only some ranks call")
        if failed is None:
            return [future.result() for future in futures]
        # Another rank may notice a death before this process does, as a lost connection: the death is told.
        done, _ = wait(futures, GRACE_S)
        if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
            look = 'does the plugin end the process? A script needs `if __name__ == "__main__":` around its cases'
            complain(expected, "the process of a rank died", look)
        return failed.result()

    def kill(self) -> None:
        """End the processes at once, whatever they do."""
        numbers = {pid.result() for pid in self.pids if pid.done() and not pid.exception()}
        # Of living children only: the number of a dead process may belong to another by now.
        for child in multiprocessing.active_children():
            if child.pid in numbers:
                child.kill()
        for executor in self.executors:
            executor.shutdown(wait=False, cancel_futures=True)
        _started.pop(len(self.executors), None)


_started: dict[int, Ranks] = {}
"""World size -> its processes; they end with this one."""


def on_ranks(bench: Bench, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(bench, *arguments)` returns on each of so many ranks.

    Args:
        function: one of a module, so that other processes can import it.

    Raises:
        Nonconformance: see `Ranks.run`.
    """
    if world not in _started:
        _started[world] = Ranks(world)
    subject = Subject(
        slot=bench.slot,
        choice=bench.choice,
        settings=dict(bench.settings),
        tables=dict(bench.tables),
        module=bench.module,
        path=list(sys.path),
        port=free_port(),
    )
    return _started[world].run(call, function, subject, arguments)

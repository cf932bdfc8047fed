"""Ranks of the kit that fail, die or wait for each other: told as a fault of the plugin, and the next case runs."""

from __future__ import annotations

import multiprocessing
import time
from typing import TYPE_CHECKING, Any

import pytest

from clt_plugins.registry.plugins import load_plugins
from clt_plugins.testing import Nonconformance, cases
from clt_plugins.testing.processes import pool
from tests.support.faulty import HEADER, LOSS

if TYPE_CHECKING:
    from tests.conftest import Distributions

ON_RANK_1 = """
import os

class Loss:
    needs_pre = False

    def selection(self, tokens, idle_tokens):
        return None

    def __call__(self, forward):
        if os.environ.get("RANK") == "1":
            FAULT
        return {"mine": forward.sum_features(forward.features.values.square().sum()) / forward.features.shape[0]}
"""


@pytest.fixture
def tensor_parallel(distributions: Distributions, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the check `tensor_parallel` on a loss that does something on rank 1."""
    if "tensor" not in load_plugins().choices("parallel"):
        pytest.skip("no choice 'tensor' for [parallel] is installed")
    # Killed processes are replaced in no time by forks of one that has imported torch.
    multiprocessing.set_forkserver_preload(
        ["clt_plugins.testing.checks.tensor_parallel", "clt_parallel.grid", "clt_kernels.cpu.kernels"]
    )
    monkeypatch.setattr(pool, "START", "forkserver")

    def run(fault: str) -> None:
        distributions.forget("plugin_under_test")
        source = HEADER + ON_RANK_1.replace("FAULT", fault) + LOSS[LOSS.index("@hookimpl") :]
        distributions.module("plugin_under_test", source)
        (case,) = (case for case in cases("plugin_under_test") if case.check == "tensor_parallel")
        case.run()

    return run


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("1 / 0", "got: rank 1: ZeroDivisionError: division by zero"),
        ("[].index(1)", "look at: .*plugin_under_test.py:[0-9]+ in __call__"),
        ("os._exit(3)", "got: the process of a rank died"),
        ("raise SystemExit(3)", "got: rank 1: SystemExit: 3"),
    ],
)
def test_a_rank_that_fails_or_dies_is_told_at_once_and_the_next_case_runs(
    tensor_parallel: Any, fault: str, text: str
) -> None:
    # The other rank waits in a collective: without a kill this would take minutes.
    began = time.monotonic()
    with pytest.raises(Nonconformance, match=text):
        tensor_parallel(fault)
    assert time.monotonic() - began < 120
    tensor_parallel("pass")


def test_ranks_that_wait_for_each_other_are_killed(tensor_parallel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_parallel("pass")  # the processes are there
    processes = [pid.result() for pid in pool._started[2].pids]
    with monkeypatch.context() as patched:
        patched.setattr(pool, "TIMEOUT_S", 1)
        with pytest.raises(Nonconformance, match=r"ranks \[0, 1\] did not answer in 1 s"):
            tensor_parallel("import time; time.sleep(300)")
    assert 2 not in pool._started
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in processes)
    tensor_parallel("pass")


def _alive(pid: int) -> bool:
    """Whether a process runs: neither gone nor a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:  # noqa: PTH123
            return file.read().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False

"""Which errors of a collective mean that another rank is lost, and which do not."""

from __future__ import annotations

import ast
import socket
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clt_parallel import TensorConfig
from clt_parallel.connect import connect
from clt_parallel.grid import Grid
from tests.support.commands import on_ranks

LOST = [
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"),
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 600000ms"),
    RuntimeError("Application timeout caused pair closure"),
    dist.DistBackendError("NCCL communicator was aborted on rank 1."),
    dist.DistNetworkError("The client socket has timed out"),
]
OTHERS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("No backend type associated with device type mps"),
]


class Waits:
    """A collective that was started, and fails when it is awaited."""

    def __init__(self, error: Exception):
        self.error = error

    def wait(self) -> None:
        raise self.error


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, *, at_start: bool) -> Grid:
    """Rank 0 of 2, whose collectives of tensors fail."""

    def collective(*_: Any, **__: Any) -> Waits:
        if at_start:
            raise error
        return Waits(error)

    monkeypatch.setattr(dist, "all_reduce", collective)
    monkeypatch.setattr("clt_parallel.grid.REDUCE_SCATTER", collective)
    monkeypatch.setattr("clt_parallel.grid.ALL_GATHER", collective)
    return Grid(0, 2, 1, dict.fromkeys(("features", "tokens", "all"), object()))


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize("error", LOST, ids=str)
def test_an_error_of_the_process_group_says_that_a_rank_is_lost_and_how_to_continue(monkeypatch, error, at_start):
    grid = failing(monkeypatch, error, at_start=at_start)
    with pytest.raises(ConnectionError, match=r"rank 0: another of the 2 ranks died or hangs .*with --resume"):
        grid.total(torch.ones(3))
    with pytest.raises(ConnectionError, match="another of the 2 ranks"):
        grid.sum_features(torch.ones(3))
    with pytest.raises(ConnectionError, match="another of the 2 ranks"):
        grid.sum_share_later(torch.ones(4))()
    with pytest.raises(ConnectionError, match="another of the 2 ranks"):
        grid.join_shares(torch.ones(2))


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_any_other_error_keeps_its_own_text(monkeypatch, error, at_start):
    grid = failing(monkeypatch, error, at_start=at_start)
    with pytest.raises(type(error)) as raised:
        grid.total(torch.ones(3))
    assert raised.value is error


def test_a_first_rank_that_hangs_while_others_connect_is_given_up(monkeypatch):
    # The system takes connections for a process that is stopped: torch waits for its answer without an end.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1])}
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", **address}.items():
            monkeypatch.setenv(name, value)
        begin = time.monotonic()
        with pytest.raises(ConnectionError, match=r"rank 1 of 2 cannot connect .*: one of them hangs"):
            connect(TensorConfig(timeout_s=1.0), torch.device("cpu"))
        assert 2.9 < time.monotonic() - begin < 30


GROUPS = """
import torch
from clt_parallel import TensorConfig
from clt_parallel.connect import connect

cpu = torch.device("cpu")
grid = connect(TensorConfig(tensor=2, data=2, timeout_s=77.0), cpu)
grid.barrier()
print({name: group._get_backend(cpu).options._timeout.total_seconds() for name, group in grid.groups.items()})
print([float(grid.total(torch.tensor(float(grid.rank)), over)) for over in ("features", "tokens", "all")])
grid.close()
"""


def test_all_groups_have_the_time_that_the_recipe_gives_and_waiting_has_no_end():
    """With ranks of both kinds, those of a step had torch's own 30 minutes."""
    sums = [[1.0, 2.0, 6.0], [1.0, 4.0, 6.0], [5.0, 2.0, 6.0], [5.0, 4.0, 6.0]]
    for done, expected in zip(on_ranks(4, "-c", GROUPS), sums, strict=True):
        assert done.returncode == 0, done.stderr[-2000:]
        times, totals = map(ast.literal_eval, done.stdout.splitlines())
        assert times.pop("waiting") > 24 * 3600
        assert times == dict.fromkeys(("features", "tokens", "all", "rows"), 77.0)
        assert totals == expected

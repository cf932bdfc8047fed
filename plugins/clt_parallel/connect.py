"""Joins the process group that `torchrun` prepared."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from clt_parallel.grid import Grid
from clt_plugins import Refused

if TYPE_CHECKING:
    from clt_parallel import TensorConfig

T = TypeVar("T")

PATIENCE = 3
"""How many times `timeout_s` connecting may take. Torch gives each step that time, but waits for ever for the answer of
a store whose process hangs (torch 2.13, `TCPStore`); and it waits where no signal is heard."""
WAITING = timedelta(days=30)
"""How long ranks wait for what one of them does alone, such as an export: as long as it takes."""
START = "torchrun --nproc-per-node {} -m clt_plugins run ..."


def connect(config: TensorConfig, device: torch.device) -> Grid:
    """The ranks of this run, data × tensor. For the device "meta" nothing is connected: it is rank 0 of a plan.

    Raises:
        Refused: there is no process group to join, it is of another size, or its backend does not fit the device.
        ConnectionError: the ranks cannot reach each other.
    """
    if device.type == "meta":
        return Grid(0, config.tensor or 1, config.data, splits_tokens=config.backend != "gloo")
    if "RANK" not in os.environ:
        number = (config.tensor or 1) * config.data if config.tensor else "N"
        raise Refused("parallel", f'"tensor" needs several processes: start them by `{START.format(number)}`')
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    tensor = config.tensor or max(1, world // config.data)
    if tensor * config.data != world:
        raise Refused(
            "parallel",
            f"tensor {tensor} × data {config.data} is {tensor * config.data} ranks, but {world} were "
            f"started: start {tensor * config.data}, or change parallel.tensor or parallel.data",
        )
    backend = config.backend if config.backend != "auto" else "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise Refused("parallel.backend", f'"nccl" is for GPUs, and transcoder.device is {device}: use "gloo"')
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if backend == "nccl" and device.index != local and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise Refused("transcoder.device", f'local rank {local} cannot use {device}: use "auto", a GPU for each rank')
    # What ranks agree on in each step (no failure, same batch) is on the CPU and always goes through gloo.
    backends = f"cpu:gloo,{device.type}:{backend}" if device.type != "cpu" else backend
    try:
        groups = _within(PATIENCE * config.timeout_s, lambda: _groups(config, device, backends, world, tensor))
    except (RuntimeError, dist.DistError, TimeoutError) as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"parallel: rank {rank} of {world} cannot connect to the others: {reason}") from error
    if tensor > 1:
        groups["rows"] = groups["rows"][rank // tensor]
    return Grid(rank, tensor, config.data, groups, splits_tokens=backend == "nccl")


def _groups(config: TensorConfig, device: torch.device, backends: str, world: int, tensor: int) -> dict[str, Any]:
    """The process groups over "features", "tokens" and "all" ranks; "rows": those of all groups of tensor ranks;
    "waiting": of all ranks, for what one of them does alone."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # that of a thread is its own
    timeout = timedelta(seconds=config.timeout_s)
    dist.init_process_group(backends, timeout=timeout)
    rank = dist.get_rank()

    def split(several: list[range]) -> list[Any]:
        """A group of each of these ranks; every rank makes all groups. Torch's own default of a timeout is another."""
        whole = len(several) == 1
        return [dist.group.WORLD if whole else dist.new_group(list(one), timeout=timeout) for one in several]

    rows = [range(first, first + tensor) for first in range(0, world, tensor)]
    groups: dict[str, Any] = {
        "features": split(rows)[rank // tensor],
        "tokens": split([range(first, world, tensor) for first in range(tensor)])[rank % tensor],
        "all": dist.group.WORLD,
        # A rank that dies closes its connection, so this ends at once also where the time is not up.
        "waiting": dist.new_group(backend="gloo", timeout=WAITING),
    }
    if tensor > 1:
        # Rows of a source travel beside a step: in the group of its sums they would wait for each other.
        groups["rows"] = [dist.new_group(list(one), timeout=timeout) for one in rows]
    return groups


def _within(seconds: float, function: Callable[[], T]) -> T:
    """What a function returns, in a thread of its own that is left alone if it takes longer.

    Raises:
        TimeoutError: it takes longer.
    """
    result: Future[T] = Future()

    def work() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, name="connect", daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError as error:
        if result.done():
            raise
        raise TimeoutError(f"one of them hangs, nothing was heard for {seconds:g} s") from error

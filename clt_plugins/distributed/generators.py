"""The states of torch's own generators, of all ranks. The engine draws from keyed ones; these are for plugins that
draw from torch's.

With another number of ranks, rank r goes on with the state that rank r modulo the old number had. On another kind of
device, its generator begins anew from the recipe's seed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clt_plugins.contract.model.parallel import Parallel

CPU, DEVICE = "torch_rng", "device_rng"
"""Names of the tensors: a row of bytes for each rank, or one row where all are the same."""


def generator_states(parallel: Parallel, device: torch.device) -> dict[str, Tensor]:
    """The states of all ranks, [world, bytes], or [1, bytes] where all are the same; all ranks call it.

    Args:
        device: where the transcoder lives; the CPU has one generator only.
    """
    states = {CPU: torch.get_rng_state()}
    if device.type != "cpu":
        states[DEVICE] = torch.get_device_module(device).get_rng_state(*_which(device))
    out = {}
    for name, state in states.items():
        by_rank = parallel.gather(bytes(state.tolist()).hex())
        if len(set(by_rank)) == 1:
            by_rank = by_rank[:1]  # no plugin draws, or all ranks alike
        out[name] = torch.stack([torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8) for text in by_rank])
    return out


def set_generators(states: dict[str, Tensor], parallel: Parallel, device: torch.device) -> None:
    """Put this rank's generators into saved states."""
    torch.set_rng_state(_own(states[CPU], parallel))
    if device.type != "cpu" and DEVICE in states:
        module, state = torch.get_device_module(device), _own(states[DEVICE], parallel)
        if module.get_rng_state(*_which(device)).shape == state.shape:  # another kind of device has another one
            module.set_rng_state(state, *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """How torch is told which device: of some kinds there is only one."""
    return () if device.type == "mps" else (device,)


def _own(by_rank: Tensor, parallel: Parallel) -> Tensor:
    # A copy with memory of its own: torch crashes on a state that is a view into other memory.
    return by_rank[parallel.rank % len(by_rank)].clone()

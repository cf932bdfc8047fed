"""Torch's own generators, of which there is one for each device: every run of a sweep has states of its own.

The engine draws from keyed generators (`data/random`); these are for plugins that draw from torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Draws:
    """The states of the CPU's generator and the device's."""

    def __init__(self, device: torch.device, states: list[Tensor]):
        self.device, self.states = device, states

    @classmethod
    def now(cls, device: torch.device) -> Draws:
        """As they stand."""
        states = [torch.get_rng_state()]
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        return cls(device, states)

    def set(self) -> None:
        """Go there."""
        torch.set_rng_state(self.states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.states[1], self.device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Draws) and all(map(torch.equal, self.states, other.states))

    def __hash__(self) -> int:
        return id(self)


class Own:
    """The states of one run, which are torch's while the run has its turn.

    Args:
        first: where it begins.
    """

    def __init__(self, first: Draws):
        self.draws = first

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A block in which torch draws for this run."""
        self.draws.set()
        try:
            yield
        finally:
            self.draws = Draws.now(self.draws.device)

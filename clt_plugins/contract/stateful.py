"""The ability of any object of a run to be saved in checkpoints."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Stateful(Protocol):
    """An object of a run that keeps plain data from step to step; a source has both methods by its protocol.

    Tensors need neither: parameters and buffers of a `torch.nn.Module` are saved anyway.
    """

    def state(self) -> Any:
        """What is to be saved in each checkpoint, as plain JSON data; the same on every rank."""

    def load_state(self, state: Any) -> None:
        """Go on from what `state` returned, on any number of ranks."""

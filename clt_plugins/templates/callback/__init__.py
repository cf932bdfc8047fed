"""The callback `example`: an encoder row that has grown beyond a norm is scaled down to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    import torch

    from clt_plugins import Context, Step, Training


@frozen(kw_only=True)
class ExampleConfig:
    """Keep the norms of encoder rows at a number or below it."""

    norm: float = field(default=1.0, validator=validators.gt(0))
    """The number."""
    every: int = field(default=10, validator=validators.gt(0))
    """Steps between projections."""


class Example:
    """A `Callback`. Here it keeps how often it acted; tensors would be buffers of a `torch.nn.Module`."""

    def __init__(self, config: ExampleConfig, context: Context):
        self.norm = config.norm
        self.every = config.every
        self.scaled = 0

    def after(self, run: Training, step: Step) -> None:
        """After each step that `every` divides: new rows, by an operation of `run`."""
        for layer in range(run.context.n_layers):
            rows = run.encoder(layer)
            norms = rows.norm(dim=1)
            long = (norms > self.norm).nonzero().flatten()
            # Features are numbered over all ranks; `rows` are those of this one.
            number = long + run.transcoder.own.start
            run.reinitialise(layer, number, encoder=rows[long] * (self.norm / norms[long])[:, None])
            self.scaled += self._of_all_ranks(run, norms > self.norm)
        run.log({"callbacks/scaled": self.scaled})

    def _of_all_ranks(self, run: Training, mask: torch.Tensor) -> int:
        return int(run.parallel.total(mask.sum()))

    def state(self) -> int:
        """What a checkpoint holds of it, plain data."""
        return self.scaled

    def load_state(self, state: int) -> None:
        """Go on as if never stopped."""
        self.scaled = state


@hookimpl
def clt_callbacks() -> list[Spec]:
    return [Spec("example", ExampleConfig, Example)]

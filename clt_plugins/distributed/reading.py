"""Batches that all ranks read, without a wait in a step: what ranks must know of each other travels while it computes.

In every step each rank says whether it could read and whether it is asked to stop. The exchange begins when the batch
is read, and is awaited when the gradients are under way, before a weight changes. It is between the processes: no rank
waits for its device. A rank that could not read takes part in that step with zeros, so that no other rank waits for it
in vain; then all stop.

Whether ranks that share the tokens read the same is a sum on the device over all batches so far (`fingerprint`). It is
compared where numbers are read anyway: before they are logged, and before a file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_plugins.contract.model.parallel import SumsLater
from clt_plugins.data.batch import Batch
from clt_plugins.distributed.agree import tell
from clt_plugins.errors import ExitCode, Refused, Stopped, WrongReturn

if TYPE_CHECKING:
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.contract.reading.source import Source

ODD = 0x9E3779B1
"""Products with odd numbers lose no bit."""


class Reading:
    """Reads the batches of a run. With one rank nothing is exchanged.

    Args:
        device: where batches go.
    """

    def __init__(self, source: Source, parallel: Parallel, device: torch.device):
        self.source, self.parallel, self.device = source, parallel, device
        self.alone = parallel.world == 1
        self.shape: Batch | None = None
        """The last batch without its numbers."""
        self.error: Exception | None = None
        """Why this rank could not read."""
        self.answer: Callable[[], Tensor] | None = None
        """Waits for the exchange under way: a row for each rank, whether it failed and whether it is asked to stop."""
        self.sums = torch.zeros((), dtype=torch.int64, device=device)
        self.asks = self.asked = False
        """Whether this rank is asked to stop, and whether any is."""

    def next(self, also: Callable[[], None] | None = None) -> Batch:
        """The next batch, on the device. `check` must follow.

        Args:
            also: reads what the step needs besides; other ranks learn of its failure as they do of a batch's.

        Raises:
            Refused: a rank could not read the first batch; raised on rank 0, `Stopped` on the others.
        """
        if self.alone:
            return self._read(also)
        batch = None
        try:
            batch = self._read(also)
        except Exception as error:
            self.error = error
        table = torch.zeros(self.parallel.world, 2, dtype=torch.int64)
        table[self.parallel.rank] = torch.tensor([self.error is not None, self.asks])
        self.answer = _later(self.parallel, table)
        if self.shape is None:
            self.check()  # nobody knows yet what zeros would have to look like
        if batch is None:
            assert self.shape is not None
            return _each(self.shape, lambda x: torch.zeros_like(x, device=self.device))
        self.shape = _each(batch, lambda x: x.to("meta"))
        self.sums = self.sums * ODD + fingerprint(batch)
        return batch

    def _read(self, also: Callable[[], None] | None) -> Batch:
        batch = a_batch(self.source).to(self.device)
        if also is not None:
            also()
        return batch

    def batches(self, count: int) -> Iterator[Batch]:
        """Some batches, checked and compared.

        Raises:
            Refused: see `check` and `compare`.
        """
        for _ in range(count):
            batch = self.next()
            self.check()
            yield batch
        self.compare()

    def check(self) -> None:
        """Wait until all ranks have read.

        Raises:
            Refused: a rank could not; or what else its source raised. Raised on rank 0, `Stopped` on the others.
        """
        if self.answer is None:
            return
        failed, asked = self.answer().bool().any(0).tolist()
        self.answer = None
        if failed:
            tell(self.parallel, self.error)
        self.asked = asked

    def stops(self, asked: bool) -> bool:
        """Whether to stop after this step: the same on all ranks, of which several hear in the next step who was asked.

        Args:
            asked: whether this rank is asked to stop.
        """
        self.asks = asked
        return asked if self.alone else self.asked

    def compare(self) -> None:
        """Whether ranks that share the tokens have read the same. Reads one number from the device.

        Raises:
            Refused: they have not; raised on rank 0, `Stopped` on the others.
        """
        if self.alone:
            return
        table = torch.zeros(self.parallel.world, dtype=torch.int64)
        table[self.parallel.rank] = int(self.sums)
        table = self.parallel.total(table, over="all", what="agreement")
        for data_rank, sums in enumerate(table.view(self.parallel.data_ranks, self.parallel.tensor_ranks)):
            differs = (sums != sums[0]).nonzero().flatten().tolist()
            if differs:
                first = data_rank * self.parallel.tensor_ranks
                text = (
                    f"ranks {first} and {first + differs[0]} share the tokens, but read different batches: their "
                    "data or library versions differ"
                )
                raise Refused("source", text) if self.parallel.rank == 0 else Stopped(ExitCode.USAGE, "")


def a_batch(source: Source) -> Batch:
    """A source's next batch.

    Raises:
        WrongReturn: it returned something else.
    """
    batch: object = source.next()
    if not isinstance(batch, Batch):
        raise WrongReturn(source, f"`next` must return a Batch, {type(source).__name__} returned {batch!r:.200}")
    return batch


def _later(parallel: Parallel, table: Tensor) -> Callable[[], Tensor]:
    """Starts to add up a table of all ranks; calling the result waits for it."""
    if isinstance(parallel, SumsLater):
        return parallel.total_later(table, over="all", what="agreement")
    total = parallel.total(table, over="all", what="agreement")
    return lambda: total


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    tensors = (batch.inputs, batch.targets, batch.token_ids, batch.positions)
    return Batch(*(None if x is None else change(x) for x in tensors))  # type: ignore[arg-type]


def fingerprint(batch: Batch) -> Tensor:
    """A number that changes with any bit of a batch's activations, and with the order of its rows; a scalar int64."""
    out = torch.zeros((), dtype=torch.int64, device=batch.inputs.device)
    for salt, x in enumerate((batch.inputs, batch.targets), start=1):
        # Overflow wraps around, the same on every machine.
        rows = _words(x.detach().flatten(1)).sum(1)
        out = out + (rows * (torch.arange(1, 2 * len(rows), 2, device=x.device) * (2 * salt * ODD + 1))).sum()
    return out


def _words(x: Tensor) -> Tensor:
    """The bits of [B, R] as integers: of eight bytes where rows can be cut into such, so that few are added up."""
    x = x.contiguous()
    if x.shape[1] * x.element_size() % 8:
        return x.view(torch.int16 if x.element_size() == 2 else torch.int32).long()
    return (x.clone() if x.storage_offset() * x.element_size() % 8 else x).view(torch.int64)

"""Ranks in a grid, data × tensor: rank = data_rank · tensor_ranks + tensor_rank.

A reduction of the [B, L, D] that all ranks' features write is all that a step needs besides a few small agreements.
Each rank then has the whole reconstruction, so the loss and its gradient by the reconstruction are whole on every
rank, and the gradients of its own features are complete without another reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clt_plugins import Refused

SMALL = 2**18
"""Gradients of fewer numbers share a bucket."""


class Grid:
    """An `interfaces.Parallel` over `torch.distributed`.

    Args:
        groups: the process groups over "features", "tokens" and "all" ranks; None for a plan, which has no ranks to
            talk to.
    """

    def __init__(self, rank: int, tensor: int, data: int, groups: Mapping[str, Any] | None = None):
        self.rank, self.world = rank, tensor * data
        self.tensor_rank, self.tensor_ranks = rank % tensor, tensor
        self.data_rank, self.data_ranks = rank // tensor, data
        self.batch_rank, self.batch_ranks = self.data_rank, data
        self.groups = groups or {}
        self.sizes = {"features": tensor, "tokens": data, "all": tensor * data}
        self.bytes: dict[str, int] = {}

    def shard(self, n_features: int) -> range:
        """An even cut of F.

        Raises:
            ValueError: there are more ranks than features.
        """
        ranks = self.tensor_ranks
        if n_features < ranks:
            raise Refused("transcoder.features", f"{n_features} cannot be split among {ranks} tensor ranks")
        return range(self.tensor_rank * n_features // ranks, (self.tensor_rank + 1) * n_features // ranks)

    # -- sums ---------------------------------------------------------------------------------------------------

    def sum_features(self, x: Tensor) -> Tensor:
        return self.sum_features_later(x)()

    def sum_features_later(self, x: Tensor) -> Callable[[], Tensor]:
        if self._alone("features"):
            return lambda: x
        whole = x.detach().clone(memory_format=torch.contiguous_format)
        work = self._start(whole, "features", "features")
        return lambda: _Summed.apply(x, self._wait(work, whole))

    def total(self, x: Tensor, over: str = "features", what: str = "metrics") -> Tensor:
        if self._alone(over):
            return x.detach()
        whole = x.detach().clone(memory_format=torch.contiguous_format)
        return self._wait(self._start(whole, over, what), whole)

    def reduce_gradients(self, parameters: list[Any]) -> None:
        """Large gradients in place, small ones in one bucket; all at once, then waited for."""
        partial = [p.grad for p in parameters if p.grad is not None and getattr(p, "partial_gradient", False)]
        self._reduce(partial, "features", 1)
        self._reduce([p.grad for p in parameters if p.grad is not None], "tokens", self.data_ranks)

    def _reduce(self, grads: list[Tensor], over: str, divisor: int) -> None:
        if self._alone(over) or not grads:
            return
        alone = [grad for grad in grads if grad.numel() >= SMALL and grad.is_contiguous()]
        small = [grad for grad in grads if not (grad.numel() >= SMALL and grad.is_contiguous())]
        begun = [(self._start(grad, over, "gradients"), grad) for grad in alone]
        for dtype in dict.fromkeys(grad.dtype for grad in small):
            members = [grad for grad in small if grad.dtype == dtype]
            bucket = torch.cat([grad.flatten() for grad in members])
            self._wait(self._start(bucket, over, "gradients"), bucket)
            pieces = bucket.split([grad.numel() for grad in members])
            torch._foreach_copy_(members, [piece.view_as(g) for piece, g in zip(pieces, members, strict=True)])
        for work, grad in begun:
            self._wait(work, grad)
        if divisor > 1:
            torch._foreach_div_(grads, divisor)

    # -- agreements ---------------------------------------------------------------------------------------------

    def gather(self, text: str) -> list[str]:
        """Every rank's text, as bytes: nothing is unpickled."""
        if self._alone("all"):
            return [text] * self.world
        raw = (
            torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
        )
        lengths = torch.zeros(self.world, dtype=torch.int64)
        lengths[self.rank] = len(raw)
        lengths = self.total(lengths, "all", "agreement")
        table = torch.zeros(self.world, max(1, int(lengths.max())), dtype=torch.uint8)
        table[self.rank, : len(raw)] = raw
        table = self.total(table, "all", "agreement")
        return [bytes(row[:length].tolist()).decode() for row, length in zip(table, lengths.tolist(), strict=True)]

    @contextmanager
    def apart(self) -> Iterator[None]:
        self.batch_rank, self.batch_ranks = 0, 1
        try:
            yield
        finally:
            self.batch_rank, self.batch_ranks = self.data_rank, self.data_ranks

    def sent(self) -> dict[str, int]:
        return dict(self.bytes)

    def barrier(self) -> None:
        self.total(torch.zeros(1), "all", "agreement")

    def close(self) -> None:
        if self.groups and dist.is_initialized():
            dist.destroy_process_group()

    # -- collectives --------------------------------------------------------------------------------------------

    def _alone(self, over: str) -> bool:
        return self.sizes[over] == 1 or not self.groups

    def _start(self, x: Tensor, over: str, what: str) -> Any:
        """Begin to add up over ranks, in place; every rank gets the same bits."""
        ranks = self.sizes[over]
        # A ring passes each number on 2 (W - 1) / W times: once to be added up, once to be handed out.
        sent = 2 * (ranks - 1) * x.numel() * x.element_size() // ranks
        self.bytes[what] = self.bytes.get(what, 0) + sent
        try:
            return dist.all_reduce(x, group=self.groups[over], async_op=True)
        except RuntimeError as error:
            raise self._lost(error) from error

    def _wait(self, work: Any, x: Tensor) -> Tensor:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error
        return x

    def _lost(self, error: RuntimeError) -> Exception:
        reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        return ConnectionError(
            f"rank {self.rank}: another of the {self.world} ranks died or hangs ({reason}); checkpoints already "
            "written are whole: start all ranks again with --resume"
        )


class _Summed(torch.autograd.Function):
    """The sum is known; its gradient by the part of each rank is the sum's own."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, whole: Tensor) -> Tensor:
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None

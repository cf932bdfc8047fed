"""Ranks in a grid, data × tensor: rank = data_rank · tensor_ranks + tensor_rank.

A step needs one large reduction: the sum over ranks of the [B, L, D] that their features write. Then every rank has
the complete reconstruction. So the loss and its gradient by the reconstruction are complete on every rank, and the
gradients of a rank's features need no further reduction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clt_plugins import Refused

SMALL = 2**18
"""Gradients of fewer numbers share a bucket."""

GLOO = re.compile(r"gloo|pair closure|connection (closed|reset)|timed? ?out", re.IGNORECASE)
"""What errors of gloo say. They have no type of their own: nccl's and those of the store are `dist.DistError`s."""

REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""By their names of torch 2.13 where there are such; the older ones warn there."""


class Grid:
    """A `Parallel` over `torch.distributed`.

    Args:
        rank: of this process.
        tensor, data: how many ranks share the features, and how many groups share the tokens.
        groups: the process groups over "features", "tokens" and "all" ranks; None for a plan, which has no other
            ranks.
        splits_tokens: whether ranks that share the features split the tokens when they compute the error: see
            `SplitsTokens`. gloo takes some three times as long for shares as for a whole sum.
    """

    def __init__(
        self,
        rank: int,
        tensor: int,
        data: int,
        groups: Mapping[str, Any] | None = None,
        *,
        splits_tokens: bool = False,
    ):
        self.rank, self.world = rank, tensor * data
        self.tensor_rank, self.tensor_ranks = rank % tensor, tensor
        self.data_rank, self.data_ranks = rank // tensor, data
        self.batch_rank, self.batch_ranks = self.data_rank, data
        self.groups = groups or {}
        self.splits_tokens = splits_tokens
        self.sizes = {"features": tensor, "tokens": data, "all": tensor * data}
        self.bytes: dict[str, int] = {}
        self.lost = False
        """Whether a rank was lost."""

    def shard(self, n_features: int) -> range:
        """This rank's features of F; shards differ by at most one feature.

        Raises:
            Refused: there are more ranks than features.
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
        total = x.detach().clone(memory_format=torch.contiguous_format)
        work = self._start(total, "features", "features")
        return lambda: _Summed.apply(x, self._wait(work, total))

    def sum_share_later(self, x: Tensor) -> Callable[[], Tensor]:
        if self._alone("features"):
            return lambda: x.detach().chunk(self.tensor_ranks)[self.tensor_rank].clone()
        given = x.detach().contiguous()
        total = given.new_empty(len(given) // self.tensor_ranks, *given.shape[1:])
        self._count(given, "features", "features")
        with self._lost_ranks():
            work = REDUCE_SCATTER(total, given, group=self.groups["features"], async_op=True)
        return lambda: self._wait(work, total)

    def join_shares(self, share: Tensor) -> Tensor:
        if self._alone("features"):
            return share.repeat(self.tensor_ranks, *[1] * (share.dim() - 1))
        given = share.detach().contiguous()
        joined = given.new_empty(len(given) * self.tensor_ranks, *given.shape[1:])
        self._count(joined, "features", "features")
        with self._lost_ranks():
            work = ALL_GATHER(joined, given, group=self.groups["features"], async_op=True)
        return self._wait(work, joined)

    def total(self, x: Tensor, over: str = "features", what: str = "metrics") -> Tensor:
        return self.total_later(x, over, what)()

    def total_later(self, x: Tensor, over: str = "features", what: str = "metrics") -> Callable[[], Tensor]:
        if self._alone(over):
            return lambda: x.detach()
        total = x.detach().clone(memory_format=torch.contiguous_format)
        work = self._start(total, over, what)
        return lambda: self._wait(work, total)

    @property
    def connected(self) -> bool:
        """Whether there are other ranks: not in a plan, and not after `close`."""
        return bool(self.groups)

    def send_later(self, x: Tensor, tensor_rank: int) -> Callable[[], None]:
        if self._alone("features"):
            return lambda: None
        group = self.groups.get("rows", self.groups["features"])
        if tensor_rank == self.tensor_rank:
            sent = x.numel() * x.element_size()
            self.bytes["rows"] = self.bytes.get("rows", 0) + sent
        with self._lost_ranks():
            work = dist.broadcast(x, self.data_rank * self.tensor_ranks + tensor_rank, group=group, async_op=True)
        return lambda: self._wait(work, None)

    def reduce_gradients(self, parameters: list[Any]) -> None:
        """Large gradients are reduced in place, small ones in one bucket; all are started before any is awaited."""
        partial = [p.grad for p in parameters if p.grad is not None and getattr(p, "partial_gradient", False)]
        self._reduce(partial, "features", 1)
        self._reduce([p.grad for p in parameters if p.grad is not None], "tokens", self.data_ranks)

    def _reduce(self, grads: list[Tensor], over: str, divisor: int) -> None:
        if self._alone(over) or not grads:
            return
        large = [grad for grad in grads if grad.numel() >= SMALL and grad.is_contiguous()]
        small = [grad for grad in grads if not (grad.numel() >= SMALL and grad.is_contiguous())]
        started = [(self._start(grad, over, "gradients"), grad) for grad in large]
        for dtype in dict.fromkeys(grad.dtype for grad in small):
            members = [grad for grad in small if grad.dtype == dtype]
            bucket = torch.cat([grad.flatten() for grad in members])
            self._wait(self._start(bucket, over, "gradients"), bucket)
            pieces = bucket.split([grad.numel() for grad in members])
            torch._foreach_copy_(members, [piece.view_as(g) for piece, g in zip(pieces, members, strict=True)])
        for work, grad in started:
            self._wait(work, grad)
        if divisor > 1:
            torch._foreach_div_(grads, divisor)

    # -- agreements ---------------------------------------------------------------------------------------------

    def gather(self, text: str) -> list[str]:
        """Every rank's text, as bytes: nothing is unpickled."""
        if self._alone("all"):
            return [text] * self.world
        raw = torch.tensor(list(text.encode()), dtype=torch.uint8)
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
        if not self._alone("all"):
            with self._lost_ranks():
                dist.all_reduce(torch.zeros(1), group=self.groups.get("waiting", self.groups["all"]))

    def close(self) -> None:
        connected, self.groups = self.connected, {}
        if not connected or not dist.is_initialized():
            return
        if self.lost and dist.get_backend_config().find("nccl") >= 0:
            # Kernels are queued that wait for a rank that is gone; leaving the group would wait for them.
            abort = getattr(dist.distributed_c10d, "_abort_process_group", lambda: None)  # no public name
            with suppress(Exception):
                abort()
            return
        dist.destroy_process_group()

    # -- collectives --------------------------------------------------------------------------------------------

    def _alone(self, over: str) -> bool:
        return self.sizes[over] == 1 or not self.groups

    def _start(self, x: Tensor, over: str, what: str) -> Any:
        """Start to sum over ranks, in place; every rank gets the same bits."""
        # Once to be summed, once to be distributed.
        self._count(x, over, what, times=2)
        with self._lost_ranks():
            return dist.all_reduce(x, group=self.groups[over], async_op=True)

    def _count(self, x: Tensor, over: str, what: str, times: int = 1) -> None:
        """Count what is sent: in a ring of W ranks each number goes (W - 1) / W times around."""
        ranks = self.sizes[over]
        sent = times * (ranks - 1) * x.numel() * x.element_size() // ranks
        self.bytes[what] = self.bytes.get(what, 0) + sent

    def _wait(self, work: Any, x: Any) -> Any:
        with self._lost_ranks():
            work.wait()
        return x

    @contextmanager
    def _lost_ranks(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._raise_lost(error)
            raise

    def _raise_lost(self, error: RuntimeError) -> None:
        """Raise `ConnectionError` if an error comes from the process group; others, such as a full memory, are not the
        fault of another rank."""
        from_gloo = type(error) is RuntimeError and GLOO.search(str(error)) is not None
        if not (from_gloo or isinstance(error, dist.DistError)):
            return
        self.lost = True
        reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        raise ConnectionError(
            f"rank {self.rank}: another of the {self.world} ranks died or hangs ({reason}); checkpoints already "
            "written are complete: start all ranks again with --resume"
        ) from error


class _Summed(torch.autograd.Function):
    """The sum over ranks, which is known already. Its gradient by the part of each rank is that of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, total: Tensor) -> Tensor:
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None

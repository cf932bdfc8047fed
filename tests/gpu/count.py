"""Counts a training step on the absent GPU: bytes, launches and arithmetic by part, and the memory at the peak."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.gpu.absent import on_gpu, tensors
from tests.gpu.traffic import Traffic, traffic
from tests.gpu.watch import Watch, where

PARTS = (
    (r"distributed/(agree|reading)\.py ", "data"),
    (r"/model/select|clt_kernels/\S*(select|topk|among|places|keys|batch|token)\S*\.py", "selection"),
    (r"AuxK\.selection|distributed/topk\.py|contract/select\.py", "selection"),
    (r"/model/(encoder|products/matrix)\.py", "encoder product"),
    (r"/model/products/", "dense products"),
    (r"gradient_norm|clip|/norm\.py", "norm and clip"),
    (r"/training/optimizer|clt_optimizers/|update_rows", "optimizer"),
    (r"clt_kernels/|/model/sparse\.py|/data/features\.py Pairs", "sparse products"),
    (r"clt_losses/", "losses"),
    (r"/model/normalisation/|/data/affine\.py", "normalise"),
    (r"clt_tyings/", "decoder"),
    (r"clt_parallel/", "exchange"),
)
"""The innermost line of the project says which part of a step an operation belongs to: the first that matches."""

REST = "the rest"
"""Autograd's own operations among them: they have no line of the project but the loop's."""


@attrs.frozen
class Place:
    """A tensor that a kernel was given."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of its memory, which is aligned."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def stand_in(self) -> Any:
        """What Triton's compiler takes for the tensor."""
        from triton.runtime.jit import MockTensor

        tensor = MockTensor(self.dtype, self.shape)
        tensor.data_ptr = lambda: self.offset
        tensor.ptr_range = lambda: self.bytes
        return tensor


@attrs.frozen
class Launch:
    """A launch of a Triton kernel."""

    kernel: str
    function: Any
    """Triton's `JITFunction`."""
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By name, `num_warps` and the like among them; a tensor is a `Place`."""
    part: str


@attrs.define
class Part:
    """What a part of a step moves, by torch's operations."""

    bytes: int = 0
    launches: int = 0
    flops: int = 0
    operations: list[tuple[str, str, Traffic, str]] = attrs.field(factory=list)
    """Name, place, traffic, type."""


def part_of(place: str, operation: str) -> str:
    if "_fused_adam" in operation:
        return "optimizer"
    return next((part for pattern, part in PARTS if re.search(pattern, place.partition(" < ")[0])), REST)


class Count(Watch):
    """Watches, and counts what each part moves since `begin`."""

    def __init__(self, kept: int = 64, read: int = 0):
        super().__init__(kept, read)
        self.parts: dict[str, Part] = defaultdict(Part)
        self.launched: list[Launch] = []
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        """Storages on the GPU: their reference and bytes."""
        self.bytes = 0
        self.peak = 0
        self.peak_place = ""

    def begin(self) -> None:
        """Count anew; what lives goes on to live."""
        self.parts.clear()
        self.launched.clear()
        self.events.clear()
        self._drop_dead()
        self.peak = self.bytes

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = self.do(func, args, kwargs)
        outputs = tensors(out)
        if any(map(on_gpu, outputs)) or any(map(on_gpu, tensors((args, kwargs)))):
            moved = traffic(func, args, kwargs, outputs)
            place = where() if moved.launches else ""
            self._track(outputs, moved.scratch, place)
            if moved.launches:
                part = self.parts[part_of(place, str(func))]
                part.bytes += moved.bytes
                part.launches += moved.launches
                part.flops += moved.flops
                # The type that a product multiplies, whatever it adds up in.
                of = [x for x in tensors(args) if x.dim() >= 2][-1:] if moved.flops else outputs or tensors(args)
                part.operations.append((str(func), place, moved, str(of[0].dtype) if of else ""))
        return out

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        super().launch(kernel, grid, arguments)
        given = {
            name: Place(x.dtype, tuple(x.shape), x.storage_offset() * x.element_size()) if isinstance(x, Tensor) else x
            for name, x in arguments.items()
        }
        self.launched.append(Launch(kernel.__name__, kernel, grid, given, part_of(where(), kernel.__name__)))

    def _track(self, outputs: list[Tensor], scratch: int, place: str) -> None:
        for x in outputs:
            if not on_gpu(x):
                continue
            storage = x.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference.cdata not in self.live:
                self.live[reference.cdata] = reference, storage.nbytes()
                self.bytes += storage.nbytes()
        if self.bytes + scratch > self.peak:
            self._drop_dead()
            if self.bytes + scratch > self.peak:
                self.peak, self.peak_place = self.bytes + scratch, place or where()

    def _drop_dead(self) -> None:
        for key, (reference, size) in list(self.live.items()):
            if reference.expired():
                del self.live[key]
                self.bytes -= size

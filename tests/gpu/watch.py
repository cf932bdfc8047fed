"""Sees what makes the host wait for a GPU, and operations that mix devices.

Each of these would be a `cudaStreamSynchronize` or a failure on a real GPU:

- a number is read (`.item()`, `bool(x)`, `float(x)`, `if x > 0`), or a tensor is copied to the host
- a size depends on data (`nonzero`, a boolean mask as an index, `unique`, ...)
- a copy to the device from memory that is not pinned (`torch.tensor(..., device="cuda")`, a list as an index)
- `synchronize` of the device, a stream or an event
- an operation of tensors on two devices
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from tests.gpu.absent import Ops, on_gpu, tensors

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (f"{ROOT}/clt_plugins/", f"{ROOT}/plugins/")

aten = torch.ops.aten


def where(root: str = f"{ROOT}/") -> str:
    """The innermost line of the project that is running, and the one that called it."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < 2:  # type: ignore[redundant-expr]
        name = frame.f_code.co_filename
        if name.startswith(PROJECT):
            found.append(f"{name.removeprefix(root)} {frame.f_code.co_qualname}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found) or "outside of the project"


class Watch(Ops):
    """Notes what waits or mixes devices, as `kind, operation, place` in `events`.

    Args:
        kept: how many entries a size that depends on data is taken for.
        read: what an integer that comes from the device is taken for, such as how many features are dead.
    """

    def __init__(self, kept: int = 64, read: int = 1):
        super().__init__()
        self.kept, self.read = kept, read
        self.events: Counter[tuple[str, str, str]] = Counter()
        self.pinned: set[int] = set()
        """Storages of pinned memory."""
        self.keep: list[Tensor] = []
        """Pinned tensors stay, so that no other one gets their storage's address."""

    def note(self, kind: str, operation: Any) -> None:
        self.events[kind, str(operation).removesuffix(".default"), where()] += 1

    def waits(self, what: str) -> None:
        self.note("waits", what)

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        for name, value in arguments.items():
            if isinstance(value, Tensor) and not on_gpu(value):
                self.note("mixes devices", f"{kernel.__name__}: {name}")

    # -- one operation ------------------------------------------------------------------------------------------

    def op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = tensors((args, kwargs))
        there = any(map(on_gpu, inputs))
        if kwargs.pop("pin_memory", False) or func in (aten._pin_memory.default, aten.pin_memory.default):
            return self._pin(func, args, kwargs)
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if func is aten._local_scalar_dense.default:
            if there:
                self.note("reads a number", func)
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else self.read)
        if func in (aten._to_copy.default, aten.copy_.default):
            self._copy(func, args, kwargs)
        elif there:
            self._devices(func, args, inputs)
        size = self._of_unknown_size(func, args)
        if size is not None:
            return size
        try:
            return self.run(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if not there:
                raise
            self.note("size depends on data", func)
            return self._guess(func, args)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do the operation; for subclasses that count."""
        return self.do(func, args, kwargs)

    def _pin(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        out = args[0].clone() if func in (aten._pin_memory.default, aten.pin_memory.default) else func(*args, **kwargs)
        self.pinned.add(out.untyped_storage()._cdata)
        self.keep.append(out)
        return out

    def _is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self.pinned

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A copy between devices is asynchronous only where the host's memory is pinned and the caller asks for it."""
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            target_device, asked = target.device, bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        else:
            target, source = None, args[0]
            target_device = torch.device(kwargs.get("device") or source.device)
            asked = bool(kwargs.get("non_blocking"))
        if source.device.type == target_device.type or target_device.type == "meta":
            return
        if target_device.type == "cpu":
            # Torch copies `x.to("cpu", non_blocking=True)` into pinned memory of its own.
            if not (asked and (target is None or self._is_pinned(target))):
                self.note("copies to the host", func)
        elif not (asked and self._is_pinned(source)):
            self.note("copies from pageable memory", func)

    def _devices(self, func: Any, args: tuple[Any, ...], inputs: list[Tensor]) -> None:
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            # Torch moves indices to the device itself.
            if any(x is not None and not on_gpu(x) for x in args[1]):
                self.note("copies from pageable memory", f"{func}: an index on the host")
            return
        # A tensor of one number on the host goes with the launch.
        if any(not on_gpu(x) and x.dim() > 0 for x in inputs):
            self.note("mixes devices", func)

    def _of_unknown_size(self, func: Any, args: tuple[Any, ...]) -> Any:
        """An indexing by a mask: its result; None for all other operations."""
        if func is aten.nonzero.default:
            if on_gpu(args[0]):
                self.note("size depends on data", func)
            return self._guess(func, args)
        if func not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            return None
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        if not masks:
            return None
        if func is not aten.index.Tensor:
            # `x[mask] = number` is filled in one launch; anything else is indexed by `nonzero`.
            if on_gpu(args[0]) and args[2].numel() > 1:
                self.note("size depends on data", f"{func}: a mask as an index")
            return args[0] if func is aten.index_put_.default else args[0].clone()
        if on_gpu(args[0]):
            self.note("size depends on data", f"{func}: a mask as an index")
        x, indices = args[0], args[1]
        kept = min(self.kept, masks[0].numel())
        position = next(i for i, index in enumerate(indices) if index is not None)
        dims = sum(1 if m is None or m.dtype not in (torch.bool, torch.uint8) else m.dim() for m in indices[position:])
        return x.new_empty(*x.shape[:position], kept, *x.shape[position + dims :])

    def _guess(self, func: Any, args: tuple[Any, ...]) -> Any:
        x = args[0]
        if func is aten.nonzero.default:
            return x.new_empty(min(self.kept, x.numel()), x.dim(), dtype=torch.int64)
        if func in (aten.masked_select.default, aten.bincount.default):
            return x.new_empty(min(self.kept, x.numel()))
        if func is aten.repeat_interleave.Tensor:
            return x.new_empty(self.kept, dtype=torch.int64)
        if func is aten.equal.default:
            return True
        pieces = [x.new_empty(min(self.kept, x.numel())), x.new_empty(x.shape, dtype=torch.int64)]
        return (*pieces, x.new_empty(min(self.kept, x.numel()), dtype=torch.int64))

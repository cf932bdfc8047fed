"""What an operation of torch moves on a GPU: bytes, arithmetic, launches, scratch memory.

Elementwise operations read each input and write each output once. Of those that take several passes the passes are
counted, as the sources of torch 2.11 and of CUB's radix sort have them.
"""

from __future__ import annotations

from typing import Any

import attrs
from torch import Tensor

from tests.gpu.absent import tensors


@attrs.frozen
class Traffic:
    """What one operation moves."""

    read: int = 0
    """Bytes."""
    written: int = 0
    """Bytes."""
    flops: int = 0
    """Of matrix products; a multiplication and an addition are two."""
    launches: int = 1
    scratch: int = 0
    """Bytes that it allocates besides its results, while it runs."""

    @property
    def bytes(self) -> int:
        return self.read + self.written


def touched(x: Tensor) -> int:
    """Bytes that reading all of a tensor touches: along a broadcast dimension the same ones again."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride or size <= 1 else 1
    return count * x.element_size()


NOTHING = {"detach", "alias", "lift_fresh", "_unsafe_view", "set_", "empty", "empty_like", "empty_strided", "new_empty"}
NOTHING |= {"record_stream", "is_pinned", "_local_scalar_dense", "wait_tensor", "resize_"}
FILLS = {"zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_zeros", "new_ones", "new_full", "arange"}
FILLS |= {"zero_", "fill_", "scalar_tensor", "rand", "randint", "uniform_", "normal_"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
SORTS = {"sort", "argsort"}
GATHERS = {"gather", "index", "index_select", "take", "embedding"}
SCATTERS = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put", "index_put_", "_index_put_impl_"}
SCATTERS |= {"index_copy", "index_copy_", "scatter", "scatter_"}


def traffic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> Traffic:
    """What an operation with these arguments and results moves."""
    namespace, _, name = func._schema.name.partition("::")
    shapes_only = bool(outputs) and all(x.device.type == "meta" for x in outputs)
    if func.is_view or name in NOTHING or namespace == "prim" or shapes_only:
        return Traffic(launches=0)
    inputs = tensors((args, {name: value for name, value in kwargs.items() if name != "out"}))
    if namespace == "c10d":
        # Each number is read and written about twice, once where a rank sends or gets no more than a share; it passes
        # the links, not only memory.
        moved = 2 * sum(map(touched, inputs)) if name.startswith("allreduce") else max(map(touched, inputs))
        return Traffic(moved, moved)
    seen = {(x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), tuple(x.stride())): x for x in inputs}
    read, written = sum(map(touched, seen.values())), sum(map(touched, outputs))
    if name in FILLS:
        return Traffic(0, written)
    if name in PRODUCTS:
        a, b = [x for x in inputs if x.dim() >= 2][-2:]  # a bias may stand first
        return Traffic(read, written, flops=2 * a.numel() * b.shape[-1])
    if name in SORTS:
        return _sort(inputs[0])
    if name == "topk":
        # Of many numbers: a pass for each byte of the key, and one to gather.
        passes = inputs[0].element_size()
        return Traffic((passes + 1) * touched(inputs[0]), written, launches=2 * passes + 4)
    if name == "cumsum" and inputs[0].dtype != outputs[0].dtype:
        # Widened by a copy first.
        wide = touched(outputs[0])
        return Traffic(touched(inputs[0]) + wide, 2 * wide, launches=2, scratch=wide)
    if name == "nonzero_static":
        # Counted and scanned by tile, then written.
        return Traffic(2 * touched(inputs[0]), written, launches=3)
    if name in GATHERS:
        moved = touched(outputs[0])
        return Traffic(moved + sum(touched(x) for x in inputs[1:] if not x.is_floating_point()), moved)
    if name == "searchsorted":
        return Traffic(touched(inputs[1]) + 2 * touched(outputs[0]), touched(outputs[0]))
    if name in SCATTERS:
        target, value = inputs[0], touched(inputs[-1])
        copied = 0 if name.endswith("_") else touched(target)
        return Traffic(2 * value + touched(inputs[1]) + copied, value + copied, launches=2 if copied else 1)
    if name.startswith("_fused_adam"):
        parameters, grads, means, squares = (sum(map(touched, group)) for group in args[:4])
        return Traffic(
            parameters + grads + means + squares, parameters + means + squares, launches=1 + len(args[0]) // 4
        )
    if name.startswith("_foreach"):
        changed = read if name.endswith("_") else written
        return Traffic(read, changed, launches=1 + len(args[0]) // 4)
    if not outputs and func._schema.is_mutable:
        written = touched(inputs[0]) if inputs else 0
    return Traffic(read, written)


def _sort(x: Tensor) -> Traffic:
    """Radix sort of keys and int64 positions."""
    columns, count, size = x.shape[-1] if x.dim() else 1, x.numel(), x.element_size()
    if columns <= 1:
        return Traffic(count * size, count * (size + 8))
    pair, positions = (size + 8) * count, 8 * count
    if columns <= 4096 and count > columns:  # rows of blocks of threads
        return Traffic(pair, pair + positions, launches=2, scratch=positions)
    if columns == count or columns >= 1_000_000:  # 8 bits a pass
        return Traffic(size * count + size * pair, positions + size * pair, launches=3 + size, scratch=positions + pair)
    passes = -(-8 * size // 6)  # a segment for each row, 6 bits a pass, the keys read twice
    return Traffic(passes * (size * count + pair), positions + passes * pair, launches=2, scratch=positions + pair)

"""The sparse products on a CUDA GPU: prepares tensors for the programs of `products`.

Tested under Triton's interpreter and compiled ahead of time; not yet run on a GPU.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs, R rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from clt_kernels.gpu import products
from clt_kernels.gpu.select.batch_select import BatchSelect
from clt_kernels.gpu.select.blocks import Shape
from clt_kernels.gpu.select.token_select import TokenSelect
from clt_kernels.gpu.update import adam
from clt_kernels.reference import TorchKernels
from clt_plugins import AdamUpdate, Layout, Pairs, Per, Select

DECODE_PAIRS, DECODE_COLUMNS = 8, 64
"""Rows that a program of `decode` has in flight, and how much of each: 1 KB of bfloat16."""
HOT, PIECE = 1024, 512
"""Features of more pairs than HOT are cut into pieces of PIECE pairs: a program needs about 0.2 µs for each."""
NUMBERS = 2048
"""Numbers of the tokens' side that a warp of `gradients` has in flight: 64 registers of each thread."""
SORTED = 256
"""Pairs of a program that adds up dot products."""
UPDATED = 256
"""Numbers of a program that updates weights, a warp: 16 bytes of bfloat16 for each thread."""


@attrs.frozen(eq=False)
class Grouped:
    """Pairs in feature order. Made once for all products of a step."""

    order: Tensor
    """[N] int64: `Pairs.by_feature`."""
    token: Tensor
    """[N] int32, in feature order."""
    start: Tensor
    """Where each feature's pairs begin, [L * F + 1] int32."""
    piece_start: Tensor
    """Where each feature's pieces begin, [L * F + 1] int32; features of at most HOT pairs have none."""
    owner: Tensor
    """The feature of each piece, [pieces] int32; L * F for places without a piece. Empty where no feature can be
    hot."""

    @classmethod
    def of(cls, pairs: Pairs) -> Grouped:
        start, order = pairs.feature_start, pairs.by_feature
        numbers = start.diff()
        pieces = torch.where(numbers > HOT, (numbers + (PIECE - 1)) // PIECE, 0)
        piece_start = torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])
        # A feature of c > HOT = 2 PIECE pairs has fewer than 1.5 c / PIECE pieces; a batch has B pairs of a feature.
        most = 3 * len(order) // (2 * PIECE) if pairs.tokens > HOT else 0
        owner = torch.searchsorted(piece_start, torch.arange(most, device=order.device), right=True) - 1
        return cls(order, pairs.token[order].int(), start.int(), piece_start.int(), owner.int())


class TritonKernels:
    """`Kernels` for CUDA GPUs: float32, float64, bfloat16 and float16 weights."""

    name = "triton"
    fixed = True

    def __init__(self, *, narrow: bool = False) -> None:
        """
        Args:
            narrow: `gradients` reads the tokens' side in bfloat16 where weights are.
        """
        self.narrow = narrow
        self.grouped: WeakKeyDictionary[Pairs, Grouped] = WeakKeyDictionary()
        """For pairs that are alive."""
        self.placed: WeakKeyDictionary[Pairs, Tensor] = WeakKeyDictionary()
        """Where the pairs of each token and layer begin, for pairs that are alive."""

    def preference(self, device: torch.device) -> int:
        """Faster than `torch` on a GPU; on a CPU only the interpreter runs them."""
        return 10 if device.type == "cuda" else -1

    def select(self, tokens: int, n_layers: int, n_features: int, k: int, *, per: Per, capacity: int = 0) -> Select:
        """See `Kernels.select`."""
        kind = BatchSelect if per == "batch" else TokenSelect
        return kind(Shape(tokens, n_layers, n_features), k, capacity)

    def decode(self, values: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[b, t] = sum over pairs at token b of value · their row for t. `out` [B, L, D] is overwritten."""
        kind = _kind(layout)
        if kind is None:
            return TorchKernels().decode(values, pairs, layout, weight, out)
        tokens, layers, d_model = out.shape
        result = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        columns = min(DECODE_COLUMNS, triton.next_power_of_2(d_model))
        first, step, _, _ = _numbers(layout, out.device)
        layer = pairs.layer
        place = first[layer] + (pairs.feature - layer * layout.n_features) * step[layer] - layer * layout.stride[0]
        products.decode[(tokens, layers, -(-d_model // columns))](
            result, values.contiguous(), place.int(), self._starts(pairs), weight, layout.stride[0],
            L=layers, D=d_model, OWN=kind == "own", PER_TARGET=values.dim() == 2,
            PAIRS=DECODE_PAIRS, COLUMNS=columns, WIDE=_wide(out), num_warps=1,
        )  # fmt: skip
        if result is not out:
            out.copy_(result)
        return None

    def grad_values(self, grad: Tensor, pairs: Pairs, layout: Layout, weight: Tensor, out: Tensor) -> None:
        """out[n] = sum over targets t of grad[b, t] · row; one sum per target where `out` is [N, L], 0 if t < s."""
        self._gradients(None, pairs, layout, weight, grad, out, None, overwrite=False, squares=None)

    def grad_rows(
        self, values: Tensor, pairs: Pairs, layout: Layout, dense: Tensor, out: Tensor, *, overwrite: bool
    ) -> None:
        """out[row] (+)= sum over pairs and targets of value · dense[b, t]; see `Kernels`."""
        self._gradients(values, pairs, layout, out, dense, None, out, overwrite=overwrite, squares=None)

    def gradients(
        self,
        values: Tensor,
        pairs: Pairs,
        layout: Layout,
        weight: Tensor,
        dense: Tensor,
        grad_values: Tensor | None,
        grad_rows: Tensor,
        *,
        overwrite: bool,
        squares: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        """`grad_values` and `grad_rows` in one pass; see `BothGradients`."""
        if self.narrow and weight.dtype == torch.bfloat16:
            dense = dense.to(torch.bfloat16)
        self._gradients(
            values, pairs, layout, weight, dense, grad_values, grad_rows, overwrite=overwrite, squares=squares
        )
        if sums is not None:
            grouped = self._group(pairs)
            products.add_values[(layout.n_layers * layout.n_features,)](
                sums, values[grouped.order], grouped.start, TILE=128, WIDE=_wide(sums), num_warps=1
            )

    def _gradients(
        self,
        values: Tensor | None,
        pairs: Pairs,
        layout: Layout,
        weight: Tensor,
        dense: Tensor,
        grad_values: Tensor | None,
        grad_rows: Tensor | None,
        *,
        overwrite: bool,
        squares: Tensor | None,
    ) -> None:
        """Either gradient, or both."""
        _, layers, d_model = dense.shape
        device, dense, grouped = dense.device, dense.contiguous(), self._group(pairs)
        wide, number = (torch.float64, tl.float64) if dense.dtype == torch.float64 else (torch.float32, tl.float32)
        bases, steps, use_start, sources, targets = _blocks(layout, device)
        n, most = len(grouped.order), max(layout.count)
        per_target = (values if grad_values is None else grad_values).dim() == 2  # type: ignore[union-attr]
        if grad_rows is not None and overwrite and len(bases) * layout.n_features < layout.rows:
            grad_rows.zero_()  # some rows belong to no feature
            if squares is not None:
                squares.zero_()
        # What is not asked for is never read or written; any tensor will do in its place.
        ordered = dense if values is None else values[grouped.order]
        dots = torch.empty(most, n, dtype=wide, device=device) if grad_values is not None else dense
        hot = len(grouped.owner) > 0
        partial = dense
        width = triton.next_power_of_2(d_model)
        warps = max(1, min(16, width // 1024))
        common: Any = {
            "L": layers, "F": layout.n_features, "D": d_model, "J": most, "PER_TARGET": per_target,
            "ROWS": grad_rows is not None, "DOTS": grad_values is not None, "WIDTH": width, "WIDE": number,
            "TOKENS": max(1, min(16, NUMBERS * warps * 4 // wide.itemsize // width)), "num_warps": warps,
        }  # fmt: skip
        if hot:
            if grad_rows is not None:
                partial = torch.empty(len(grouped.owner), most, d_model, dtype=wide, device=device)
            products.pieces[(len(grouped.owner), most)](
                partial, dots, ordered, grouped.token, grouped.start, grouped.piece_start, grouped.owner, weight, dense,
                *_numbers(layout, device), n, PIECE=PIECE, **common,
            )  # fmt: skip
        products.gradients[(layout.n_features, len(bases))](
            dense if grad_rows is None else grad_rows, dense if squares is None else squares, dots, partial, ordered,
            grouped.token, grouped.start, grouped.piece_start, weight, dense, bases, steps, use_start, sources, targets,
            n, SQUARES=squares is not None, OVERWRITE=grad_rows is not None and overwrite, HOT=HOT if hot else 0,
            **common,
        )  # fmt: skip
        if grad_values is not None and n > 0:
            products.add_dots[(-(-n // SORTED),)](
                grad_values, dots, grouped.order, pairs.feature, _numbers(layout, device)[3],
                grouped.order if pairs.count is None else pairs.count, n,
                L=layers, F=layout.n_features, PER_TARGET=per_target, COUNTED=pairs.count is not None, TILE=SORTED,
                WIDE=number,
            )  # fmt: skip

    def update_rows(self, update: AdamUpdate) -> None:
        """See `Updates.update_rows`."""
        rows, columns = update.weight.shape
        width = min(UPDATED, triton.next_power_of_2(columns))
        weight = update.weight
        adam[(rows * triton.cdiv(columns, width),)](
            weight,
            weight if update.low is None else update.low,
            update.grad,
            update.mean,
            update.square,
            weight if update.grad_squares is None else update.grad_squares,
            update.scalars,
            update.key - 2**32 if update.key >= 2**31 else update.key,
            update.first,
            update.period,
            update.stride,
            beta1=update.beta1,
            beta2=update.beta2,
            eps=update.eps,
            weight_decay=update.weight_decay,
            SPLIT=update.low is not None,
            USED=update.grad_squares is not None,
            C=columns,
            WIDTH=width,
            num_warps=1,
        )

    def _group(self, pairs: Pairs) -> Grouped:
        if pairs not in self.grouped:
            self.grouped[pairs] = Grouped.of(pairs)
        return self.grouped[pairs]

    def _starts(self, pairs: Pairs) -> Tensor:
        """Where the pairs of each token from each layer begin, [B, L + 1] int32."""
        if pairs not in self.placed:
            edges = torch.arange(pairs.tokens * pairs.n_layers + 1, device=pairs.token.device)
            starts = torch.searchsorted(pairs.token * pairs.n_layers + pairs.layer, edges)
            if pairs.count is not None:
                starts = starts.minimum(pairs.count)
            of_token = starts[:-1].view(pairs.tokens, pairs.n_layers)
            self.placed[pairs] = torch.cat([of_token, starts[pairs.n_layers :: pairs.n_layers, None]], 1).int()
        return self.placed[pairs]


def _kind(layout: Layout) -> str | None:
    """Which layers write to layer t: t alone ("own"), or all up to t ("earlier"); None if neither, or if the distance
    of a feature's rows depends on its layer: then `decode` has no program."""
    layers = layout.n_layers
    if len(set(layout.stride)) > 1:
        return None
    if layout.count == (1,) * layers:
        return "own"
    return "earlier" if layout.count == tuple(range(layers, 0, -1)) else None


@lru_cache(maxsize=64)
def _numbers(layout: Layout, device: torch.device) -> tuple[Tensor, ...]:
    """The layout's numbers [L]. Cached on the device: to copy them in each call would wait for the device."""
    return tuple(torch.tensor(x, device=device) for x in (layout.first, layout.step, layout.stride, layout.count))


@lru_cache(maxsize=64)
def _blocks(layout: Layout, device: torch.device) -> tuple[Tensor, ...]:
    """Which source layers use which rows for which targets.

    Block k is the rows bases[k] + f * steps[k] of all features f. It is used by the source layers
    sources[use_start[k] : use_start[k + 1]] for the target layers targets[use_start[k] : use_start[k + 1]].
    Blocks are in the order of targets, so that programs which run together read the same layer of the tokens' side.
    """
    users: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for t in range(layout.n_layers):
        for s in range(t + 1):
            if t - s < layout.count[s]:
                users.setdefault((layout.first[s] + (t - s) * layout.stride[s], layout.step[s]), []).append((s, t))
    start = [0]
    for uses in users.values():
        start.append(start[-1] + len(uses))
    rows = [torch.tensor(column, device=device) for column in zip(*users, strict=True)]
    flat = zip(*(use for uses in users.values() for use in uses), strict=True)
    return *rows, *(torch.tensor(column, dtype=torch.int32, device=device) for column in (start, *flat))


def _wide(out: Tensor) -> Any:
    """The type to sum in."""
    return tl.float64 if out.dtype == torch.float64 else tl.float32

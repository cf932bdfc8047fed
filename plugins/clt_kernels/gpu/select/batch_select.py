"""The k best of a batch, found by counting digits: `Select` by the kernels of `batch`.

The number of launches depends on shapes alone, and nothing is read back. Tested under Triton's interpreter and compiled
ahead of time; not yet run on a GPU.

By a model, not measured: on an H100, 12 layers of 4096 tokens and 24,576 features in bfloat16 take 3.2 ms where 200
are kept per token, and 4.1 ms where 600 are. 1 ms of these is the first layer, whose numbers are all counted by three
digits. A float32 layer takes 0.08 ms more. In the model, marks are bound by memory (2.7 TB/s; 6 instructions for a
number) and the rest by instructions (17.7e12 of a thread per second; about 340 for each candidate, 50 for a number that
is counted). Each of the 17 launches of a layer takes 1.7 µs.

Shapes: B tokens, L layers, F features per layer, N places of a result.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from attrs import frozen
from torch import Tensor

from clt_kernels.gpu.select import batch, marks, pairs
from clt_kernels.gpu.select.blocks import Block, Shape
from clt_kernels.gpu.select.keys import LOWEST
from clt_plugins import Kept

if TYPE_CHECKING:
    from clt_plugins import Ranks

LARGEST = 2**30
"""Numbers of a block that are seen at a time: places in it have 32 bits."""
TILE = 4096
"""Numbers of a block that a program looks at together."""


@frozen
class Digit:
    """A digit of the key or of the id, as launches get it."""

    of_id: int
    low: int
    """Its lowest bit."""
    above: int
    """The lowest bit of the digit before it."""


@lru_cache(maxsize=256)
def _digits(key_bits: int, ids: int) -> tuple[Digit, ...]:
    """The digits of a key and of an id below `ids`, best first. The last of each may overlap the one before."""
    result = []
    for of_id, bits in ((0, key_bits), (1, max(1, (ids - 1).bit_length()))):
        above, low = (62 if of_id else bits - 1), bits
        while low > 0:
            low = max(0, low - batch.DIGIT_BITS)
            result.append(Digit(of_id, low, above))
            above = low
    return tuple(result)


class Pool(NamedTuple):
    """Candidates, in any order."""

    keys: Tensor
    ids: Tensor
    values: Tensor

    @classmethod
    def empty(cls, size: int, key: torch.dtype, values: torch.dtype, device: torch.device) -> Pool:
        # Zeros: ids of places that hold nothing yet are calculated with.
        return cls(*(torch.zeros(size, dtype=dtype, device=device) for dtype in (key, torch.int64, values)))


class State:
    """What launches leave for those that follow: see `batch`."""

    def __init__(self, digits: tuple[Digit, ...], device: torch.device):
        slots = (len(digits) + 1) * 4
        size = batch.HEAD + len(digits) * (1 << batch.DIGIT_BITS)
        both = torch.zeros(slots + size // 2, dtype=torch.int64, device=device)
        self.digits = digits
        self.state, self.counts = both[:slots], both[slots:].view(torch.int32)

    @property
    def kept(self) -> Tensor:
        return self.counts[:1]

    def of_digit(self, number: int) -> Tensor:
        bins = 1 << batch.DIGIT_BITS
        return self.counts[batch.HEAD + number * bins :][:bins]

    @property
    def last(self) -> tuple[int, int]:
        return self.digits[-1].of_id, self.digits[-1].low


class BatchSelect:
    """`Select` of a whole batch.

    Memory, besides the result: 54 bytes per number kept (k, or `capacity` if it is more) while layers are seen, and a
    bit per number of a block.

    Args:
        k: how many are kept, of all ranks.
        capacity: places of the result, if more.
    """

    def __init__(self, shape: Shape, k: int, capacity: int):
        self.shape = shape
        available = shape.tokens * shape.n_layers * shape.n_features
        self.k, self.size = k, min(max(k, capacity), available)
        # How many more than k a block may leave, so that few digits are enough.
        self.slack = max(self.size // 8, 1024)
        self.listed = max(2 * self.size, 8192)
        self.kept: Pool | None = None

    def see(
        self,
        layer: int,
        pre: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        score: Tensor | None = None,
    ) -> None:
        """See `Select.see`."""
        block = Block.of(pre, scale, shift, score)
        if self.kept is None:
            self._allocate(block)
        n_tokens, _, n_features = self.shape
        # Whole rows at a time: their numbers are counted in 32 bits.
        step = max(1, LARGEST // n_features)
        for low in range(0, n_tokens, step):
            rows = slice(low, low + step)
            part = block._replace(numbers=block.numbers[rows].contiguous(), pre=block.pre[rows].contiguous())
            self._see(part, (layer * n_tokens + low) * n_features)

    def _allocate(self, block: Block) -> None:
        device, self.dtype = block.pre.device, block.pre.dtype
        self.programs = _programs(device)
        values = torch.promote_types(self.dtype, torch.float32)
        self.kept, self.spare = (Pool.empty(self.size + self.slack, block.key, values, device) for _ in range(2))
        self.found_at = torch.empty(self.listed, dtype=torch.int32, device=device)
        self.found_keys = torch.empty(self.listed, dtype=block.key, device=device)
        self.count = torch.zeros(1, dtype=torch.int32, device=device)
        self.key_bits = torch.iinfo(block.key).bits
        self.bound = torch.full((1,), LOWEST[self.key_bits], dtype=block.key, device=device)

    def _see(self, block: Block, first_id: int) -> None:
        assert self.kept is not None
        size = block.numbers.numel()
        # Without scale and shift, rows may have any length; with them, a program's features stay the same.
        plain = block.scale is None and block.shift is None
        width = TILE if plain else self.shape.n_features
        tile = min(TILE, max(32, triton.next_power_of_2(width)))
        tiles = -(-width // tile)
        words_of_row = tiles * tile // 32
        bits = torch.empty(-(-size // width) * words_of_row, dtype=torch.int32, device=self.bound.device)
        grid = (-(-self.programs // tiles) * tiles,)
        end = first_id + size - 1
        now = State(_digits(self.key_bits, end + 1), self.bound.device)
        scores = block.numbers, block.scale, block.shift
        limits = self.k, self.slack, first_id, end
        shape = size, width, self.listed
        options = {"enable_fp_fusion": False}  # a product and a sum, each rounded: as torch does

        def mark(digits: int, which: int) -> None:
            marks.mark[grid](
                *scores, self.bound, now.state, now.counts, bits.view(torch.uint8), *limits, digits, *now.last, *shape,
                TILE=tile, **options,
            )  # fmt: skip
            marks.list_marked[(self.programs,)](
                bits, self.found_at, now.counts, len(bits), words_of_row, width, which, self.listed
            )

        mark(0, 1)
        for number, digit in enumerate(now.digits):
            last = now.digits[number - 1]
            batch.count_digit[grid](
                *scores, self.bound, self.kept.keys, self.kept.ids, self.count, self.found_at, self.found_keys,
                now.state, now.counts, *limits, number, digit.of_id, digit.low, digit.above, last.of_id, last.low,
                *shape, TILE=tile, **options,
            )  # fmt: skip
        mark(len(now.digits), 2)
        bound = torch.empty_like(self.bound)
        batch.keep[(self.programs,)](
            *scores, block.pre, self.bound, *self.kept, self.count, self.found_at, now.state, now.counts, *self.spare,
            bound, *limits, len(now.digits), self.key_digits, *now.last, width, self.listed, **options,
        )  # fmt: skip
        self.kept, self.spare, self.bound, self.count = self.spare, self.kept, bound, now.kept

    @property
    def key_digits(self) -> int:
        return -(-self.key_bits // batch.DIGIT_BITS)

    def finish(self, ranks: Ranks | None = None) -> Kept:
        """See `Select.finish`."""
        assert self.kept is not None, "finish() before see()"
        n_tokens, n_layers, n_features = self.shape
        device, columns = self.bound.device, n_layers * n_features
        ids, rows = self.kept.ids, n_tokens
        if ranks is not None:
            row, f = ids // n_features, ids % n_features
            row = (row // n_tokens) * ranks.tokens + ranks.first_token + row % n_tokens
            ids, rows, n_features = row * ranks.features + ranks.first_feature + f, ranks.tokens, ranks.features
        end = rows * n_layers * n_features - 1
        now = State(_digits(self.key_bits, end + 1), device)
        for number, digit in enumerate(now.digits):
            last = now.digits[number - 1]
            # No block, and nothing listed.
            batch.count_digit[(self.programs,)](
                self.kept.values, None, None, self.bound, self.kept.keys, ids, self.count, self.found_at,
                self.found_keys, now.state, now.counts, self.k, 0, 0, end, number, digit.of_id, digit.low, digit.above,
                last.of_id, last.low, 0, TILE, 0, TILE=TILE,
            )  # fmt: skip
            if ranks is not None:
                now.of_digit(number).copy_(ranks.total(now.of_digit(number)))
        key = torch.int32 if n_tokens * columns < 2**31 - 1 else torch.int64
        found = torch.full((self.size,), torch.iinfo(key).max, dtype=key, device=device)
        values = torch.empty(self.size, dtype=self.kept.values.dtype, device=device)
        pairs.emit[(self.programs,)](
            *self.kept, self.count, ids, now.state, now.counts, found, values,
            self.k, end, len(now.digits), *now.last, *self.shape,
        )  # fmt: skip
        # In a key of 32 bits a sort takes half as long.
        found, order = found.sort()
        token, feature = (torch.empty(self.size, dtype=torch.int64, device=device) for _ in range(2))
        pre = torch.empty(self.size, dtype=self.dtype, device=device)
        count = torch.empty((), dtype=torch.int64, device=device)
        pairs.split[(-(-self.size // batch.AT_ONCE),)](
            found, order, values, now.counts, token, feature, pre, count, self.size, n_tokens, columns
        )
        return Kept(token, feature, pre, count)


@lru_cache(maxsize=64)
def _programs(device: torch.device) -> int:
    """Programs of a launch that share the work among them: a few for each multiprocessor."""
    if device.type != "cuda":
        return 1  # the interpreter runs one after the other
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count

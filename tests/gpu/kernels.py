"""What each Triton kernel has to do, from what it is launched with and how pairs fall on features.

Instructions are those of the loops that `ptxas` made for sm_90; `test_compiled` holds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs

from tests.gpu import ceilings
from tests.gpu.count import Launch, Place
from tests.gpu.load import Load


@attrs.frozen
class Work:
    """What a launch needs of the GPU."""

    bytes: float = 0
    """Of its memory, read and written."""
    cached: float = 0
    """Read from the level-2 cache."""
    instructions: float = 0
    """Of a warp."""


def work_of(launch: Launch, load: Load) -> tuple[Work, bool]:
    """What a launch has to do, and whether that is known; if not, it is taken to touch each tensor once."""
    model = KERNELS.get(launch.kernel)
    if model is not None:
        return model(launch, load), True
    return Work(sum(x.bytes for x in launch.arguments.values() if isinstance(x, Place))), False


def _adam(launch: Launch, load: Load) -> Work:
    given = launch.arguments
    weight, grad, mean = given["weight"], given["grad"], given["mean"]
    moved = 2 * (weight.bytes + 2 * mean.bytes) + (2 * given["low"].bytes if given["SPLIT"] else 0)
    # A row that no pair of the step touches has no gradient to be read.
    used = 1.0
    if given["USED"]:
        untied = math.prod(given["squares"].shape) != load.n_layers * load.n_features
        used = load.rows(untied) / max(1.0, float((load.targets if untied else load.targets * 0 + 1).sum()))
    return Work(moved + used * grad.bytes, instructions=ADAM * launch.grid[0])


def _decode(launch: Launch, load: Load) -> Work:
    given = launch.arguments
    load, untied = load.of_places(given["place"].shape[0]), not given["OWN"]
    row = given["D"] * given["weight"].dtype.itemsize
    visits = load.visits(untied)
    columns = -(-given["D"] // given["COLUMNS"])
    # Programs that run together share a target and some columns: if all these rows fit, each is read once.
    fits = load.n_features * load.n_layers * row / columns < ceilings.L2_BYTES
    programs = math.prod(launch.grid)
    loops = (visits / given["PAIRS"] + 0.5 * programs / columns) * columns
    once = (load.rows(untied) if fits else visits) * row
    return Work(once + given["out"].bytes, visits * row, DECODE * loops + BEGIN * programs)


def _pieces(launch: Launch, load: Load) -> Work:
    given = launch.arguments
    load = load.of_places(given["token"].shape[0])
    row = given["D"] * given["dense"].dtype.itemsize
    visits = load.visits(given["J"] > 1, above=given["PIECE"] * 2)
    sums = visits / given["PIECE"] * given["D"] * 4 if given["ROWS"] else 0
    return Work(sums, visits * row, _walked(given) * visits + EXIT * math.prod(launch.grid))


def _gradients(launch: Launch, load: Load) -> Work:
    given = launch.arguments
    load, untied = load.of_places(given["token"].shape[0]), given["J"] > 1
    row, rows = given["D"] * given["weight"].dtype.itemsize, load.rows(untied)
    hot = load.visits(untied, above=given["HOT"]) if given["HOT"] else 0.0
    visits = load.visits(untied) - hot
    programs = math.prod(launch.grid)
    # Without pairs a row is overwritten by zeros, or left alone where it is added to.
    written = programs if given["OVERWRITE"] else 2 * rows
    moved = row * ((written if given["ROWS"] else 0) + (rows if given["DOTS"] else 0))
    moved += given["dense"].bytes if visits else 0
    moved += 4 * (visits + hot) if given["DOTS"] else 0
    cached = visits * given["D"] * given["dense"].dtype.itemsize
    instructions = _walked(given) * visits + ROW * rows + EXIT * programs
    return Work(moved, cached, instructions)


def _walked(given: dict[str, Any]) -> float:
    """Instructions for a row of the tokens' side."""
    return (WALK_BOTH if given["ROWS"] and given["DOTS"] else WALK_ONE) * max(1, given["WIDTH"] // 1024)


def _add_dots(launch: Launch, load: Load) -> Work:
    given = launch.arguments
    load = load.of_places(given["order"].shape[0])
    moved = given["order"].bytes + given["feature"].bytes + given["out"].bytes + 4 * load.visits(True)
    return Work(moved, instructions=DOT * math.prod(launch.grid))


def _add_values(launch: Launch, load: Load) -> Work:
    given = launch.arguments
    return Work(given["values"].bytes + given["out"].bytes, instructions=BEGIN * math.prod(launch.grid))


def _block(launch: Launch) -> tuple[int, int, bool]:
    """Numbers of the block that a batch's selection is shown, the layers before it, and whether it is the first."""
    given = launch.arguments
    size, first_id = given.get("size", 0), given.get("first_id", 0)
    return size, first_id // max(1, size), first_id == 0


def _listed(launch: Launch, kept: int) -> float:
    """Numbers of a block that reach the k-th best so far: where layers are alike, a share of k that falls as 1 / l.

    Nothing is known of the first one; the digits of all its numbers are counted, and about k are left.
    """
    _, layers, _ = _block(launch)
    return kept / max(1, layers)


def _mark(launch: Launch, load: Load) -> Work:
    given = launch.arguments
    size, _, first = _block(launch)
    # Before the digits are counted there is no bound for the first block; afterwards only it has a list too short.
    if (given["digits"] == 0) == first:
        return Work(instructions=EXIT * launch.grid[0])
    return Work(size * given["block"].dtype.itemsize + size / 8, instructions=MARK * size / 32)


def _list_marked(launch: Launch, load: Load) -> Work:
    given = launch.arguments
    # The first block's list is made again, by the bound that its digits gave. A list has room for twice what is kept.
    return Work(4 * given["words"] + given["found_at"].bytes / 2, instructions=given["words"] / 4)


def _count_digit(launch: Launch, load: Load) -> Work:
    given = launch.arguments
    size, _, first = _block(launch)
    if given["number"] >= DIGITS:
        return Work(instructions=EXIT * launch.grid[0])
    if size and first:
        return Work(size * given["block"].dtype.itemsize, instructions=COUNT * size / 32)
    kept = given["kept_keys"].shape[0]
    candidates = kept + (_listed(launch, kept) if size else 0)
    key = given["kept_keys"].dtype.itemsize
    return Work((key + 8) * candidates, instructions=CANDIDATE * candidates / 32)


def _keep(launch: Launch, load: Load) -> Work:
    given = launch.arguments
    kept, key = given["kept_keys"].shape[0], given["kept_keys"].dtype.itemsize
    listed = kept / max(1, given["first_id"] // max(1, load.tokens * load.n_features))
    candidates = listed + (kept if given["first_id"] else 0)
    return Work((key + 12) * (candidates + kept), instructions=CANDIDATE * candidates / 32)


def _see(launch: Launch, load: Load) -> Work:
    given = launch.arguments
    tokens, columns = given["block"].shape
    pool = given["keys"].bytes + given["ids"].bytes + given["values"].bytes
    candidates = tokens * given["places"]
    scanned = tokens * columns
    moved = scanned * given["block"].dtype.itemsize + 2 * pool
    return Work(moved, instructions=(SCAN * scanned + 2 * CANDIDATE * candidates) / 32)


ADAM = 456
"""Of a warp for 256 numbers."""
DECODE = 77
"""For 8 rows of 64 columns."""
WALK_BOTH, WALK_ONE = 141, 61
"""For 1024 columns of a token's side, of which both gradients or one are made."""
DOT = 4 * 450
"""For 256 pairs, by four warps."""
ROW, BEGIN, EXIT = 330, 60, 20
"""Of a program that has something to do, besides its loops; of a short one; of one that exits at once."""

DIGITS = 3
"""Digits of 6 bits after which hardly more than k numbers are left, where they are spread as normal numbers are."""
MARK, COUNT, CANDIDATE, SCAN = 6, 50, 75, 14
"""Of a thread, for each number that is marked; whose digit is counted in a block; that is listed; that the program of a
token looks at."""

KERNELS: dict[str, Callable[[Launch, Load], Work]] = {
    "adam": _adam,
    "decode": _decode,
    "pieces": _pieces,
    "gradients": _gradients,
    "add_dots": _add_dots,
    "add_values": _add_values,
    "mark": _mark,
    "list_marked": _list_marked,
    "count_digit": _count_digit,
    "keep": _keep,
    "see": _see,
}

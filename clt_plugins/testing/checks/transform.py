"""Checks for `[[transforms]]`: see `clt_plugins.contract.reading.transform.Transform`.

Batches are made up here: rows of normal numbers with token ids and positions, so that a row can be told from others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from clt_plugins.contract.stateful import Stateful
from clt_plugins.data.batch import Batch
from clt_plugins.data.random import generator
from clt_plugins.distributed.single import Single
from clt_plugins.distributed.transformed import TransformedSource
from clt_plugins.model.assemble import assemble
from clt_plugins.testing.bench import D_MODEL, LAYERS, TOKENS, Bench
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import Nonconformance, complain, expect, message, same

CONTEXT = 8
"""Tokens of a text that follow each other."""
BATCHES = 9
"""How many training batches the checks read."""
KNOWN = 0.9
"""A row is told by the nearest row that went in, if the cosine between them is higher: of others it is about 0."""
NAMES = ("inputs", "targets", "token_ids", "positions")


class Rows:
    """A `Source` of made-up rows; each batch follows from its number."""

    n_layers, d_model = LAYERS, D_MODEL

    def __init__(self, rank: int = 0, ranks: int = 1):
        share = TOKENS // ranks
        self.own, self.count = slice(rank * share, (rank + 1) * share), 0

    def next(self) -> Batch:
        self.count += 1
        return rows("train", self.count - 1).rows(self.own)

    def held_out(self, tokens: int) -> Iterator[Batch]:
        for number, left in enumerate(range(tokens, 0, -TOKENS)):
            yield rows("held out", number).rows(slice(0, left))

    def statistics(self) -> Mapping[str, Tensor] | None:
        return None

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def rows(part: str, number: int) -> Batch:
    """A batch of 16 rows: two contexts of 8 tokens.

    In every second batch a transform that drops rows finds some: few different tokens, of which neighbours are equal,
    contexts that alternate, and a first token of each that is 30 times as large as others, as language models have it.
    """
    draw = generator(0, "rows of a transform", part, number)
    inputs, targets = (torch.randn(TOKENS, LAYERS, D_MODEL, generator=draw) for _ in range(2))
    token_ids = torch.randint(50, (TOKENS,), generator=draw)
    place = torch.arange(TOKENS)
    context, place = place // CONTEXT, place % CONTEXT
    if number % 2:
        context, place = torch.arange(TOKENS) % 2, torch.arange(TOKENS) // 2
        token_ids = token_ids % 3
        token_ids[2::4] = token_ids[::4]
        for x in (inputs, targets):
            x[place == 0] *= 30
    positions = torch.stack([number * (TOKENS // CONTEXT) + context, place], 1)
    return Batch(inputs, targets, token_ids, positions)


class Silent(Single):
    """Ranks that a transform must not talk to."""

    def total(self, x: Tensor, over: str = "features", what: str = "metrics") -> Tensor:
        text = message(
            "a transform that asks no other rank: one that cannot read would let the others wait",
            "`parallel.total` in `__call__`",
            "`__call__`: let what it does depend on the row alone",
        )
        raise Nonconformance(text)


def opened(bench: Bench, parallel: Single | None = None) -> TransformedSource:
    """The transform as a run builds it, around made-up rows."""
    parallel = parallel or Single()
    parts = assemble(bench.recipe(), bench.folder, torch.device("cpu"), parallel)
    return TransformedSource(
        Rows(parallel.data_rank, parallel.data_ranks), [(bench.choice, parts.transforms[0])], parts.context
    )


def equal(actual: Batch, expected: Batch, what: str, look: str) -> None:
    """Two batches, bit for bit."""
    expect(actual.tokens == expected.tokens, f"{what} of {expected.tokens} rows", str(actual.tokens), look)
    for name in NAMES:
        same(getattr(actual, name), getattr(expected, name), f"{name} of {what}", look)


@check("transforms", trial=True, basic=True)
def batches(bench: Bench) -> None:
    """A batch of the right shape and type comes back, finite, for 16 rows, one and none; the one given stays."""
    source = opened(bench)
    one: Any = source.transforms[0]
    for name in ("held_out", "drops"):
        value = getattr(one, name)
        expect(type(value) is bool, f"`{name}`, True or False", repr(value), "the class of what `build` returns")
    numbers = [*range(BATCHES), *(range(-4, 0) if one.held_out else ())]
    for number, tokens in [*((number, TOKENS) for number in numbers), (0, 1), (0, 0)]:
        batch = (rows("train", number) if number >= 0 else rows("held out", -1 - number)).rows(slice(0, tokens))
        before = {name: getattr(batch, name).clone() for name in NAMES}
        new = source._apply(batch, number).batch
        for name, value in before.items():
            look = "`__call__`: a change in place: clone first"
            same(getattr(batch, name), value, f"{name} as it was: the batch is not the transform's", look)
        for side in ("inputs", "targets"):
            x, given = getattr(new, side), getattr(batch, side)
            right = x.dtype == given.dtype and x.device == given.device
            what = f"{side} of the type and on the device that it got, {given.dtype} on {given.device}"
            expect(right, what, f"{x.dtype} on {x.device}", "`__call__`")
            expect(bool(torch.isfinite(x).all()), f"finite {side} for {tokens} rows", "inf or NaN", "`__call__`")


@check("transforms")
def alignment(bench: Bench) -> None:
    """Inputs, targets, token id and position of a row stay together."""
    source = opened(bench)
    for number in range(BATCHES):
        batch = rows("train", number)
        new = source._apply(batch, number).batch
        if not new.tokens:
            continue
        assert new.positions is not None and batch.positions is not None
        assert new.token_ids is not None and batch.token_ids is not None
        position = (new.positions[:, None] - batch.positions).abs().sum(2) == 0
        look = "`__call__`: `batch.rows(index)` picks rows of all four at once"
        expect(bool(position.any(1).all()), "positions that went in", "others", look)
        origin = position.int().argmax(1)
        same(new.token_ids, batch.token_ids[origin], "the token id of each position", look)
        for side in ("inputs", "targets"):
            got, given = (torch.nn.functional.normalize(getattr(x, side).flatten(1), dim=1) for x in (new, batch))
            nearest = (got @ given.T).max(1)
            moved = (nearest.values > KNOWN) & (nearest.indices != origin)
            expect(
                not bool(moved.any()), f"{side} of the same row as its position", f"{int(moved.sum())} of others", look
            )


@check("transforms")
def determinism(bench: Bench) -> None:
    """Built and called twice, it gives the same bits, whatever was drawn from torch's own generator."""
    with torch.random.fork_rng():
        found = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            source = opened(bench)
            found.append([source.next() for _ in range(3)])
    for number, (first, second) in enumerate(zip(*found, strict=True)):
        look = "random numbers: draw them from `clt_plugins.generator(context.seed, NAME, number)`"
        equal(second, first, f"batch {number} in a second run", look)


@check("transforms", needs=("determinism",))
def resume(bench: Bench) -> None:
    """A run that is resumed gets the batches that would have come next, bit for bit, rows left over included."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        source, states, expected = opened(bench), [], []
        for _ in range(BATCHES):
            states.append(json.loads(json.dumps(source.state())))
            expected.append(source.next())
        for step in (1, 4, BATCHES - 1):
            torch.manual_seed(0)
            again = opened(bench)
            again.load_state(states[step])
            for number in range(step, BATCHES):
                look = "what a call changes: give it by `state` and `load_state`, or let it follow from `number`"
                equal(again.next(), expected[number], f"batch {number}, resumed after {step}", look)


@check("transforms", needs=("determinism", "resume"))
def held_out(bench: Bench) -> None:
    """A held-out pass gives the same batches each time, and changes nothing for training; where `held_out` is False it
    gives what the source does."""
    source, other = opened(bench), opened(bench)
    transform: Any = source.transforms[0]
    first, tokens = list(source.held_out(2 * TOKENS)), 0
    for batch in first:
        tokens += batch.tokens
    expect(tokens <= 2 * TOKENS, f"at most {2 * TOKENS} rows", str(tokens), "`__call__`")
    if isinstance(transform, Stateful):
        before = transform.state()
        list(source.held_out(2 * TOKENS))
        same_state = transform.state() == before
        expect(
            same_state, "the same state after a held-out pass", "another", "`__call__`: numbers below 0 are held out"
        )
    for number in range(3):
        look = "`__call__`: for numbers below 0, which are held-out batches, it must change nothing of its own"
        equal(source.next(), other.next(), f"training batch {number} after a held-out pass", look)
    again = list(source.held_out(2 * TOKENS))
    expect(len(again) == len(first), f"{len(first)} held-out batches again", str(len(again)), "`__call__`")
    for number, (new, old) in enumerate(zip(again, first, strict=True)):
        equal(new, old, f"held-out batch {number} at the second pass", "`__call__`: what follows from `number` alone")
    if not transform.held_out:
        for number, (new, old) in enumerate(zip(first, Rows().held_out(2 * TOKENS), strict=True)):
            equal(new, old, f"held-out batch {number} as the source gives it", "`held_out`")


@check("transforms", needs=("determinism", "resume"))
def ranks(bench: Bench) -> None:
    """On two data ranks it has the same state on both, asks no other rank, and, if it drops nothing, gives each its
    share of what one process gets."""
    whole, halves = opened(bench), [opened(bench, Silent(rank, 2)) for rank in range(2)]
    drops = whole.drops
    for number in range(4):
        parts = [half._read().batch for half in halves]
        batch = whole._read().batch
        if not drops:
            look = (
                "`__call__`: what it does to a row must not depend on the other rows; random numbers are drawn for "
                "the batch of all data ranks, of which each takes its slice"
            )
            for name in NAMES:
                both = torch.cat([getattr(part, name) for part in parts])
                same(both, getattr(batch, name), f"{name} of batch {number} on 2 data ranks as on one", look)
    states = [half.transforms[0].state() for half in halves if isinstance(half.transforms[0], Stateful)]
    if states and states[0] != states[1]:
        look = "`__call__`: its state must follow from `number`, since each data rank has other rows"
        complain("the same state on both data ranks", "another: a checkpoint holds that of rank 0", look)

"""Checks for `[source]`: see `clt_plugins.contract.reading.source.Source`.

A row's identity is its `positions` where the source gives them, else its numbers; rows of zeros have none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import SkipTest

import torch

from clt_plugins.contract.reading.source import Closable
from clt_plugins.data.batch import Batch
from clt_plugins.distributed.single import Single
from clt_plugins.model.assemble import build_source
from clt_plugins.testing.bench import TOKENS, Bench
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import expect, same

BATCHES = 7
"""How far the checks read."""


@contextmanager
def opened(bench: Bench, rank: int = 0, ranks: int = 1) -> Iterator[Any]:
    """The source as a run builds it, closed afterwards."""
    source = build_source(bench.recipe(), Single(rank, ranks))
    try:
        yield source
    finally:
        if isinstance(source, Closable):
            source.close()


def rows(batch: Batch) -> list[Any]:
    """The identity of each row; rows of zeros have none."""
    return numbers(batch) if batch.positions is None else [tuple(position) for position in batch.positions.tolist()]


def numbers(batch: Batch) -> list[Any]:
    """The bytes of each row, without rows of zeros."""
    flat = torch.cat([batch.inputs.flatten(1), batch.targets.flatten(1)], 1).cpu()
    return [bytes(row.tolist()) for row in flat[(flat != 0).any(1)].contiguous().view(torch.uint8)]


def equal(actual: Batch, expected: Batch, what: str, look: str) -> None:
    for name in ("inputs", "targets"):
        same(getattr(actual, name), getattr(expected, name), f"{what}: {name}", look)


@check("source", trial=True, basic=True)
def batches(bench: Bench) -> None:
    """Every batch has exactly the tokens of `train.batch_tokens`, L layers and D dimensions, finite and detached."""
    with opened(bench) as source:
        for name in ("n_layers", "d_model"):
            value = getattr(source, name, None)
            expect(type(value) is int and value > 0, f"`{name}`, an int above 0", repr(value), "`__init__`")
        for number in range(BATCHES):
            batch = source.next()
            expect(isinstance(batch, Batch), "a clt_plugins.Batch", type(batch).__name__, "`next`")
            shape = [TOKENS, source.n_layers, source.d_model]
            expect(
                list(batch.inputs.shape) == shape,
                f"batch {number} of exactly context.batch_tokens: {shape}",
                str(list(batch.inputs.shape)),
                "`next`: a rest at the end of a file or block joins the next batch",
            )
            for name, x in (("inputs", batch.inputs), ("targets", batch.targets)):
                expect(x.is_floating_point(), f"floating {name}", str(x.dtype), "`next`")
                expect(bool(torch.isfinite(x).all()), f"finite {name}", "inf or NaN", "`next`")
                expect(not x.requires_grad, f"detached {name}", "they require a gradient", "`next`")


@check("source")
def determinism(bench: Bench) -> None:
    """Two sources of one seed give the same batches bit for bit."""
    with opened(bench) as source, opened(bench) as second:
        for number in range(3):
            torch.manual_seed(number)
            expected = source.next()
            torch.manual_seed(number + 100)
            look = "random numbers: a `clt_plugins.generator(context.seed, ...)`, not torch's own; sorted files"
            equal(second.next(), expected, f"batch {number} of a second run", look)


@check("source", needs=("determinism",))
def resume(bench: Bench) -> None:
    """After loading any `state()`, written as JSON and read back, the same batches follow."""
    with opened(bench) as source:
        states, following = [], []
        for _ in range(BATCHES):
            state = source.state()
            try:
                text = json.dumps(state, allow_nan=False)
            except (TypeError, ValueError) as error:
                expect(False, "a state that JSON can hold", str(error), "`state`: numbers, strings, lists, dicts")
            expect(len(text) < 65536, "a small state", f"{len(text)} bytes", "`state`: say where, not what")
            states.append(text)
            following.append(source.next())
    for start in range(0, BATCHES, 2):
        with opened(bench) as source:
            if start % 4:
                source.next()  # a source that was already read must continue there too
            source.load_state(json.loads(states[start]))
            expect(
                json.loads(json.dumps(source.state())) == json.loads(states[start]),
                f"the state that was loaded: {states[start][:200]}",
                json.dumps(source.state())[:200],
                "`state` right after `load_state`",
            )
            for number in range(start, BATCHES):
                equal(
                    source.next(),
                    following[number],
                    f"batch {number} after resuming before batch {start}",
                    "`state` and `load_state`: what else does `next` depend on (a buffer, an order, a generator)?",
                )


@check("source", needs=("resume",))
def exactly_once(bench: Bench) -> None:
    """No row comes twice before the data are used up, whether the run is interrupted or not."""
    with opened(bench) as source:
        seen = [row for _ in range(3) for row in rows(source.next())]
        state = json.dumps(source.state())
    with opened(bench) as source:
        source.load_state(json.loads(state))
        seen += [row for _ in range(3, BATCHES) for row in rows(source.next())]
    twice = len(seen) - len(set(seen))
    expect(
        twice == 0,
        f"{len(seen)} different rows, resumed after {3 * TOKENS}",
        f"{twice} of them came before",
        "`load_state` and the order of rows; if the data are really shorter, give the check more by `settings`",
    )


@check("source")
def held_out(bench: Bench) -> None:
    """Held-out batches are the same at each call and on any number of ranks, have at most the tokens asked for, and are
    never trained on; reading them does not move the stream."""
    tokens = 5 * TOKENS // 2
    with opened(bench) as source:
        first = list(source.held_out(tokens))
        trained = {row for _ in range(BATCHES) for row in numbers(source.next())}
        again = list(source.held_out(tokens))
    with opened(bench, 1, 2) as source:
        on_two = list(source.held_out(tokens))
    count = sum(batch.tokens for batch in first)
    expect(0 < count <= tokens, f"up to {tokens} tokens, and some", str(count), "`held_out`")
    expect(
        len(again) == len(first), f"{len(first)} batches again", str(len(again)), "`held_out`: the same at each call"
    )
    for number, (expected, batch) in enumerate(zip(first, again, strict=True)):
        equal(batch, expected, f"held-out batch {number} at the second call", "`held_out`: the same at each call")
    sizes = [batch.tokens for batch in first]
    look = "`held_out`: batches as large as context.batch_tokens, for any number of ranks"
    expect(sizes == [batch.tokens for batch in on_two], f"batches of {sizes} on two ranks, as on one", "others", look)
    for number, (expected, batch) in enumerate(zip(first, on_two, strict=True)):
        equal(batch, expected, f"held-out batch {number} on two ranks", look)
    read = {row for batch in first for row in numbers(batch)}
    both = len(trained & read)
    # Texts with the same beginning have equal rows there, so a few rows may be on both sides.
    expect(both <= 0.2 * count, "held-out rows that are never trained on", f"{both} of {count} are", "the split")
    with opened(bench) as calm, opened(bench) as reader:
        for number in range(3):
            list(reader.held_out(tokens))
            equal(
                reader.next(),
                calm.next(),
                f"training batch {number} after `held_out`",
                "what `held_out` shares with `next`",
            )


@check("source")
def statistics(bench: Bench) -> None:
    """`statistics` returns None; or finite `mean`, `std` [L, D] and `rms` [L] of inputs and targets."""
    with opened(bench) as source:
        statistics = source.statistics()
        if statistics is None:
            raise SkipTest("None: estimated from the first batches")
        shapes = {
            f"{side}.{name}": shape
            for side in ("inputs", "targets")
            for name, shape in (
                ("mean", (source.n_layers, source.d_model)),
                ("std", (source.n_layers, source.d_model)),
                ("rms", (source.n_layers,)),
            )
        }
        actual = {name: tuple(x.shape) for name, x in statistics.items()}
        expect(shapes.items() <= actual.items(), f"{shapes}", f"{actual}", "`statistics`")
        for name in shapes:
            expect(bool(torch.isfinite(statistics[name]).all()), f"finite {name}", "inf or NaN", "`statistics`")


@check("source")
def ranks(bench: Bench) -> None:
    """Two data ranks get half a batch each; no row goes to both, and none comes twice."""
    with opened(bench, 0, 2) as first, opened(bench, 1, 2) as second:
        parts: list[list[Any]] = [[], []]
        for _ in range(BATCHES):
            for part, source in zip(parts, (first, second), strict=True):
                batch = source.next()
                expect(
                    batch.tokens == TOKENS // 2,
                    f"{TOKENS // 2} tokens on each of 2 data ranks",
                    str(batch.tokens),
                    "`next`: context.batch_tokens is that of all ranks; use context.batch_share()",
                )
                part += rows(batch)
    shared = set(parts[0]) & set(parts[1])
    look = "`next`: which rows are those of context.parallel.data_rank"
    expect(not shared, "rows that go to one data rank only", f"{len(shared)} go to both", look)
    expect(len(set(parts[0])) == len(parts[0]), "no row twice on a rank", "some", look)

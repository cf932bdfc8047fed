"""Batches after transforms on one rank: which rows, in which order, resumed, refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import attrs
import pytest
import torch

from clt_plugins import Batch, Refused
from clt_plugins.contract.reading.source import Buffered, Closable, HasModel, Identified
from clt_plugins.distributed.transformed import MOST_EMPTY, TransformedSource, load_position
from clt_plugins.errors import WrongReturn
from tests.support.transformed import BATCH, Keep, Numbered, Renumber, ids, opened


def rows_of(batches: Iterable[Batch]) -> list[int]:
    return [n for batch in batches for n in ids(batch)]


def sparse(n: int) -> bool:
    """Very uneven: none of 60 rows, then two of five."""
    return n % 100 >= 60 and n % 5 < 2


def test_rows_come_in_their_order_and_every_batch_is_full() -> None:
    source = opened(Keep(sparse))
    got = [ids(source.next()) for _ in range(20)]
    assert all(len(batch) == BATCH for batch in got)
    assert [n for batch in got for n in batch] == [n for n in range(5000) if sparse(n)][: 20 * BATCH]


def test_a_transform_that_drops_nothing_reads_one_batch_for_one_and_keeps_the_source_s_position() -> None:
    source = opened(Renumber())
    for number in range(3):
        assert set(source.next().targets.flatten().tolist()) == {1000.0 * (number + 1) + number}
    assert source.state() == {"of_source": {"count": 3}, "number": 3, "transforms": [3]}


@pytest.mark.parametrize("test", [sparse, lambda n: n % 2 == 0, lambda n: True, lambda n: n % 8 == 7])
def test_resumed_after_any_batch_it_goes_on_bit_for_bit(test: Callable[[int], bool]) -> None:
    def fresh() -> TransformedSource:
        return opened(Renumber(), Keep(test))

    whole, states, batches = fresh(), [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(whole.state())))
        batches.append(whole.next())
    for step, state in enumerate(states):
        again = fresh()
        again.next()  # it may have been read before
        again.load_state(state)
        assert again.state() == state
        for expected in batches[step:]:
            batch = again.next()
            assert torch.equal(batch.inputs, expected.inputs)
            assert torch.equal(batch.targets, expected.targets)
        assert again.state() == whole.state()


def test_dropped_rows_are_counted_for_each_transform_and_the_count_is_resumed() -> None:
    source = opened(Keep(lambda n: n % 2 == 0), Renumber())
    source.next()
    state = source.state()
    assert source.take_counts() == {"transforms/keep_dropped": 8}
    source.next()
    assert source.take_counts() == {"transforms/keep_dropped": 8}
    source.load_state(state)
    source.next()
    assert source.take_counts() == {"transforms/keep_dropped": 16}


def test_what_drops_every_row_is_refused_by_name() -> None:
    source = opened(Renumber(), Keep(lambda n: n < 12))
    assert ids(source.next()) == list(range(8))
    with pytest.raises(Refused, match=rf"every row of {MOST_EMPTY} batches in a row: 'keep' dropped most of them"):
        source.next()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda batch: None, "a Batch, got NoneType"),
        (lambda batch: batch.rows(slice(1, None)), "8 rows, got 7: one that drops rows says `drops = True`"),
        (lambda batch: Batch(batch.inputs[:, :2], batch.targets[:, :2]), r"activations of \[3, 2\], got \[2, 2\]"),
        (lambda batch: Batch(batch.inputs, batch.targets), "token_ids as it got them, got none"),
        (lambda batch: attrs.evolve(batch, positions=batch.positions[1:]), "positions of each of its 8 rows, got 7"),
    ],
)
def test_what_a_transform_may_not_return(change: Callable[[Batch], Any], text: str) -> None:
    class Wrong:
        held_out, drops = True, False

        def __call__(self, batch: Batch, number: int) -> Any:
            return change(batch)

    with pytest.raises(WrongReturn, match=f"a transform must return {text}"):
        opened(Wrong()).next()


def test_held_out_batches_are_transformed_where_it_says_so_and_filled_up() -> None:
    kept = [n for n in range(10_000, 12_000) if n % 3 == 0]
    assert rows_of(opened(Keep(lambda n: n % 3 == 0)).held_out(20)) == kept[:20]
    plain = rows_of(opened(Keep(lambda n: n % 3 == 0, held_out=False)).held_out(20))
    assert plain == list(range(10_000, 10_020))
    assert [int(batch.targets[0, 0, 0]) for batch in opened(Renumber()).held_out(20)] == [-1, -2, -3]
    assert list(opened(Keep(lambda n: False)).held_out(20)) == []


def test_stored_statistics_are_not_those_of_transformed_batches() -> None:
    assert opened(Renumber()).statistics() is None


def test_the_source_s_abilities_stay() -> None:
    source = opened(Renumber())
    assert isinstance(source, Identified) and isinstance(source, Closable)
    assert not isinstance(source, HasModel) and not isinstance(source, Buffered)
    assert source.identity() == {"source": "numbers"}


def test_a_position_of_a_run_with_transforms_is_one_of_the_source_too() -> None:
    plain = Numbered()
    source = opened(Keep(sparse))
    source.next()
    load_position(plain, source.state())
    assert plain.count == source.state()["of_source"]["count"] > 0
    source.load_state({"count": 5})
    assert source.state()["of_source"] == {"count": 5}

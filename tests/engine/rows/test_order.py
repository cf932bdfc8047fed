"""The order of stored rows: a permutation for every key."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clt_plugins.rows.order import Order, Permutation


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1000, 4097])
def test_a_permutation_hits_every_number_once_and_its_inverse_undoes_it(count: int) -> None:
    for key in range(3):
        permutation = Permutation(count, key)
        found = [permutation(number) for number in range(count)]
        assert sorted(found) == list(range(count))
        assert [permutation.inverse(number) for number in found] == list(range(count))


def test_permutations_of_other_keys_differ_and_leave_no_order() -> None:
    one, two = ([Permutation(1000, key)(n) for n in range(1000)] for key in (0, 1))
    assert one != two
    # Of a random permutation one number stays in place on average, and neighbours are as often up as down: 500 +- 9.
    assert sum(n == at for at, n in enumerate(one)) < 8
    assert 455 < sum(a < b for a, b in itertools.pairwise(one)) < 545


def test_every_place_is_as_likely_for_a_number() -> None:
    counts = [0] * 10
    for key in range(2000):
        counts[Permutation(10, key)(3)] += 1
    # 200 expected, with a standard deviation of 13.4.
    assert all(abs(count - 200) < 60 for count in counts)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 12), st.integers(0, 9))
def test_an_order_has_every_row_of_every_chunk_once(chunks: list[int], block_rows: int, key: int) -> None:
    order = Order(chunks, block_rows, key)
    blocks = [order.block(place) for place in range(order.blocks)]
    rows = [(chunk, begin + n) for chunk, begin, count in blocks for n in range(count)]
    assert sorted(rows) == [(chunk, row) for chunk, size in enumerate(chunks) for row in range(size)]
    assert all(begin % block_rows == 0 for _, begin, _ in blocks)
    before = [0, *itertools.accumulate(count for *_, count in blocks)]
    assert [order.before(place) for place in range(order.blocks + 1)] == before
    places = [place for place, (*_, count) in enumerate(blocks) for _ in range(count)]
    assert [order.position(row) for row in range(len(rows))] == places

"""Rows dealt to ranks: each of every epoch once, whatever the number of ranks becomes, and whenever."""

from __future__ import annotations

import json
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clt_plugins.rows.deal import Deal


class Ranks:
    """All ranks of a run, which read in step like the ranks of a real one."""

    def __init__(self, count: int, buffer: int, epoch: int):
        group = min(buffer * count, epoch)
        self.deals = [Deal(3, group, rank, count, epoch=epoch) for rank in range(count)]
        self.position = 0

    def read(self, rows: int) -> list[int]:
        """The numbers of the next rows of every rank."""
        out = []
        for deal in self.deals:
            position, end = self.position, self.position + rows
            while position < end:
                group = deal.at(position)
                assert group.start <= position < group.start + group.count
                order = group.order(3)[position - group.start : end - group.start]
                numbers = torch.as_tensor(list(group.rows))
                assert group.begin <= int(numbers[0]) and int(numbers[-1]) < group.end
                out += numbers[order].tolist()
                position += len(order)
        self.position += rows
        return out

    def state(self) -> str:
        (state,) = {json.dumps(deal.state(self.position)) for deal in self.deals}
        return state

    def load(self, state: str) -> None:
        (self.position,) = {deal.load_state(json.loads(state)) for deal in self.deals}


@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 5))
def test_ranks_are_dealt_every_row_of_every_epoch_once(epoch: int, buffer: int, count: int) -> None:
    ranks = Ranks(count, buffer, epoch)
    # Each rank's part of three epochs is a whole number of rows if each epoch is counted `count` times.
    seen = ranks.read(3 * epoch)
    assert sorted(seen) == list(range(3 * epoch * count))


@settings(max_examples=200)
@given(st.integers(12, 90), st.integers(12, 40), st.randoms(use_true_random=False))
def test_a_chain_of_other_numbers_of_ranks_loses_and_repeats_no_row(
    epoch: int, buffer: int, draw: random.Random
) -> None:
    """Also several changes within one group, back and forth, and with other buffers."""
    ranks, seen, longest = Ranks(1, buffer, epoch), [], 0
    for _ in range(12):
        for _ in range(draw.randrange(4)):
            seen += ranks.read(12 // len(ranks.deals))
        state = ranks.state()
        longest = max(longest, len(state))
        ranks = Ranks(draw.choice([1, 2, 3, 4, 6]), draw.choice([buffer, buffer, 12]), epoch)
        ranks.load(state)
    assert longest < 400
    epochs = max(seen, default=0) // epoch + 1
    for _ in range((epochs * epoch - len(seen)) // 12 + 1 + 6 * 40 // 12):  # what is left, and a group
        seen += ranks.read(12 // len(ranks.deals))
    assert len(set(seen)) == len(seen)
    assert set(range(epochs * epoch)) <= set(seen)


def test_to_other_ranks_and_back_without_a_row_is_as_if_nothing_had_been() -> None:
    one, other = Ranks(2, 12, 50), Ranks(3, 12, 50)
    one.read(6)
    before = one.state()
    other.load(before)
    again = Ranks(2, 12, 50)
    again.load(other.state())
    assert again.state() == before
    assert again.read(20) == one.read(20)


def test_after_the_rows_that_were_left_a_state_is_as_small_as_before() -> None:
    ranks = Ranks(2, 12, 1000)
    ranks.read(6)
    state = ranks.state()
    ranks = Ranks(3, 12, 1000)
    ranks.load(state)
    assert json.loads(ranks.state())["turns"] == [[0, 2, 24], [12, 3, 36]]
    ranks.read(4)
    assert json.loads(ranks.state()) == {"rows": 24, "grid": 24, "turns": [[12, 3, 36]]}

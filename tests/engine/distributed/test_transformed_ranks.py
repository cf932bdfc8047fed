"""Batches after transforms on two ranks: read in step, no row twice, and no rank waits for one that failed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from clt_plugins import Refused, Single
from clt_plugins.distributed.reading import Reading
from clt_plugins.distributed.transformed import alone
from clt_plugins.errors import Stopped
from clt_plugins.training.saved.resume import Before, check_data_ranks
from tests.support.transformed import BATCH, Keep, Renumber, ids, opened


class Meeting:
    """Where the threads of some ranks meet: each gets the sum of what all bring."""

    def __init__(self, world: int):
        self.barrier, self.brought = threading.Barrier(world, timeout=20), {}

    def total(self, rank: int, x: Tensor) -> Tensor:
        self.brought[rank] = x.clone()
        self.barrier.wait()
        out = sum(self.brought.values(), torch.zeros_like(x))
        self.barrier.wait()
        return out


class Threads(Single):
    """Data ranks in threads of one process."""

    def __init__(self, rank: int, meeting: Meeting):
        super().__init__(rank, meeting.barrier.parties)
        self.meeting = meeting

    def total(self, x: Tensor, over: str = "features", what: str = "metrics") -> Tensor:
        return self.meeting.total(self.rank, x)

    def gather(self, text: str) -> list[str]:
        table = torch.zeros(self.world, 4096, dtype=torch.int64)
        table[self.rank, : len(text)] = torch.tensor([ord(letter) for letter in text])
        return ["".join(chr(n) for n in row if n) for row in self.total(table).tolist()]


def on_two_ranks(function: Callable[[int, Threads], Any]) -> list[Any]:
    """What the function returns on each rank, or the exception that it raises."""
    meeting, results = Meeting(2), [None, None]

    def call(rank: int) -> None:
        try:
            results[rank] = function(rank, Threads(rank, meeting))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return results


def unlike(n: int) -> bool:
    """Keeps all rows of the first half of a batch, and one of four of the second."""
    return n % BATCH < BATCH // 2 or n % 4 == 0


def read(rank: int, parallel: Threads, state: Any = None) -> tuple[list[list[int]], list[Any], dict[str, int]]:
    source = opened(Keep(unlike), parallel=parallel, rank=rank, ranks=2)
    if state is not None:
        source.load_state(state)
    batches, states = [], []
    for _ in range(9):
        batches.append(ids(source.next()))
        states.append(json.loads(json.dumps(source.state())))
    return batches, states, source.take_counts()


def test_two_data_ranks_read_in_step_have_one_state_and_use_no_row_twice() -> None:
    (first, states, counts), (second, others, same_counts) = on_two_ranks(read)
    assert states == others and counts == same_counts
    assert {len(batch) for batch in first + second} == {BATCH // 2}
    for batches, rank in ((first, 0), (second, 1)):
        rows = [n for batch in batches for n in batch]
        assert rows == sorted(set(rows))
        assert all(n % BATCH // (BATCH // 2) == rank and unlike(n) for n in rows)
    # The poorer rank loses no row, and of the other's as many are left out as it has more.
    rows = [n for batch in second for n in batch]
    assert rows == [n for n in range(rows[-1] + 1) if n % BATCH >= BATCH // 2 and unlike(n)]
    raw = states[-1]["of_source"]["count"] + (states[-1]["left"] > 0)
    kept = [sum(unlike(n) for n in range(raw * BATCH) if n % BATCH // 4 == rank) for rank in range(2)]
    trained_on = 9 * BATCH // 2 + states[-1]["left"]
    assert counts == {
        "transforms/keep_dropped": raw * BATCH - sum(kept),
        "transforms/uneven_dropped": sum(kept) - 2 * trained_on,
    }
    for step in range(3):
        again = on_two_ranks(lambda rank, parallel, step=step: read(rank, parallel, states[step]))
        assert [batches[: 8 - step] for batches, _, _ in again] == [first[step + 1 :], second[step + 1 :]]


def test_a_rank_that_cannot_read_leaves_no_other_waiting() -> None:
    def failing(rank: int, parallel: Threads) -> None:
        def test(n: int) -> bool:
            if rank == 1 and n > 30:
                raise OSError("the disk is gone")
            return unlike(n)

        reading = Reading(opened(Keep(test), parallel=parallel, rank=rank, ranks=2), parallel, torch.device("cpu"))
        for _ in range(20):
            reading.next()
            reading.check()

    told, silent = on_two_ranks(failing)
    assert isinstance(told, OSError) and "rank 1: the disk is gone" in str(told)
    assert isinstance(silent, Stopped)


def test_a_rank_reads_alone_while_others_wait_and_is_put_back() -> None:
    source = opened(Keep(unlike), parallel=Threads(0, Meeting(2)), ranks=2)
    state = source.state()
    with alone(source):  # else the first read would wait for the other rank
        assert [ids(source.next()), ids(source.next())] == [[0, 1, 2, 3], [8, 9, 10, 11]]
    source.load_state(state)
    assert source.state() == state


def test_another_number_of_data_ranks_is_refused_unless_accepted(tmp_path: Any) -> None:
    drops, keeps = opened(Keep(unlike), ranks=2), opened(Renumber(), ranks=2)
    before = Before(folder=tmp_path, step=1, tables={}, identity={}, data_ranks=1)
    with pytest.raises(
        Refused, match=r"transforms: .*number of data ranks: .* it was 1, now it is 2; .*--accept transforms"
    ):
        check_data_ranks(before, drops, ())
    check_data_ranks(before, drops, ("transforms",))
    check_data_ranks(before, keeps, ())
    check_data_ranks(attrs.evolve(before, data_ranks=2), drops, ())
    # Accepted, the rows that were left are divided.
    one = opened(Keep(unlike))
    one.next()
    left = one.state()["left"]
    drops.load_state(one.state())
    assert drops.state()["left"] == left // 2

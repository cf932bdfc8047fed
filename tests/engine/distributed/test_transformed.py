"""Batches after transforms: which rows, in which order, on one rank and two, resumed, refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from clt_plugins import Batch, PluginError, Refused, Single, load_plugins, run
from clt_plugins.contract.reading.source import Buffered, Closable, HasModel, Identified
from clt_plugins.distributed.reading import Reading
from clt_plugins.distributed.transformed import MOST_EMPTY, TransformedSource, alone, load_position
from clt_plugins.errors import Stopped, WrongReturn
from clt_plugins.model.assemble import make_context
from clt_plugins.training.plan.build import plan
from clt_plugins.training.resume import Before, check_data_ranks
from tests.engine.training.test_run import assert_bit_identical
from tests.support.helpers import parts, plugins, recipe, tables

BATCH = 8
L, D = 3, 2


class Numbered:
    """Row n has n in every number; rank r of R has the r-th part of each batch."""

    n_layers, d_model = L, D

    def __init__(self, rank: int = 0, ranks: int = 1):
        self.rank, self.share, self.count = rank, BATCH // ranks, 0

    def next(self) -> Batch:
        self.count += 1
        first = (self.count - 1) * BATCH + self.rank * self.share
        return numbered(range(first, first + self.share))

    def held_out(self, tokens: int) -> Iterator[Batch]:
        for first in range(0, tokens, BATCH):
            yield numbered(range(10_000 + first, 10_000 + min(first + BATCH, tokens)))

    def statistics(self) -> dict[str, Tensor]:
        return {"inputs.mean": torch.zeros(L, D)}

    def state(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]

    def identity(self) -> dict[str, str]:
        return {"source": "numbers"}

    def close(self) -> None:
        self.closed = True


def numbered(numbers: Sequence[int]) -> Batch:
    rows = torch.tensor(list(numbers), dtype=torch.float32)[:, None, None].expand(-1, L, D)
    ids = torch.tensor(list(numbers))
    return Batch(rows.clone(), rows + 0.5, ids, torch.stack([ids // 4, ids % 4], 1))


class Keep:
    """Keeps the rows whose number passes a test."""

    drops = True

    def __init__(self, test: Callable[[int], bool], held_out: bool = True):
        self.test, self.held_out = test, held_out

    def __call__(self, batch: Batch, number: int) -> Batch:
        assert batch.token_ids is not None
        return batch.rows(torch.tensor([self.test(n) for n in batch.token_ids.tolist()], dtype=torch.bool))


class Renumber:
    """Writes the batch's number into the targets; counts its calls in training."""

    held_out, drops = True, False

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: Batch, number: int) -> Batch:
        self.calls += number >= 0
        return attrs.evolve(batch, targets=torch.full_like(batch.targets, 1000 * self.calls + number))

    def state(self) -> int:
        return self.calls

    def load_state(self, state: int) -> None:
        self.calls = state


def opened(*transforms: Any, parallel: Any = None, rank: int = 0, ranks: int = 1) -> TransformedSource:
    context = make_context(recipe(train={"batch_tokens": BATCH}), parallel=parallel or Single(rank, ranks))
    named = [(f"{type(one).__name__.lower()}", one) for one in transforms]
    return TransformedSource(Numbered(rank, ranks), named, context)


def ids(batch: Batch) -> list[int]:
    """The rows of a batch, after a look whether their four parts belong together."""
    assert batch.token_ids is not None and batch.positions is not None
    assert torch.equal(batch.inputs[:, 0, 0].long(), batch.token_ids)
    assert torch.equal(batch.positions[:, 0] * 4 + batch.positions[:, 1], batch.token_ids)
    return batch.token_ids.tolist()


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


def test_a_run_resumes_bit_for_bit_with_rows_left_over(tmp_path: Any) -> None:
    chosen = [{"name": "subsample", "share": 0.8}, {"name": "drop_outliers", "factor": 6.0}, "noise"]
    data = tables(transforms=chosen, metrics=["training", "held_out", "cosine"])
    run(data, out=tmp_path / "whole")
    run(data, out=tmp_path / "other")
    run(data, out=tmp_path / "other", resume="step_000004")
    for step in ("step_000008", "step_000012"):
        assert_bit_identical(tmp_path / "whole/checkpoints" / step, tmp_path / "other/checkpoints" / step)
    state = json.loads((tmp_path / "whole/checkpoints/step_000004/training.json").read_text())["source"]
    assert state["left"] > 0
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert all(line["transforms/subsample_dropped"] > 0 for line in lines if "loss/total" in line)
    assert lines[-1]["tokens"] == 12 * 16


def test_transforms_that_came_or_went_are_refused_and_accepted_by_name(tmp_path: Any) -> None:
    with_some, without = tables(transforms=["subsample"]), tables()
    for name, first, second in (("went", with_some, without), ("came", without, with_some)):
        run(first, out=tmp_path / name)
        with pytest.raises(Exception, match="transforms: differs from the run"):
            run(second, out=tmp_path / name, resume="step_000004")
        run(second, out=tmp_path / name, resume="step_000004", accept=["transforms"])


def test_a_position_of_a_run_with_transforms_is_one_of_the_source_too() -> None:
    plain = Numbered()
    source = opened(Keep(sparse))
    source.next()
    load_position(plain, source.state())
    assert plain.count == source.state()["of_source"]["count"] > 0
    source.load_state({"count": 5})
    assert source.state()["of_source"] == {"count": 5}


def test_a_plan_counts_the_rows_that_are_put_together() -> None:
    sizes = [plan(recipe(transforms=chosen), plugins()).bytes.source for chosen in ([], ["noise"], ["subsample"])]
    assert sizes[0] == sizes[1]
    assert sizes[2] - sizes[0] == 2 * 16 * (2 * 3 * 6 * 4)


def test_no_transform_is_no_wrapper() -> None:
    assert not isinstance(parts().source, TransformedSource)
    assert isinstance(parts(transforms=["noise"]).source, TransformedSource)


def test_a_tensor_that_a_transform_changes_is_refused_by_name(distributions: Any, tmp_path: Any) -> None:
    distributions.module(
        "clt_running",
        """
import torch
from attrs import frozen
from clt_plugins import Batch, Spec, hookimpl

@frozen(kw_only=True)
class Config:
    '''Subtract a running mean.'''

class Running:
    held_out, drops = False, False

    def __init__(self, config, context):
        self.mean = torch.zeros(context.n_layers, context.d_model)

    def __call__(self, batch, number):
        self.mean = 0.9 * self.mean + 0.1 * batch.inputs.mean(0)
        return Batch(batch.inputs - self.mean, batch.targets, batch.token_ids, batch.positions)

@hookimpl
def clt_transforms():
    return [Spec("running", Config, Running)]
""",
    )
    with pytest.raises(PluginError, match=r"transforms\[0\]: 'running' .*`mean` changes .*: give it by `state`"):
        run(tables(transforms=["running"]), out=tmp_path / "run", plugins=load_plugins(extra=["clt_running"]))

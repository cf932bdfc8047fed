"""Checks for `[parallel]`, on 1, 2 and 3 ranks: see `clt_plugins.contract.model.parallel.Parallel`."""

from __future__ import annotations

from typing import Any
from unittest import SkipTest

import torch
import torch.distributed as dist

from clt_plugins.contract.model.parallel import Over, Sends, SplitsTokens, SumsLater
from clt_plugins.errors import Faults
from clt_plugins.model.devices import bare_context
from clt_plugins.testing.bench import FEATURES, Bench
from clt_plugins.testing.processes.pool import RANKS, on_ranks
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import expect

OVER: tuple[Over, ...] = ("features", "tokens", "all")
"""The ranks that `total` sums over."""


def exercise(parallel: Any) -> dict[str, Any]:
    """Call every collective once, with numbers that differ by rank; returns what came, as plain data."""
    shard = parallel.shard(FEATURES)
    slopes = torch.tensor([3.0, 5.0])
    x, later = (torch.full((2,), parallel.rank + 1.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    summed, waiting = parallel.sum_features(x), parallel.sum_features_later(later)
    (summed * slopes).sum().backward()
    summed_later = waiting()
    (summed_later * slopes).sum().backward()
    assert x.grad is not None
    assert later.grad is not None
    totals = {over: parallel.total(x, over=over) for over in OVER}
    begun = {over: parallel.total_later(x, over=over) for over in OVER} if isinstance(parallel, SumsLater) else {}
    last = parallel.tensor_ranks - 1
    count, rank = parallel.tensor_ranks, parallel.tensor_rank
    shares: dict[str, list[list[float]]] = {}
    if isinstance(parallel, SplitsTokens):
        # Row i of rank r is 10 i + r + 1.
        given = 10.0 * torch.arange(2 * count)[:, None] + rank + torch.ones(1, 3)
        share = parallel.sum_share_later(given)()
        shares = {"share": share.tolist(), "joined": parallel.join_shares(share).tolist()}
    rows = torch.full((2,), float(parallel.tensor_rank))
    if isinstance(parallel, Sends) and parallel.connected:
        parallel.send_later(rows, last)()
    else:
        rows.fill_(last)
    texts = parallel.gather(text_of(parallel.rank))
    with parallel.apart():
        apart = [parallel.batch_rank, parallel.batch_ranks]
    parallel.barrier()
    names = ("rank", "world", "tensor_rank", "tensor_ranks", "data_rank", "data_ranks", "batch_rank", "batch_ranks")
    return {
        **{name: int(getattr(parallel, name)) for name in names},
        "shard": [shard.start, shard.stop, shard.step],
        "sum_features": summed.tolist(),
        "sum_features_later": summed_later.tolist(),
        "slopes": [x.grad.tolist(), later.grad.tolist()],
        "total": {over: total.tolist() for over, total in totals.items()},
        "total_later": {over: wait().tolist() for over, wait in begun.items()},
        "total_requires_grad": any(total.requires_grad for total in totals.values()),
        "rows": rows.tolist(),
        **shares,
        **_reduced(parallel),
        "texts": list(texts),
        "apart": apart,
    }


def _reduced(parallel: Any) -> dict[str, list[float]]:
    """Gradients after `reduce_gradients`: one that is complete on each rank, and one of which each has a part."""
    whole, part, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    for parameter in (whole, part, none):
        parameter.feature_axis = None  # type: ignore[attr-defined]
        parameter.partial_gradient = parameter is part  # type: ignore[attr-defined]
    whole.grad = torch.full((2,), float(parallel.data_rank))
    part.grad = torch.full((2,), float(parallel.rank + 1))
    parallel.reduce_gradients([whole, none, part])
    return {"reduced": whole.grad.tolist(), "added": part.grad.tolist()}


def text_of(rank: int) -> str:
    """What a rank tells the others: of another length on each."""
    return f"rank {rank}" + "é" * rank


def exercise_on_rank(bench: Bench) -> dict[str, Any] | str:
    """What `exercise` finds on this rank; why the choice refuses to be built."""
    try:
        parallel = bench.build(bare_context(torch.device("cpu"), recipe=bench.recipe()))
    except Faults as error:
        if dist.is_initialized():
            dist.destroy_process_group()  # this process serves other checks, too
        return str(error)
    answer = exercise(parallel)
    # Not closed after an error: other ranks would report the lost connection, and this process is killed anyway.
    parallel.close()
    return answer


def _runs(bench: Bench) -> list[list[dict[str, Any]]]:
    """The answers of all ranks, for one process and for several, where the choice can be built for so many.

    Raises:
        unittest.SkipTest: it can be for none.
    """
    tried = [[exercise_on_rank(bench)]]
    for world in RANKS:
        answers = on_ranks(bench, world, exercise_on_rank)
        # A choice for one process ignores the others: then each rank is a world of its own.
        alone = all(isinstance(answer, dict) and answer["world"] == 1 for answer in answers)
        tried += [[answer] for answer in answers] if alone else [answers]
    runs, refusals = [], []
    for answers in tried:
        refused = [answer for answer in answers if isinstance(answer, str)]
        expect(len(refused) in (0, len(answers)), "all ranks to refuse", "some are built", "`build`")
        refusals += refused
        if not refused:
            runs.append([answer for answer in answers if isinstance(answer, dict)])
    if not runs:
        raise SkipTest(f"it refuses 1, 2 and 3 ranks: {'; '.join(dict.fromkeys(refusals))}")
    return runs


@check("parallel", basic=True)
def shard(bench: Bench) -> None:
    """The shards of ranks that share features make up all F, in order; ranks and group sizes agree."""
    for ranks in _runs(bench):
        world = len(ranks)
        expect(
            [answer["rank"] for answer in ranks] == list(range(world))
            and all(answer["world"] == world for answer in ranks),
            f"rank and world of {world} ranks",
            str([(answer["rank"], answer["world"]) for answer in ranks]),
            "`rank`, `world`",
        )
        expect(
            all(answer["tensor_ranks"] * answer["data_ranks"] == world for answer in ranks),
            "tensor_ranks · data_ranks = world",
            str([(answer["tensor_ranks"], answer["data_ranks"]) for answer in ranks]),
            "`tensor_ranks`, `data_ranks`",
        )
        groups: dict[int, list[int]] = {}
        for answer in sorted(ranks, key=lambda answer: answer["tensor_rank"]):
            groups.setdefault(answer["data_rank"], []).extend(range(*answer["shard"]))
        wrong = {group: owned for group, owned in groups.items() if owned != list(range(FEATURES))}
        expect(not wrong, f"shards that make up range({FEATURES}) in order", str(wrong), "`shard`")


def _sums(ranks: list[dict[str, Any]], answer: dict[str, Any]) -> dict[str, float]:
    """What the ranks' numbers, each rank + 1, add up to for one of them, over each group."""
    groups = {"features": "data_rank", "tokens": "tensor_rank"}
    members = {over: [each for each in ranks if each[same] == answer[same]] for over, same in groups.items()}
    return {over: sum(each["rank"] + 1.0 for each in members.get(over, ranks)) for over in OVER}


@check("parallel")
def sums(bench: Bench) -> None:
    """`sum_features` adds up over the ranks that share features; `total` over those, over the ranks that share tokens,
    or over all. The sum's gradient passes unchanged.

    So do `sum_features_later` and `total_later`. `send_later` copies. `sum_share_later` sums a share of the rows;
    `join_shares` puts shares together. They are tried where they are there.
    """
    for ranks in _runs(bench):
        for answer in ranks:
            count, sums = answer["tensor_ranks"], _sums(ranks, answer)
            who = f"rank {answer['rank']} of {len(ranks)}"
            for name in ("sum_features", "sum_features_later"):
                expected = [sums["features"]] * 2
                expect(answer[name] == expected, f"{name} {expected} on {who}", str(answer[name]), f"`{name}`")
            for name in ("total", "total_later"):
                for over, found in answer[name].items():
                    expected = [sums[over]] * 2
                    text = f'{name} over "{over}" {expected} on {who}'
                    expect(found == expected, text, str(found), f"`{name}`")
            rows = [count - 1.0] * 2
            expect(
                answer["rows"] == rows, f"rows of the last rank, {rows}, on {who}", str(answer["rows"]), "`send_later`"
            )
            if "share" in answer:
                first = 2 * answer["tensor_rank"]
                added = count * (count + 1) / 2
                whole = [[10.0 * row * count + added] * 3 for row in range(2 * count)]
                share, joined, look = answer["share"], answer["joined"], "`sum_share_later`"
                expect(share == whole[first : first + 2], f"the share {whole[first : first + 2]}", str(share), look)
                expect(joined == whole, f"the shares put together, {whole}, on {who}", str(joined), "`join_shares`")
            expect(not answer["total_requires_grad"], "a detached total", "it requires a gradient", "`total`")
            expect(
                answer["slopes"] == [[3.0, 5.0]] * 2,
                f"the gradient of the sum, [3, 5], on {who}, also of one that was begun",
                str(answer["slopes"]),
                "the backward of `sum_features`: the gradient passes through, it is not summed again",
            )


@check("parallel")
def gradients(bench: Bench) -> None:
    """`reduce_gradients` averages over the ranks that share tokens. A gradient that is complete stays as it is; one
    with `partial_gradient` is added up over the ranks that share features. Parameters may have none."""
    look = "`reduce_gradients`: an average over data ranks; over tensor ranks a sum of partial gradients only"
    for ranks in _runs(bench):
        for answer in ranks:
            who, groups = f"on rank {answer['rank']} of {len(ranks)}", answer["data_ranks"]
            expected = [(groups - 1) / 2] * 2
            got = str(answer["reduced"])
            expect(answer["reduced"] == expected, f"a gradient of {expected} {who}", got, look)
            expected = [_sums(ranks, answer)["all"] / groups] * 2
            got = str(answer["added"])
            expect(answer["added"] == expected, f"a gradient of {expected} {who}, with `partial_gradient`", got, look)


@check("parallel")
def gather(bench: Bench) -> None:
    """`gather` gives every rank's text, in the order of ranks. A batch has a part for each data rank, and one for all
    within `apart`."""
    for ranks in _runs(bench):
        expected = [text_of(rank) for rank in range(len(ranks))]
        for answer in ranks:
            who = f"on rank {answer['rank']} of {len(ranks)}"
            expect(answer["texts"] == expected, f"the texts {expected} {who}", str(answer["texts"]), "`gather`")
            for what, got, right in (
                ("", [answer["batch_rank"], answer["batch_ranks"]], [answer["data_rank"], answer["data_ranks"]]),
                (" within `apart`", answer["apart"], [0, 1]),
            ):
                text = f"batch_rank and batch_ranks {right} {who}{what}"
                expect(got == right, text, str(got), "`batch_rank`, `batch_ranks`, `apart`")

"""Checks for `[parallel]`, on 1, 2 and 3 ranks: see `clt_plugins.contract.model.parallel.Parallel`."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from clt_plugins.contract.model.parallel import Sends, SplitsTokens, SumsLater
from clt_plugins.errors import Faults
from clt_plugins.model.devices import bare_context
from clt_plugins.testing.bench import FEATURES, Bench
from clt_plugins.testing.processes.pool import RANKS, on_ranks
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import expect


def exercise(parallel: Any) -> dict[str, Any]:
    """Call every collective once, with numbers that differ by rank; returns what came, as plain data."""
    shard = parallel.shard(FEATURES)
    x = torch.full((2,), float(parallel.tensor_rank + 1), dtype=torch.float64, requires_grad=True)
    total = parallel.sum_features(x)
    (total * torch.tensor([3.0, 5.0])).sum().backward()
    assert x.grad is not None
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.feature_axis = None  # type: ignore[attr-defined]
    weight.grad = torch.full((2,), float(parallel.data_rank))
    parallel.reduce_gradients([weight])
    detached = parallel.total(x)
    later = parallel.total_later(x)() if isinstance(parallel, SumsLater) else detached
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
    parallel.barrier()
    names = ("rank", "world", "tensor_rank", "tensor_ranks", "data_rank", "data_ranks")
    return {
        **{name: int(getattr(parallel, name)) for name in names},
        "shard": [shard.start, shard.stop, shard.step],
        "sum": total.tolist(),
        "slope": x.grad.tolist(),
        "total": detached.tolist(),
        "later": later.tolist(),
        "rows": rows.tolist(),
        **shares,
        "total_requires_grad": detached.requires_grad,
        "reduced": weight.grad.tolist(),
    }


def exercise_on_rank(bench: Bench) -> dict[str, Any]:
    """What `exercise` finds on this rank."""
    parallel = bench.build(bare_context(torch.device("cpu"), recipe=bench.recipe()))
    answer = exercise(parallel)
    # Not closed after an error: other ranks would report the lost connection, and this process is killed anyway.
    parallel.close()
    return answer


def _runs(bench: Bench) -> list[list[dict[str, Any]]]:
    """The answers of all ranks, for one process (where the choice can be built for it) and for several."""
    runs = []
    with suppress(Faults):  # it needs several processes
        runs.append([exercise_on_rank(bench)])
    for world in RANKS:
        answers = on_ranks(bench, world, exercise_on_rank)
        # A choice for one process ignores the others: then each rank is a world of its own.
        alone = all(answer["world"] == 1 for answer in answers)
        runs += [[answer] for answer in answers] if alone else [answers]
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


@check("parallel")
def sums(bench: Bench) -> None:
    """`sum_features` and `total` add up over the ranks that share features; the sum's gradient passes unchanged.

    So does `total_later`. `send_later` copies. `sum_share_later` sums a share of the rows; `join_shares` puts shares
    together. They are tried where they are there.
    """
    for ranks in _runs(bench):
        for answer in ranks:
            count = answer["tensor_ranks"]
            expected = [count * (count + 1) / 2] * 2
            who = f"rank {answer['rank']} of {len(ranks)}"
            expect(answer["sum"] == expected, f"sum_features {expected} on {who}", str(answer["sum"]), "`sum_features`")
            expect(answer["total"] == expected, f"total {expected} on {who}", str(answer["total"]), "`total`")
            expect(
                answer["later"] == expected, f"total_later {expected} on {who}", str(answer["later"]), "`total_later`"
            )
            rows = [count - 1.0] * 2
            expect(
                answer["rows"] == rows, f"rows of the last rank, {rows}, on {who}", str(answer["rows"]), "`send_later`"
            )
            if "share" in answer:
                first = 2 * answer["tensor_rank"]
                whole = [[10.0 * row * count + expected[0]] * 3 for row in range(2 * count)]
                share, joined, look = answer["share"], answer["joined"], "`sum_share_later`"
                expect(share == whole[first : first + 2], f"the share {whole[first : first + 2]}", str(share), look)
                expect(joined == whole, f"the shares put together, {whole}, on {who}", str(joined), "`join_shares`")
            expect(not answer["total_requires_grad"], "a detached total", "it requires a gradient", "`total`")
            expect(
                answer["slope"] == [3.0, 5.0],
                f"the gradient of the sum, [3, 5], on {who}",
                str(answer["slope"]),
                "the backward of `sum_features`: the gradient passes through, it is not summed again",
            )


@check("parallel")
def gradients(bench: Bench) -> None:
    """`reduce_gradients` averages over the ranks that share tokens; a gradient that is complete stays as it is."""
    for ranks in _runs(bench):
        for answer in ranks:
            expected = [(answer["data_ranks"] - 1) / 2] * 2
            expect(
                answer["reduced"] == expected,
                f"a gradient of {expected} on rank {answer['rank']} of {len(ranks)}",
                str(answer["reduced"]),
                "`reduce_gradients`: an average over data ranks; over tensor ranks a sum of partial gradients only",
            )

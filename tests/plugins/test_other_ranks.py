"""Every source, resumed on other numbers of data ranks again and again: each row of an epoch once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_crosslayer_coding import SourceConfig
from clt_crosslayer_coding import clt_sources as crosslayer_sources
from clt_datasets import RemoteConfig
from clt_datasets import clt_sources as dataset_sources
from clt_plugins import Batch
from clt_plugins.toml import toml_text
from tests.plugins.synthetic.test_synthetic import build as build_synthetic
from tests.support.chains import BATCH, WORLDS, chain
from tests.support.commands import on_ranks
from tests.support.crosslayer_coding import write
from tests.support.helpers import tables
from tests.support.language_models import save_model, save_text
from tests.support.serving import Serving
from tests.support.stored_data import join, local, make_context, write_numbered
from tests.support.streams import build as build_stream

SIZES = [37, 8, 64, 1, 19, 5, 16]
"""Of chunks, 150 rows in blocks of 8."""
TIMES = [pytest.param(8, id="8 resumes"), pytest.param(50, id="50 resumes", marks=pytest.mark.slow)]


def by_id(batch: Batch) -> list[Hashable]:
    assert batch.token_ids is not None
    return list(batch.token_ids.tolist())


def by_value(batch: Batch) -> list[Hashable]:
    return [tuple(row) for row in torch.cat([batch.inputs, batch.targets], 1).flatten(1).tolist()]


def check_epochs(steps: Iterator[list[Batch]], epoch: set[Any], names: Callable[[Batch], list[Hashable]]) -> None:
    """At every step, each row of an epoch has come as often as there were epochs, and at most once in the present."""
    counts: Counter[Any] = Counter(dict.fromkeys(epoch, 0))
    for step in steps:
        assert sum(batch.tokens for batch in step) == BATCH
        for batch in step:
            counts.update(names(batch))
        complete = counts.total() // len(epoch)
        assert set(counts) == epoch
        assert {complete, complete + 1} >= set(counts.values())


@pytest.mark.parametrize("resumes", TIMES)
@pytest.mark.parametrize("buffer_tokens", [24, 40, 1000])
def test_local(tmp_path: Path, resumes: int, buffer_tokens: int) -> None:
    write_numbered(tmp_path / "data", SIZES)

    def build(rank: int, ranks: int) -> Any:
        context = make_context(batch_tokens=BATCH, rank=rank, ranks=ranks)
        return local(tmp_path / "data", context, buffer_tokens=buffer_tokens)

    check_epochs(chain(build, resumes, seed=buffer_tokens), set(range(150)), by_id)


@pytest.mark.parametrize("resumes", TIMES)
def test_remote(tmp_path: Path, resumes: int) -> None:
    write_numbered(tmp_path / "data", SIZES)
    server = Serving(tmp_path)
    spec = next(spec for spec in dataset_sources() if spec.name == "remote")

    def build(rank: int, ranks: int) -> Any:
        config = RemoteConfig(url=server.url, dataset="data", buffer_tokens=40)
        return spec.build(config, make_context(batch_tokens=BATCH, rank=rank, ranks=ranks))

    try:
        check_epochs(chain(build, resumes, seed=1), set(range(150)), by_id)
    finally:
        server.stop()


@pytest.mark.parametrize("resumes", TIMES)
def test_crosslayer_coding(tmp_path: Path, resumes: int) -> None:
    truth = write(tmp_path / "data")
    (spec,) = crosslayer_sources()

    def build(rank: int, ranks: int) -> Any:
        config = SourceConfig(path=tmp_path / "data", held_out_tokens=30, buffer_tokens=32)
        return spec.build(config, make_context(batch_tokens=BATCH, rank=rank, ranks=ranks))

    check_epochs(chain(build, resumes, seed=2), set(by_value(truth.rows(slice(0, 95)))), by_value)


@pytest.mark.parametrize("resumes", TIMES)
def test_synthetic(resumes: int) -> None:
    """The batches of a single process."""
    alone = build_synthetic(tokens=BATCH)
    for step in chain(lambda rank, ranks: build_synthetic(tokens=BATCH, rank=rank, ranks=ranks), resumes, seed=3):
        assert torch.equal(torch.cat([batch.inputs for batch in step]), alone.next().inputs)


@pytest.mark.parametrize("resumes", TIMES)
def test_stream(tmp_path: Path, resumes: int) -> None:
    """Each row of the endless sequence once, with the values of a single process."""
    model = save_model(tmp_path / "model")
    save_text(tmp_path / "text.jsonl", 40)

    def build(rank: int, ranks: int) -> Any:
        run = {"batch_tokens": BATCH, "rank": rank, "ranks": ranks}
        return build_stream(model, tmp_path / "text.jsonl", run, buffer_tokens=48)

    worlds = WORLDS if resumes > 8 else [1, 2, 3]  # a model for each rank
    steps = chain(build, resumes, seed=4, worlds=worlds, fresh=False)
    rows = join([batch for step in steps for batch in step])
    alone = build(0, 1)
    # What six ranks shuffle together may not have come yet.
    truth = join([alone.next() for _ in range(rows.tokens // BATCH + 12)])

    def numbers(batch: Batch) -> torch.Tensor:
        """Positions as numbers that grow along the sequence."""
        assert batch.positions is not None
        return batch.positions[:, 0] * 1000 + batch.positions[:, 1]

    come, expected = numbers(rows).sort(), numbers(truth).sort()
    assert come.values.unique().numel() == rows.tokens
    # Of the sequence up to the last row that came, all came but the rest of a block.
    where = torch.searchsorted(expected.values, come.values)
    assert torch.equal(expected.values[where], come.values)
    certain = rows.tokens - 6 * 48
    assert certain < 0 or torch.equal(where[:certain], torch.arange(certain))
    for name in ("inputs", "targets"):
        ours, theirs = getattr(rows, name)[come.indices], getattr(truth, name)[expected.indices][where]
        # Passes of other lengths add up in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_metrics_of_stored_rows_are_the_same_on_two_ranks(tmp_path: Path) -> None:
    """With an activation that chooses among the features of a batch: on half a batch it would choose others."""
    write_numbered(tmp_path / "data", [64], held_out=40)
    train = {"steps": 1, "batch_tokens": 16, "eval_tokens": 40, "lr": 1e-12}
    source = {"name": "local", "path": str(tmp_path / "data"), "buffer_tokens": 64}
    changes = {"source": source, "train": train, "activation": {"name": "batchtopk", "k": 3}}
    found = []
    for ranks, parallel in ((1, {"name": "single"}), (2, {"name": "tensor", "data": 2})):
        (tmp_path / f"{ranks}.toml").write_text(toml_text(tables(**changes, parallel=parallel)))
        out = tmp_path / f"on {ranks}"
        done = on_ranks(ranks, "-m", "clt_plugins", "run", tmp_path / f"{ranks}.toml", "--out", out)
        assert [one.returncode for one in done] == [0] * ranks, done
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found.append(next(line for line in reversed(lines) if "eval/nmse" in line))
    one, two = found
    compared = [name for name in one if name.startswith("eval/")]
    assert {"eval/nmse", "eval/l0", "eval/l0_by_layer"} <= set(compared)
    for name in compared:
        assert two[name] == pytest.approx(one[name], rel=1e-5), name

"""Tensor ranks that divide the model's passes read what one process reads; and a stream that reads ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import Single
from tests.support.commands import on_ranks
from tests.support.language_models import save_text
from tests.support.stream_ranks import STEPS, stream
from tests.support.streams import build, equal, join


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    save_text(file, 40)
    return file


@pytest.fixture(scope="module", params=[2, 3])
def by_rank(request: pytest.FixtureRequest, gpt2: Path, words: Path, tmp_path_factory: Any) -> list[dict[str, Any]]:
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    for done in on_ranks(world, "-m", "tests.support.stream_ranks", gpt2, words, folder):
        assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


def test_every_rank_has_the_rows_of_one_process_in_its_order_and_runs_its_share_of_the_passes(by_rank, gpt2, words):
    alone = stream(str(gpt2), str(words), Single())
    runs = []
    read = alone.reader.read
    alone.reader.read = lambda *arguments: runs.append(read(*arguments))
    rows = join([alone.next() for _ in range(STEPS)])
    for results in by_rank:
        for x, expected in zip(results["rows"], (rows.inputs, rows.targets, rows.positions), strict=True):
            assert torch.equal(x, expected)
    assert sum(results["runs"] for results in by_rank) == len(runs)
    most, least = (end(results["runs"] for results in by_rank) for end in (max, min))
    assert most - least <= 2, "one more in each of two blocks"


def test_ranks_resume_together_and_one_goes_on_alone_when_they_have_parted(by_rank):
    assert all(results["resumed"] and results["alone"] for results in by_rank)


def test_a_rank_whose_model_or_text_fails_in_the_middle_of_a_block_stops_all(by_rank):
    broken = "RuntimeError: rank 1: "
    for what, text in (("model", broken), ("model, ahead", broken), ("text", "OSError: rank 1: the text is gone")):
        assert by_rank[0][what].startswith(text), by_rank[0][what]
        assert all(results[what] == "Stopped: " for results in by_rank[1:])


def test_reading_ahead_changes_no_row_and_no_position(gpt2, text, monkeypatch):
    whole = build(gpt2, text)
    monkeypatch.setattr("clt_stream.source.reads_ahead", lambda model, buffer: True)
    ahead = build(gpt2, text, buffer_tokens=640)  # two halves
    assert ahead.size == whole.size
    states = []
    for _ in range(35):  # four blocks
        states.append(ahead.state())
        assert states[-1] == whole.state()
        assert equal(ahead.next(), whole.next())
    for step in (3, 10, 29):
        ahead.load_state(states[step])
        whole.load_state(states[step])
        for _ in range(12):
            assert equal(ahead.next(), whole.next())


def test_reading_ahead_runs_the_model_a_few_times_in_every_step_and_never_a_block_at_once(gpt2, text, monkeypatch):
    monkeypatch.setattr("clt_stream.source.reads_ahead", lambda model, buffer: True)
    source = build(gpt2, text, buffer_tokens=640)
    source.next()
    runs: list[None] = []
    read = source.reader.read
    source.reader.read = lambda *arguments: runs.append(read(*arguments))
    by_step = []
    for _ in range(30):
        runs.clear()
        source.next()
        by_step.append(len(runs))
    assert sum(by_step) / 3 >= 4, "a block takes several"
    assert max(by_step) == 1

"""Losses that run the language model give several ranks the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clt_parallel.grid import Grid
from clt_plugins import Single
from tests.support.commands import on_ranks
from tests.support.helpers import stir
from tests.support.in_model_ranks import CASES, built, gradients
from tests.support.language_models import save_model, save_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_model(folder / "gpt2")
    save_text(folder / "text.jsonl", 60)
    for done in on_ranks(2, "-m", "tests.support.in_model_ranks", folder):
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("activation", "tying", "encoder"), CASES)
def test_two_ranks_have_the_gradients_of_one_process(folder, activation, tying, encoder):
    whole = built(folder, activation, tying, encoder, Single())
    stir(whole.transcoder)
    expected = gradients(whole, Single())
    axes = whole.transcoder.feature_axes()
    for split, data, tensor in (("tensor", 1, 2), ("data", 2, 1)):
        for rank in range(2):
            found = torch.load(folder / f"{split}-{rank}.pt")[activation]
            shard = Grid(rank, tensor, data).shard(11)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                axis = axes.get(name)
                part = value if axis is None else value.narrow(axis, shard.start, len(shard))
                scale = float(value.abs().max())
                assert scale > 0, name
                torch.testing.assert_close(found[name], part, rtol=0, atol=1e-9 * scale, msg=f"{split} {rank} {name}")

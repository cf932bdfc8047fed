"""Several ranks collect what one process does, byte for byte; also after all of them were killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from clt_plugins import Refused, Single
from tests.support.collect_ranks import CASES, SETTINGS, SPLITS, built, settings
from tests.support.collect_truth import collect
from tests.support.commands import on_ranks
from tests.support.language_models import save_model, save_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_model(folder / "gpt2")
    save_text(folder / "text.jsonl", 60)
    for done in on_ranks(2, "-m", "tests.support.collect_ranks", folder):
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("activation", CASES)
def test_two_ranks_write_the_store_of_one(folder: Path, activation: str) -> None:
    one = folder / f"one-{activation}"
    collect(built(folder, activation, Single()), one, **settings(activation))
    names = {path.name for path in one.iterdir()}
    for split in SPLITS:
        for store in (folder / f"{split}-{activation}", *([folder / f"{split}-killed"] * (activation == CASES[0]))):
            assert {path.name for path in store.iterdir()} == names
            for name in names:
                assert (store / name).read_bytes() == (one / name).read_bytes(), (store.name, name)


def test_training_text_of_several_data_ranks_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r'stages\.collect\.text: "training" is for one data rank, and there are 2'):
        collect(built(folder, "topk", Single(0, 2)), tmp_path / "store", text="training", **SETTINGS)

"""`generate`: whatever stops it, the data set ends up as if nothing had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import run
from clt_plugins.recipe.read import read_recipe
from tests.support.commands import python
from tests.support.helpers import plugins, tables
from tests.support.language_models import save_model, save_text
from tests.support.serving import Serving
from tests.support.stored_data import generated, join, local, make_context

EXAMPLES = Path(__file__).parents[3] / "examples"


def kill_and_resume(folder: Path, kills: int, *text: str) -> dict[str, Any]:
    """See `kill_generate`."""
    done = python("-m", "tests.support.kill_generate", folder, kills, *text, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_at_twenty_moments_and_resumed_it_is_the_unbroken_data_set(tmp_path: Path) -> None:
    found = kill_and_resume(tmp_path, 20)
    assert found["kills"] == 20
    # The moments were spread over the whole work.
    assert len(set(found["chunks"])) > 4


@pytest.mark.slow
def test_killed_while_a_language_model_is_read(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_text(tmp_path / "text.jsonl", 40)
    assert kill_and_resume(tmp_path, 20, str(tmp_path / "model"), str(tmp_path / "text.jsonl"))["kills"] == 20


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("last", [0, 1])
def test_two_processes_write_what_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """In either order: the one that ends last writes the manifest."""
    generated(tmp_path / "one", chunk_bytes=30_000)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1 - last, last):
        assert not (tmp_path / "two" / "manifest.json").exists()
        monkeypatch.setenv("RANK", str(rank))
        generated(tmp_path / "two", chunk_bytes=30_000)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    one, two = (local(tmp_path / name, make_context(batch_tokens=192), buffer_tokens=192) for name in ("one", "two"))
    rows, others = (x.next().inputs.flatten(1) for x in (one, two))
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, others.tolist()))
    assert torch.equal(join(list(one.held_out(64))).inputs, join(list(two.held_out(64))).inputs)
    for name, value in one.statistics().items():
        # The same rows, added up in another order, in float64.
        torch.testing.assert_close(two.statistics()[name], value, rtol=1e-12, atol=1e-13)


def test_tokens_are_exact_and_the_tail_is_kept(tmp_path: Path) -> None:
    generated(tmp_path / "data", tokens=101, held_out=7)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["tokens"] == {"train": 101, "held_out": 7}
    assert manifest["about"]["source"]["name"] == "synthetic"


def test_a_finished_data_set_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generated(tmp_path / "data")
    before = content(tmp_path / "data")
    generated(tmp_path / "data")
    assert content(tmp_path / "data") == before
    assert "complete already" in capsys.readouterr().err


def test_other_settings_and_other_folders_are_refused(tmp_path: Path) -> None:
    generated(tmp_path / "data", tokens=64)
    with pytest.raises(ValueError, match=r"data: begun with other settings: tokens was 64, now it is 80; give another"):
        generated(tmp_path / "data", tokens=80)
    with pytest.raises(ValueError, match=r"data: begun with other settings: seed was 0, now it is 1; give another"):
        generated(tmp_path / "data", tokens=64, recipe=tables(seed=1))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"home: already there, and not an unfinished data set"):
        generated(tmp_path / "home")


def test_the_recipes_generate_and_train_from_a_folder_and_from_a_server(tmp_path: Path) -> None:
    small = ["source.buffer_tokens=2048", "train.batch_tokens=256", "train.eval_tokens=512", "schedule.warmup_steps=0"]
    (tmp_path / "root").mkdir()
    recipe = read_recipe(EXAMPLES / "generate.toml", [*small, "train.steps=8"], plugins=plugins())
    from clt_datasets.make.generate import generate

    generate(recipe, tmp_path / "root" / "stdlib-gpt2", dtype="bfloat16")
    train = ["train.steps=2", "transcoder.features=64", "activation.k=16", "transcoder.device=cpu", "loggers=[]"]
    here = read_recipe(
        EXAMPLES / "local.toml", [*small, *train, f"source.path={tmp_path / 'root' / 'stdlib-gpt2'}"], plugins=plugins()
    )
    one = run(here, out=tmp_path / "here", plugins=plugins())
    server = Serving(tmp_path / "root")
    there = read_recipe(EXAMPLES / "remote.toml", [*small, *train, f"source.url={server.url}"], plugins=plugins())
    two = run(there, out=tmp_path / "there", plugins=plugins())
    server.stop()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))

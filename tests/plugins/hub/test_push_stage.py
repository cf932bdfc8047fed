"""The stage `push`: it is checked before training, comes last, and is done once."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from clt_plugins import CrossLayerTranscoder, Faults, run
from clt_plugins.cli.main import main_group
from tests.support.helpers import tables
from tests.support.hub.pushing import JUMPRELU, card


def stage(**settings: object) -> dict[str, object]:
    own = {"name": "push", "repository": "user/clt", "license": "mit", **settings}
    return tables(activation=JUMPRELU, stages=[{"name": "evaluate", "tokens": 64}, own])


def test_the_stage_pushes_after_training_and_once(hub, tmp_path):
    run(stage(), out=tmp_path / "run")
    repository = hub.repositories["user/clt"]
    read = card(repository)
    assert read.data.eval_results and 'name = "push"' not in read.text
    receipt = json.loads((tmp_path / "run/hub/push.json").read_text())
    assert receipt["commit"] == repository.branches["main"] and receipt["made_from"]["transcoder"]["step"] == 12
    assert sorted(path.name for path in (tmp_path / "run/hub").iterdir()) == ["README.md", "manifest.json", "push.json"]
    assert (tmp_path / "run/hub/README.md").read_bytes() == repository.files()["README.md"]
    here = CrossLayerTranscoder.load(tmp_path / "run/transcoder").tensors()
    assert all(torch.equal(x, here[name]) for name, x in CrossLayerTranscoder.load("user/clt").tensors().items())
    before = len(hub.requests)
    run(stage(), out=tmp_path / "run", resume="latest")
    assert len(hub.requests) == before, "a push that was done is not done again"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"repository": "clt"}, "stages[1].repository: "),
        ({"license": "MIT"}, "stages[1].license: "),
        ({"license": "other"}, "stages[1].license_name: must be given"),
        ({"before": "none.md"}, "stages[1].before: "),
        ({"instead": {"source.text": "x"}}, "source.text: the recipe has no such text"),
    ],
)
def test_the_stage_is_checked_before_training(hub, tmp_path, settings, text):
    with pytest.raises(Faults) as caught:
        run(stage(**settings), out=tmp_path / "run")
    assert text in str(caught.value)
    assert not (tmp_path / "run/checkpoints").exists()


def test_the_stage_needs_a_token_before_training_and_comes_last(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(Faults, match=r"stages\[1\]\.repository: .*no token"):
        run(stage(), out=tmp_path / "run")
    changed = stage()
    changed["stages"].reverse()
    with pytest.raises(Faults, match="pushes what is there before 'evaluate': put it last"):
        run(changed, out=tmp_path / "run")
    run(stage(upload=False), out=tmp_path / "run")
    assert (tmp_path / "run/hub/contents/transcoder/transcoder.safetensors").is_file() and not hub.requests


def test_the_stage_done_into_another_folder_pushes_the_same(hub, tmp_path):
    """It looked for scores and exports beside the folder that was named."""
    convert = {"name": "convert", "tokens": 64}
    evaluate = {"name": "evaluate", "tokens": 64}
    run(tables(stages=[convert, evaluate]), out=tmp_path / "run")
    settings = ("repository=user/clt", "license=mit", "upload=false")
    contents = []
    for out in (None, tmp_path / "elsewhere/out"):
        chosen = [one for setting in settings for one in ("--set", setting)]
        place = [] if out is None else ["--out", str(out)]
        done = CliRunner().invoke(main_group, ["stage", "push", str(tmp_path / "run"), *chosen, *place])
        assert done.exit_code == 0, done.output
        root = (out or tmp_path / "run/hub") / "contents"
        contents.append({path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()})
    assert contents[0] == contents[1]
    assert {"converted", "evaluation", "versions.json"} <= {name.parts[0] for name in contents[0]}


def test_the_stage_pushes_a_checkpoint_with_what_is_known_of_it(hub, tmp_path):
    """As the command `push` does: results of a checkpoint lie deeper in the run's folder."""
    run(tables(activation=JUMPRELU, stages=[]), out=tmp_path / "run")
    checkpoint = str(tmp_path / "run/checkpoints/step_000008")
    done = CliRunner().invoke(main_group, ["stage", "evaluate", checkpoint, "--set", "tokens=64"])
    assert done.exit_code == 0, done.output
    settings = [one for text in ("repository=user/clt", "license=mit") for one in ("--set", text)]
    done = CliRunner().invoke(main_group, ["stage", "push", checkpoint, *settings])
    assert done.exit_code == 0, done.output
    files = hub.repositories["user/clt"].files()
    assert json.loads(files["evaluation/evaluation.json"])["made_from"]["transcoder"]["step"] == 8
    assert "versions.json" in files

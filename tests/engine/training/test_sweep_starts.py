"""The start of a sweep: what is refused before any work, whose folders are left alone, and what the user sees."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from clt_plugins import sweep
from clt_plugins.cli.main import main_group
from clt_plugins.errors import Refused
from clt_plugins.recipe.read import as_toml, read_sweep
from clt_plugins.training.sweep import run as sweeps
from tests.support.helpers import plugins, recipe
from tests.support.sweeps import many


def test_memory_that_is_too_small_is_refused_before_work_with_what_to_do(tmp_path, monkeypatch):
    swept = read_sweep(many({"activation.k": [2, 3, 4]}), plugins=plugins())
    needs = sweeps.plan_sweep(swept, plugins())
    alone_ = max(one.needs.total_bytes for one in needs.members)
    assert alone_ < needs.total_bytes < sum(one.needs.total_bytes for one in needs.members)
    monkeypatch.setattr(sweeps, "available_bytes", lambda device: needs.total_bytes - 1)
    with pytest.raises(Refused, match=r"train 2 at a time, --at-once 2 \(activations are made 2 times\)"):
        sweep(swept, out=tmp_path / "sweep", plugins=plugins())
    assert not (tmp_path / "sweep").exists()
    monkeypatch.setattr(sweeps, "available_bytes", lambda device: 1)
    with pytest.raises(Refused, match="not one of its members fits"):
        sweep(swept, out=tmp_path / "sweep", plugins=plugins())


def test_several_ranks_are_refused_before_a_folder_is_made(tmp_path):
    swept = many({"activation.k": [2, 3]}, parallel={"name": "tensor", "tensor": 2})
    with pytest.raises(Refused, match="parallel: a sweep trains in one process"):
        sweep(swept, out=tmp_path / "sweep", plugins=plugins())
    assert not (tmp_path / "sweep").exists()


def test_processes_of_torchrun_are_refused_before_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Refused, match="sweep: trains in one process, and 2 were started: leave out torchrun"):
        sweep(many({"activation.k": [2, 3]}), out=tmp_path / "sweep", plugins=plugins())
    assert not (tmp_path / "sweep").exists()


def test_lines_and_messages_of_a_console_name_the_member(tmp_path, capsys, caplog):
    caplog.set_level("INFO", "clt_plugins")
    swept = many({"activation.k": [2, 3]}, loggers=["console"])
    sweep(swept, out=tmp_path / "sweep", plugins=plugins())
    lines = [line for line in capsys.readouterr().err.splitlines() if "loss" in line]
    assert [line.split()[:3] for line in lines] == [[f"k={k}", "step", str(n)] for n in (6, 12) for k in (2, 3)]
    saved = [one.getMessage() for one in caplog.records if "transcoder saved" in one.getMessage()]
    assert [text.split(": ")[0] for text in saved] == ["k=2", "k=3"]


def test_folders_are_not_overwritten(tmp_path):
    swept = many({"activation.k": [2]})
    with pytest.raises(Refused, match="nothing to resume"):
        sweep(swept, out=tmp_path / "sweep", resume=True, plugins=plugins())
    sweep(swept, out=tmp_path / "sweep", plugins=plugins())
    with pytest.raises(Refused, match="already there: go on with --resume"):
        sweep(swept, out=tmp_path / "sweep", plugins=plugins())


@pytest.mark.parametrize("resume", [False, True])
def test_a_start_that_was_killed_before_its_record_blocks_nothing(tmp_path, resume):
    """Ctrl-C while the members' folders are made leaves some of them, with a lock that nobody holds."""
    swept = many({"activation.k": [2, 3]})
    for name in ("sweep.lock", ".sweep.json.partial", "k=2/run.lock", "k=2/recipe.toml"):
        (tmp_path / "sweep" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sweep" / name).touch()
    sweep(swept, out=tmp_path / "sweep", resume=resume, plugins=plugins())
    assert {point["label"] for point in json.loads((tmp_path / "sweep/frontier.json").read_text())["members"]} == {
        "k=2",
        "k=3",
    }


@pytest.mark.parametrize("name", ["mine.txt", "k=2/mine.txt", "other/run.lock"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_things_is_left_alone(tmp_path, resume, name):
    for path in ("k=2/run.lock", name):
        (tmp_path / "sweep" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sweep" / path).touch()
    with pytest.raises(Refused, match="nothing to resume" if resume else "already there"):
        sweep(many({"activation.k": [2]}), out=tmp_path / "sweep", resume=resume, plugins=plugins())
    assert (tmp_path / "sweep" / name).is_file()


def test_commands(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text(as_toml(recipe()) + '\n[sweep]\n"activation.k" = [2, 3]\n')
    (tmp_path / "one.toml").write_text(as_toml(recipe()))

    def cli(*arguments: object) -> Any:
        return CliRunner().invoke(main_group, [str(one) for one in arguments])

    done = cli("run", file)
    assert done.exit_code == 2 and "`sweep RECIPE --out DIR` trains them" in done.stderr
    done = cli("sweep", tmp_path / "one.toml", "--out", tmp_path / "sweep")
    assert done.exit_code == 2 and "sweep: missing" in done.stderr
    done = cli("plan", file)
    assert done.exit_code == 0 and "2 transcoders on 1 stream" in done.stdout
    planned = json.loads(cli("plan", file, "--json", "--at-once", 1, "--gpu", "h100").stdout)
    assert planned["passes"] == 2 and planned["fits"] and planned["most_at_once"] == 2
    done = cli("validate", file)
    assert done.stdout.splitlines() == ["2 transcoders", '  k=2: "activation.k" = 2', '  k=3: "activation.k" = 3']
    done = cli("sweep", file, "--out", tmp_path / "sweep", "--set", "sweep.activation.k=[4, 5]")
    assert done.exit_code == 0, done.stderr
    assert {path.name for path in (tmp_path / "sweep").iterdir()} >= {"k=4", "k=5", "frontier.html", "frontier.png"}

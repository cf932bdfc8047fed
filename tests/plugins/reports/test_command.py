"""The stage and the command `report`: from a run to a site, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from clt_plugins import Collected, CrossLayerTranscoder, run
from clt_plugins.cli.main import main_group
from clt_plugins.files.folders import check_folder
from clt_plugins.testing.stores import make_store
from tests.plugins.reports.test_graphs import GRAPH
from tests.support.helpers import tables
from tests.support.language_models import save_model, save_text
from tests.support.site_data import SiteData

COLLECT = {"name": "collect", "tokens": 150, "top": 3, "groups": 2, "per_group": 1, "window": 4, "logits": 2}


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    return tables(
        model={"path": str(folder / "gpt2")},
        source={
            "name": "stream",
            "text": str(folder / "text.jsonl"),
            "context": 24,
            "held_out": 0.3,
            "model_batch": 3,
            "buffer_tokens": 64,
        },
        transcoder={"features": 20},
        loggers=["jsonl"],
        train={"batch_tokens": 32, "steps": 4, "checkpoint_every": 2, "statistics_tokens": 64, "log_every": 1},
        **changes,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the stages collect, evaluate and report; the report also at step 2."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "gpt2")
    save_text(folder / "text.jsonl", 40)
    (folder / "graph.json").write_text(json.dumps(GRAPH | {"nodes": [], "links": []}))
    stages = [
        {**COLLECT, "every": 2},
        {"name": "evaluate", "tokens": 100, "model_tokens": 0},
        {"name": "report", "every": 2, "format": {"name": "site", "shard": 8, "graphs": [str(folder / "graph.json")]}},
    ]
    run(recipe(folder, stages=stages), out=folder / "run")
    return folder


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(main_group, [str(one) for one in arguments])


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    return str(result.exception or "") + result.output


def test_a_run_ends_in_a_site(made: Path) -> None:
    check_folder(made / "run/reports/site")
    assert all((made / "run/reports/site" / name).is_file() for name in ("index.html", "data/site.js", "report.json"))
    site = SiteData(made / "run/reports/site").site
    assert site["run"]["name"] == site["title"] and site["run"]["transcoder"]["step"] == 4
    assert site["run"]["curves"]["loss/total"]["step"] == [1, 2, 3, 4]
    assert site["run"]["evaluation"]["tokens"] == 100
    assert site["tokens"] == 150 and site["shard"] == 8
    assert site["graphs"] == [
        {"name": "my-script-graph", "title": "my </script> graph", "prompt": "a b", "nodes": 0, "links": 0}
    ]


def test_a_site_of_a_checkpoint_is_of_that_checkpoint(made: Path) -> None:
    site = SiteData(made / "run/stages/step_000002/reports/site").site
    assert site["run"]["transcoder"]["step"] == 2
    assert "evaluation" not in site["run"]
    assert site["id"] != SiteData(made / "run/reports/site").site["id"]


def test_what_the_page_says_of_features_is_what_the_transcoder_computes(made: Path) -> None:
    """Values, densities and contexts, against a pass over the same text; tokens against the tokenizer's vocabulary."""
    data = SiteData(made / "run/reports/site")
    transcoder = CrossLayerTranscoder.load(made / "run/transcoder")
    from clt_plugins import build_source, read_recipe

    source = build_source(read_recipe(made / "run/recipe.toml"))
    batches = list(source.held_out(150))
    with torch.no_grad():
        dense = torch.cat([transcoder.encode(batch.inputs).dense() for batch in batches]).numpy()
    positions = torch.cat([batch.positions for batch in batches]).numpy()  # type: ignore[misc]
    ids = torch.cat([batch.token_ids for batch in batches]).numpy()  # type: ignore[misc]
    rows = {tuple(where): n for n, where in enumerate(positions.tolist())}
    text = data.text()
    of_row = [
        rows[where] for where in zip(text["context"].tolist(), text["position"].tolist(), strict=True)
    ]  # a row of the page -> of the pass
    assert data.arrays("vocabulary")["id"][text["word"]].tolist() == ids[of_row].tolist()
    shown = 0
    for layer in range(data.site["n_layers"]):
        for feature in range(20):
            page, values = data.feature(layer, feature), dense[of_row, layer, feature]
            assert page["active"] == (values > 0).sum()
            assert page["maximum"] == pytest.approx(values.max(), rel=1e-5)
            listed = page["top_row"][page["top_row"] >= 0]
            np.testing.assert_allclose(page["top_value"][: len(listed)], values[listed], rtol=1e-5)
            assert (np.diff(page["top_value"][: len(listed)]) <= 0).all()
            shown += len(listed)
    assert shown > 50


def test_the_command_makes_the_same_site_as_the_stage(made: Path, tmp_path: Path) -> None:
    graph = made / "graph.json"
    done = invoke("report", made / "run", "--out", tmp_path / "site", "--set", "shard=8", "--graph", graph)
    assert done.exit_code == 0, done.output
    assert f"open {tmp_path / 'site' / 'index.html'} in a browser" in done.output
    own, of_stage = tmp_path / "site/data", made / "run/reports/site/data"
    files = sorted(file.relative_to(own) for file in own.rglob("*.js"))
    assert files == sorted(file.relative_to(of_stage) for file in of_stage.rglob("*.js"))
    assert [file for file in files if (own / file).read_bytes() != (of_stage / file).read_bytes()] == [Path("site.js")]
    one, other = SiteData(tmp_path / "site").site, SiteData(made / "run/reports/site").site
    # The stage ran before the run's end was on record.
    assert one["run"].pop("history")[0].pop("end")["status"] == "finished" and other["run"].pop("history")
    assert one == other


def test_a_site_is_replaced_but_nothing_else_is(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    for shard in (8, 10):
        assert invoke("report", made / "run", "--out", out, "--set", f"shard={shard}").exit_code == 0
        assert SiteData(out).site["shard"] == shard
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("keep")
    text = refused(invoke("report", made / "run", "--out", tmp_path / "notes"))
    assert "already there, and no report" in text
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_a_store_alone(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    assert invoke("report", tmp_path / "store", "--out", tmp_path / "site").exit_code == 0
    site = SiteData(tmp_path / "site").site
    assert site["run"] == {} and site["n_features"] == 24
    assert Collected.open(tmp_path / "store").info.tokens == site["tokens"]


def test_a_run_that_was_not_collected(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "run", ignore=shutil.ignore_patterns("collected", "reports", "stages"))
    text = refused(invoke("report", tmp_path / "run", "--out", tmp_path / "site"))
    assert "its features are not collected: add --collect" in text and not (tmp_path / "site").exists()
    done = invoke("report", tmp_path / "run", "--out", tmp_path / "site", "--collect")
    assert done.exit_code == 0, done.output
    assert SiteData(tmp_path / "site").site["tokens"] == 150  # the settings of the recipe's stage
    checkpoint = tmp_path / "run/checkpoints/step_000002"
    text = refused(invoke("report", checkpoint, "--out", tmp_path / "other"))
    assert "not collected" in text


def test_a_store_of_another_transcoder_is_not_shown_as_this_one(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/collected")
    shutil.copytree(made / "run/stages/step_000002/collected", tmp_path / "run/collected")
    text = refused(invoke("report", tmp_path / "run", "--out", tmp_path / "site"))
    assert "collected from another transcoder" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--format", "sight"], "sight"),
        (["--set", "shard=0"], "shard"),
        (["--set", "colour=1"], "colour"),
        (["--graph", "nothing.json"], "nothing.json"),
    ],
)
def test_settings_that_cannot_be(made: Path, tmp_path: Path, arguments: list[str], text: str) -> None:
    assert text in refused(invoke("report", made / "run", "--out", tmp_path / "site", *arguments))
    assert not (tmp_path / "site").exists()


def test_a_recipe_whose_report_has_nothing_to_read(made: Path, tmp_path: Path) -> None:
    from clt_plugins import Faults

    def faults(*stages: Any) -> str:
        with pytest.raises(Faults) as error:
            run(recipe(made, stages=list(stages)), out=tmp_path / "run")
        return str(error.value)

    assert "reads collected/, which no stage before it writes" in faults("report")
    assert "reads collected/, which no stage before it writes" in faults("report", COLLECT)
    late = {"name": "report", "every": 2}
    assert "does not write at each of these steps" in faults(COLLECT, late)
    graphs = {"name": "report", "format": {"name": "site", "graphs": ["none.json"]}}
    assert "none.json" in faults(COLLECT, graphs)
    assert not (tmp_path / "run/transcoder").exists()


def test_a_report_is_made_again_when_what_it_reads_has_changed(made: Path, tmp_path: Path) -> None:
    """A resumed run keeps it otherwise."""
    out = tmp_path / "run"
    shutil.copytree(made / "run", out)
    stages = [{**COLLECT, "every": 2}, {"name": "report", "format": {"name": "site", "shard": 8}}]
    run(recipe(made, stages=stages), out=out, resume="latest")
    before = (out / "reports/site/manifest.json").stat().st_mtime_ns
    run(recipe(made, stages=stages), out=out, resume="latest")
    assert (out / "reports/site/manifest.json").stat().st_mtime_ns == before
    stages[0]["top"] = 2
    run(recipe(made, stages=stages), out=out, resume="latest")
    assert SiteData(out / "reports/site").site["examples"]["top"] == 2

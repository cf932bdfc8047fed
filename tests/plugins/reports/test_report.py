"""The commands that show a transcoder: its thresholds, and where features are most active."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clt_plugins import run
from clt_plugins.cli.main import main_group
from clt_plugins.data.batch import Batch
from clt_plugins.errors import ExitCode
from clt_reports.contexts import Example, FeatureExamples, TopActivations, as_text
from tests.support.helpers import parts, stir, tables
from tests.support.language_models import save_model, save_text


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main_group, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def streamed(tmp_path_factory) -> Path:
    """A run on the activations of a random model that reads 200 short texts."""
    folder = tmp_path_factory.mktemp("streamed")
    save_model(folder / "model")
    save_text(folder / "text.jsonl", 200)
    source = {"name": "stream", "text": str(folder / "text.jsonl"), "context": 32, "held_out": 0.3, "buffer_tokens": 64}
    chosen = tables(
        model={"path": str(folder / "model")},
        source=source,
        activation={"name": "jumprelu", "threshold": 0.05},
        train={"batch_tokens": 32, "steps": 20},
    )
    run(chosen, out=folder / "run")
    return folder / "run"


def test_thresholds_are_tabulated_plotted_and_shown_by_tensorboard(streamed):
    found = invoke("thresholds", streamed, "--json")
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["layers"]
    from safetensors.torch import load_file

    theta = load_file(streamed / "transcoder/transcoder.safetensors")["log_threshold"].double().exp()
    assert [row["lowest"] for row in rows] == pytest.approx(theta.amin(1).tolist())
    assert [row["median"] for row in rows] == pytest.approx(theta.quantile(0.5, dim=1).tolist())
    assert [row["mean"] for row in rows] == pytest.approx(theta.mean(1).tolist())
    assert (streamed / "thresholds/thresholds.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (events,) = (streamed / "thresholds").glob("events.*")
    shown = EventAccumulator(str(events))
    shown.Reload()
    assert "thresholds_by_layer/02" in shown.Tags()["histograms"]
    (histogram,) = shown.Histograms("thresholds_by_layer/00")
    assert histogram.histogram_value.num == theta.shape[1]
    assert len(invoke("thresholds", streamed).stdout.splitlines()) == 1 + 3 + 1


def test_top_activations_are_the_highest_with_their_neighbours(streamed, tmp_path):
    from clt_plugins.finished.find import find_trained
    from tests.support.helpers import plugins

    out = tmp_path / "top.json"
    found = invoke(
        "top-activations", streamed, "--features", "0:0-9,2:3", "--out", out, "--tokens", 500, "--top", 3, "--window", 2
    )
    assert found.exit_code == 0, found.output
    data = json.loads(out.read_text())
    trained = find_trained(streamed, plugins())
    transcoder = trained.transcoder()
    with trained.source() as source:
        batches = list(source.held_out(500))
        tokenizer = source.tokenizer
    acts = torch.cat([transcoder.encode(batch.inputs).dense().detach() for batch in batches])
    ids = torch.cat([batch.token_ids for batch in batches])
    places = torch.cat([batch.positions for batch in batches])
    assert data["tokens"] == len(ids)
    assert [(each["layer"], each["feature"]) for each in data["features"]] == [(0, f) for f in range(10)] + [(2, 3)]
    seen = 0
    for each in data["features"]:
        own = acts[:, each["layer"], each["feature"]]
        highest = own[own > 0].sort(descending=True).values[:3]
        assert [example["value"] for example in each["examples"]] == pytest.approx(highest.tolist())
        assert each["density"] == pytest.approx(float((own > 0).double().mean()))
        for example in each["examples"]:
            (row,) = ((places[:, 0] == example["context"]) & (places[:, 1] == example["position"])).nonzero()[0]
            at = example["index"]
            assert example["tokens"][at] == example["token"] == tokenizer.decode([int(ids[row])])
            assert example["values"][at] == pytest.approx(example["value"])
            for number, token in enumerate(example["tokens"]):
                neighbour = int(row) + number - at
                assert token == tokenizer.decode([int(ids[neighbour])])
                assert int(places[neighbour, 0]) == example["context"]
                assert int(places[neighbour, 1]) == example["position"] + number - at
            seen += 1
    assert seen > 5
    assert "active at" in found.stdout


def test_neighbours_do_not_reach_into_another_text():
    from clt_reports.contexts import find_top

    made = parts(activation={"name": "relu"})
    stir(made.transcoder)
    batch = made.source.next()
    places = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 5], [0, 6], [1, 1], [1, 2]])
    some = Batch(batch.inputs[:7], batch.targets[:7], torch.arange(100, 107), places)
    source: Any = SimpleNamespace(n_layers=3, d_model=6, held_out=lambda tokens: iter([some]))
    found = find_top(made.transcoder, source, [(0, f) for f in range(10)], tokens=7, top=7, window=9)
    whole = {100: [100, 101, 102], 103: [103, 104], 105: [105, 106]}
    groups = {token: group for group in whole.values() for token in group}
    examples = [example for feature in found.features for example in feature.examples]
    assert len({example.token for example in examples}) == 7
    assert all(example.tokens == groups[example.token] for example in examples)


def test_faults_are_one_line(streamed, tmp_path):
    def refused(text: str, *arguments: object) -> None:
        found = invoke(*arguments)
        assert found.exit_code == ExitCode.USAGE, found.output
        assert text in found.stderr.strip().splitlines()[-1], found.stderr

    refused("expected LAYER:FEATURE", "top-activations", streamed, "--features", "five")
    refused("no 0:10: there are 3 layers of 10 features", "top-activations", streamed, "--features", "0:10")
    refused("no such folder", "thresholds", tmp_path / "nowhere")
    run(tables(), out=tmp_path / "plain")
    refused("batchtopk has no thresholds: convert", "thresholds", tmp_path / "plain")
    refused("does not say which tokens", "top-activations", tmp_path / "plain", "--features", "0:1")
    (tmp_path / "there.json").write_text("{}")
    there = ["--features", "0:1", "--out", tmp_path / "there.json", "--tokens", 50]
    refused("already there", "top-activations", streamed, *there)
    nowhere = ["--features", "0:1", "--out", tmp_path / "nowhere" / "top.json", "--tokens", 50]
    refused("there is no such folder", "top-activations", streamed, *nowhere)


def test_without_matplotlib_there_is_one_line_that_names_the_extra_and_still_a_table(streamed, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = invoke("thresholds", streamed, "--out", tmp_path / "out")
    assert found.exit_code == ExitCode.USAGE
    (line,) = found.stderr.strip().splitlines()
    assert line == "thresholds.png: drawing it needs matplotlib: pip install 'clt-plugins[plots]', or give --no-plot"
    assert not (tmp_path / "out").exists()
    table = invoke("thresholds", streamed, "--out", tmp_path / "out", "--no-plot")
    assert table.exit_code == ExitCode.OK
    assert len(table.stdout.splitlines()) == 1 + 3
    assert not (tmp_path / "out").exists()


def test_texts_do_not_reach_the_terminal_as_control_characters():
    """The line of a Windows file ended in a return, which wrote over the value."""
    example = Example(1.5, " b\x1b[2J", [" a\r\n", " b\x1b[2J"], [0.0, 1.5], 1, 0, 1)
    text = as_text(TopActivations(2, [FeatureExamples(0, 3, 0.5, [example])]))
    assert text.splitlines()[-1] == "    1.5000   a\\r\\n[ b\\x1b[2J]"

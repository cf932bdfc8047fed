"""The stage `circuits`, with a stand-in for circuit-tracer; `tests/interop` has the real one."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
from click.testing import CliRunner

from clt_plugins import Faults, read_facts, run
from clt_plugins.cli.main import main_group
from clt_plugins.finished.provenance import identify
from tests.support import fake_circuit_tracer
from tests.support.helpers import tables

FAKE = fake_circuit_tracer.__file__
PROMPTS = ["def f():\n    return ", "1 + 1 ="]


def recipe(**settings):
    stage = {"name": "circuits", "prompts": PROMPTS, "python": FAKE, **settings}
    return tables(activation={"name": "jumprelu"}, model={"path": "some/model"}, stages=[stage])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(recipe(feature_details={"neuronpedia_source_set": "mine"}, max_features=9), out=folder)
    return folder


def test_scores_are_recorded_with_what_they_were_made_from(whole):
    record = json.loads((whole / "circuits/circuits.json").read_text())
    assert record["replacement"] == 0.625 and record["completeness"] == 1
    assert [graph["prompt"] for graph in record["graphs"]] == PROMPTS
    assert record["versions"]["circuit-tracer"] == "0.0.fake"
    assert record["made_from"]["transcoder"]["folder"] == "transcoder"
    assert record["made_from"]["settings"]["circuits"]["prompts"] == PROMPTS
    assert "python" not in record["made_from"]["settings"]["circuits"], "another path of it needs no other graph"
    logged = [json.loads(line) for line in (whole / "circuits/metrics.jsonl").read_text().splitlines()]
    assert logged[0]["circuits/replacement"] == 0.625


def test_graphs_say_how_they_were_made(whole):
    files = sorted((whole / "circuits/graphs").glob("*.json"))
    assert [file.stem[:-9] for file in files] == ["1-1", "def-f-return"]
    metadata = json.loads(files[0].read_text())["metadata"]
    assert metadata["scan"] == "/model", "local features"
    assert metadata["info"]["generator"]["name"] == "circuit-tracer"
    assert metadata["feature_details"] == {"neuronpedia_source_set": "mine"}
    assert metadata["pruning_settings"] == {"node_threshold": 0.8, "edge_threshold": 0.98}
    assert metadata["generation_settings"]["max_feature_nodes"] == 9


def test_nothing_of_the_hand_over_stays(whole):
    assert not (whole / "circuits/transcoder").exists()
    assert not [file for file in (whole / "circuits").rglob("*.json") if file.stem in ("request", "result")]
    assert str(whole) not in "".join(file.read_text() for file in (whole / "circuits").rglob("*.json"))


FAULTS = {
    "no program": ({"python": "no-such-python"}, None, "python", "'no-such-python' is no program: install it from its"),
    "fork": ({}, "fork", "python", "the circuit-tracer there is the old fork of that name on PyPI: install it"),
    "no circuit-tracer": ({"python": None}, None, "python", "No module named 'circuit_tracer'"),
    "device": ({"device": "cuda"}, "device", "device", "no GPU"),
    "twice": ({"prompts": ["a", "a"]}, None, "prompts", "the same prompt stands there twice"),
    "empty": ({"prompts": ["a", " "]}, None, "prompts", "must be texts, at least one, and none of them empty"),
    "format": ({"format": "crosslayer-coding"}, None, "format", "is not read by circuit-tracer: use one of"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_it_is_refused_before_training(name, tmp_path, monkeypatch):
    settings, fault, setting, text = FAULTS[name]
    if fault is not None:
        monkeypatch.setenv("FAKE_FAULT", fault)
    settings = {key: value for key, value in {"python": FAKE, **settings}.items() if value is not None}
    stage = {"name": "circuits", "prompts": PROMPTS, **settings}
    with pytest.raises(Faults) as refused:
        run(tables(activation={"name": "jumprelu"}, model={"path": "some/model"}, stages=[stage]), out=tmp_path / "r")
    (one,) = refused.value.faults
    assert one.where[:3] == ("stages", 0, setting) and text in one.text
    assert not (tmp_path / "r/transcoder").exists()


def test_what_circuit_tracer_says_last_is_the_error(whole, monkeypatch):
    before = (whole / "circuits/circuits.json").read_bytes()
    monkeypatch.setenv("FAKE_FAULT", "crash")
    done = CliRunner().invoke(main_group, ["stage", "circuits", str(whole), "--set", 'prompts=["other"]'])
    assert done.exit_code != 0
    assert "circuit-tracer failed: RuntimeError: out of memory" in done.stderr
    assert (whole / "circuits/circuits.json").read_bytes() == before, "an older result stays"


def test_the_command_asks_circuit_tracer_before_it_exports(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAULT", "fork")
    done = CliRunner().invoke(main_group, ["stage", "circuits", str(whole), "--out", str(tmp_path / "new")])
    assert done.exit_code == 2 and "the old fork of that name on PyPI" in done.stderr


def test_the_command_stage(whole, tmp_path):
    command = ["stage", "circuits", str(whole), "--set", 'prompts=["other"]', "--json", "--out", str(tmp_path / "new")]
    done = CliRunner().invoke(main_group, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["graphs"][0]["prompt"] == "other", "other settings are those of the recipe"
    assert json.loads((tmp_path / "new/circuits.json").read_text())["made_from"]["transcoder"]["folder"] == "transcoder"


def test_reports_are_told_the_scores_of_this_transcoder(whole):
    assert read_facts(whole).circuits["replacement"] == 0.625
    of_it = identify(whole / "transcoder")
    assert read_facts(whole, of_it).circuits["graphs"][1]["prompt"] == PROMPTS[1]
    facts = read_facts(whole, attrs.evolve(of_it, sha256="0" * 64))
    assert facts.circuits is None and "circuits/circuits.json is of another transcoder" in facts.notes[0]

"""Neuronpedia's bulk import: the layout, and rows that hold what the store holds. `tests/interop` has its schemas."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict

import attrs
import numpy as np
import pytest

from clt_plugins import Collected, Faults, Refused, run
from clt_plugins.testing.stores import make_store
from tests.plugins.feature_files.test_circuit_tracer import written
from tests.support.helpers import tables


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "store"
    make_store(folder)
    return Collected.open(folder)


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory):
    settings = {"source_set": "clt-24", "batch": 10, "creator": "Me", "creator_id": "user", "weights": "me/clt"}
    return written(store, tmp_path_factory.mktemp("reports") / "neuronpedia", "neuronpedia", **settings)


def rows(path):
    data = path.read_bytes()
    lines = (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()
    return [json.loads(line) for line in lines]


def test_the_layout(folder, store):
    assert [path.name for path in folder.iterdir()] == ["made-up"]
    for layer in range(2):
        source = folder / "made-up" / f"{layer}-clt-24"
        names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
        batches = [f"{kind}/batch-{number}.jsonl.gz" for kind in ("activations", "features") for number in range(3)]
        assert names == sorted([*batches, "model.jsonl", "release.jsonl", "source.jsonl", "sourceset.jsonl"])
        (one,) = rows(source / "source.jsonl")
        assert (one["id"], one["setName"], one["modelId"]) == (f"{layer}-clt-24", "clt-24", "made-up")
        assert one["hfRepoId"] == "me/clt" and one["num_prompts"] == store.info.contexts
        assert rows(source / "sourceset.jsonl")[0]["releaseName"] == rows(source / "release.jsonl")[0]["name"]


def test_features_are_those_of_the_store(folder, store):
    for layer in range(2):
        arrays = store.layer(layer)
        inside = folder / "made-up" / f"{layer}-clt-24" / "features"
        features = [row for number in range(3) for row in rows(inside / f"batch-{number}.jsonl.gz")]
        assert [row["index"] for row in features] == [str(number) for number in range(24)]
        for number, row in enumerate(features):
            assert row["layer"] == f"{layer}-clt-24" and row["modelId"] == "made-up" and row["creatorId"] == "user"
            assert np.float32(row["maxActApprox"]) == arrays["maximum"][number]
            assert row["frac_nonzero"] == arrays["active"][number] / store.info.tokens
            assert sum(row["freq_hist_data_bar_heights"]) == arrays["histogram"][number].sum()
            assert len(row["freq_hist_data_bar_values"]) == len(row["freq_hist_data_bar_heights"])
            assert (np.float32(row["pos_values"]) == arrays["logits_up_value"][number, -1]).all()
            assert (np.float32(row["neg_values"]) == arrays["logits_down_value"][number, -1]).all()
            own = [one % 24 for one in arrays["similar"][number] if one // 24 == layer and one >= 0]
            assert row["topkCosSimIndices"] == own and len(row["topkCosSimValues"]) == len(own)


def test_activations_are_the_examples(folder, store):
    ids = set()
    for layer in range(2):
        inside = folder / "made-up" / f"{layer}-clt-24" / "activations"
        by_feature = defaultdict(list)
        for number in range(3):
            for row in rows(inside / f"batch-{number}.jsonl.gz"):
                by_feature[int(row["index"])].append(row)
                ids.add(row["id"])
        for feature in range(24):
            examples = store.examples(layer, feature)
            edges = store.layer(layer)["group_edge"][feature]
            expected = [(one, -1, edges[0], -1) for one in examples.top]
            expected += [
                (one, edges[number + 1], edges[number], 1 / len(examples.groups))
                for number, group in enumerate(examples.groups)
                for one in group
            ]
            assert len(by_feature[feature]) == len(expected)
            for row, (example, low, high, share) in zip(by_feature[feature], expected, strict=True):
                assert (np.float32(row["values"]) == example.values).all()
                assert row["values"][row["qualifyingTokenIndex"]] == row["values"][example.row - example.start]
                assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
                assert row["minValue"] == min(row["values"])
                assert (np.float32(row["binMin"]), np.float32(row["binMax"])) == (low, high)
                assert row["binContains"] == share
                spelled = store.spell(store.ids[example.start : example.stop])
                shown = [piece.decode("utf-8", "replace").replace("\x00", "\ufffd") for piece in spelled]
                assert row["tokens"] == shown
    total = sum(len(path.read_bytes() and rows(path)) for path in folder.rglob("activations/*.gz"))
    assert len(ids) == total, "no id twice"
    assert all(re.fullmatch(r"c[0-9a-z]{24}", one) for one in ids)


def test_its_database_holds_no_nul(folder):
    for path in folder.rglob("*.gz"):
        assert b"\\u0000" not in gzip.decompress(path.read_bytes())


def test_the_model_must_be_known(store, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "info", attrs.evolve(store.info, model=None))
    with pytest.raises(Refused, match=r"model_id: .*: set it to the model's id there"):
        written(store, tmp_path / "report", "neuronpedia")
    assert (written(store, tmp_path / "named", "neuronpedia", model_id="gpt2") / "gpt2" / "0-clt").is_dir()


def test_layers_have_the_numbers_that_they_have_in_the_language_model(store, tmp_path):
    """Features of layer 6 were imported as those of layer 0."""
    some = Collected.open(store.folder)
    some.info = attrs.evolve(store.info, model={"path": "made-up", "layers": [6, 9]})
    with pytest.raises(Refused, match=r"model_layers: the transcoder is of layers \[6, 9\] of its .*: set it to"):
        written(some, tmp_path / "refused", "neuronpedia")
    with pytest.raises(Refused, match=r"model_layers: 9, but the transcoder is of layers \[6, 9\] .*: set it to"):
        written(some, tmp_path / "too few", "neuronpedia", model_layers=9)
    folder = written(some, tmp_path / "some", "neuronpedia", model_layers=12) / "made-up"
    assert {path.name for path in folder.iterdir()} == {"6-clt", "9-clt"}
    assert rows(folder / "9-clt/model.jsonl")[0]["layers"] == 12
    assert rows(folder / "9-clt/features/batch-0.jsonl.gz")[0]["layer"] == "9-clt"
    of_second = store.layer(1)["maximum"][0]
    assert np.float32(rows(folder / "9-clt/features/batch-0.jsonl.gz")[0]["maxActApprox"]) == of_second


def test_the_first_layers_are_not_taken_for_all(store, tmp_path):
    first = Collected.open(store.folder)
    first.info = attrs.evolve(store.info, model={"path": "made-up", "layers": [0, 1]})
    with pytest.raises(Refused, match=r"model_layers: the transcoder is of layers \[0, 1\] of its language model"):
        written(first, tmp_path / "refused", "neuronpedia")


def test_what_is_not_known_of_the_model_is_refused_before_training(tmp_path):
    report = {"name": "report", "format": "neuronpedia"}
    with pytest.raises(Faults, match=r"stages\[1\]\.format: model_id: .*: set it to the model's id there"):
        run(tables(stages=[{"name": "collect"}, report]), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()

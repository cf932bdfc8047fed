"""circuit-tracer's local features: read as its page reads them, they are what the store holds."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch

from clt_feature_files.circuit_tracer import paired, unpaired
from clt_feature_files.features import escaped, even_bins, percentiles
from clt_plugins import Collected, Facts, Refused
from clt_plugins.model.devices import bare_context
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry.build import build
from clt_plugins.testing.stores import HOSTILE, make_store
from tests.support.feature_files import from_disk, same_as_the_store, to_bytes
from tests.support.helpers import plugins


def written(collected, folder, name="circuit-tracer", **settings):
    folder.mkdir()
    report = build(
        structure_choice(plugins(), "reports", {"name": name, **settings}), bare_context(torch.device("cpu"))
    )
    report.write(collected, Facts(name="mine"), folder)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "store"
    make_store(folder)
    return Collected.open(folder)


@pytest.mark.parametrize("geometry", [True, False])
def test_all_features_are_those_of_the_store(geometry, tmp_path):
    make_store(tmp_path / "store", geometry=geometry, layers=3, features=7)
    collected = Collected.open(tmp_path / "store")
    folder = written(collected, tmp_path / "features")
    for layer in range(3):
        for feature in range(7):
            same_as_the_store(from_disk(folder, layer, feature), collected, layer, feature)
    assert sorted(path.name for path in folder.iterdir()) == ["index.json.gz", *(f"layer_0{i}.bin" for i in range(3))]


def test_offsets_end_with_the_file(store, tmp_path):
    folder = written(store, tmp_path / "features")
    for layer in json.loads(gzip.decompress((folder / "index.json.gz").read_bytes())):
        assert len(layer["offsets"]) == store.info.n_features + 1
        assert layer["offsets"][-1] == (folder / layer["filename"]).stat().st_size


def test_tokens_keep_their_bytes():
    for piece in (*HOSTILE, rb"\x41", rb"\\x41\x", "\\x\u00e9".encode(), b"\\", "\u00e9".encode()[:1] + b"\\x41"):
        assert to_bytes(escaped(piece)) == piece
    assert escaped("na\u00efve \U0001f600".encode()) == "na\u00efve \U0001f600", "characters stay what they are"


def test_numbers_pair_layer_and_feature():
    numbers = {paired(layer, feature): (layer, feature) for layer in range(40) for feature in range(500)}
    assert len(numbers) == 40 * 500 and all(unpaired(number) == pair for number, pair in numbers.items())
    assert unpaired(paired(127, 2**31 - 1)) == (127, 2**31 - 1)
    assert (paired(0, 1), paired(0, 20), paired(0, 42)) == (2, 230, 945), "as circuit-tracer 4bb8c0e writes them"


def test_histogram_and_percentiles_are_those_of_the_values():
    values = np.random.default_rng(0).lognormal(0, 1, 20_000)
    edges = np.geomspace(1e-2, 1e2, 401)
    counts = np.histogram(values.clip(edges[0], edges[-1]), edges)[0]
    low, high = float(values.min()), float(values.max())
    even = even_bins(counts, edges.tolist(), low, high, 50)
    assert sum(even) == pytest.approx(len(values))
    expected = np.histogram(values, 50, (low, high))[0]
    assert np.abs(np.array(even) - expected).sum() < 0.05 * len(values)
    shares = np.percentile(values, np.arange(1, 101))
    assert np.allclose(percentiles(counts, edges.tolist(), low, high), shares, rtol=0.03)
    # Beyond the outer edges, all of one value, and none at all.
    outside = even_bins(np.array([3, 0, 2]), [1.0, 2.0, 3.0, 4.0], 0.5, 9.0, 4)
    assert sum(outside) == pytest.approx(5, abs=0.01) and outside[0] > 0 and outside[-1] > 0
    assert even_bins(np.array([0, 5]), [1.0, 2.0, 3.0], 2.5, 2.5, 3) == [5, 0, 0]
    assert percentiles(np.array([0, 0]), [1.0, 2.0, 3.0], 0.0, 0.0) == []


def graph(folder, *nodes):
    file = folder / "graph.json"
    file.write_text(json.dumps({"nodes": [{"feature_type": kind, "feature": number} for kind, number in nodes]}))
    return file


def test_a_graph_gets_the_features_that_it_names(store, tmp_path):
    numbers = [paired(0, 3), paired(1, 23), paired(1, 23)]
    kinds = [("cross layer transcoder", number) for number in numbers]
    file = graph(tmp_path, *kinds, ("mlp reconstruction error", -1), ("embedding", 5), ("logit", 10**6))
    folder = written(store, tmp_path / "features", "feature-json", graphs=[str(file)])
    assert {int(path.stem) for path in folder.iterdir()} == set(numbers)
    for number in numbers:
        same_as_the_store(json.loads((folder / f"{number}.json").read_text()), store, *unpaired(number))


@pytest.mark.parametrize(
    "node, text",
    [
        (("cross layer transcoder", paired(2, 0)), "names feature 0 of layer 2, and the transcoder has 2 layers of 24"),
        (("cross layer transcoder", paired(0, 24)), "it is of another transcoder"),
        (("cross layer transcoder", -1), "names a feature -1: not a number"),
        (("cross layer transcoder", None), "names a feature None: not a number"),
    ],
)
def test_a_graph_of_another_transcoder_is_refused(node, text, store, tmp_path):
    with pytest.raises(Refused, match=text):
        written(store, tmp_path / "features", "feature-json", graphs=[str(graph(tmp_path, node))])
    assert not list((tmp_path / "features").iterdir())


def test_a_file_that_is_no_graph_is_refused(store, tmp_path):
    for number, text in enumerate(("[]", "{", '{"nodes": [1]}')):
        file = tmp_path / "graph.json"
        file.write_text(text)
        with pytest.raises(Refused, match="is no graph of circuit-tracer"):
            written(store, tmp_path / f"features{number}", "feature-json", graphs=[str(file)])

"""Collected features as files of other tools: served by circuit-tracer itself, and valid for Neuronpedia's schemas.

`python -m tests.interop` makes the environments. `CLT_CIRCUIT_TRACER` and `CLT_NEURONPEDIA` name checkouts.
"""

from __future__ import annotations

import json

import pytest
import torch

from clt_plugins import Collected, Facts
from clt_plugins.model.devices import bare_context
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry.build import build
from clt_plugins.testing.stores import make_store
from tests.interop.common import JUMPRELU, MODEL, TYINGS, checkout, export, interpreter, make, script
from tests.support.feature_files import same_as_the_store
from tests.support.helpers import plugins

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """A graph of the shipped model."""
    folder = tmp_path_factory.mktemp("circuits")
    exported, _ = export(make(JUMPRELU, TYINGS["untied"]), "circuit-tracer", folder)
    options = ("--model", MODEL, "--out", folder / "graphs")
    script(interpreter("circuit-tracer"), "circuit_tracer_check.py", exported, *options)
    return folder / "graphs"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of as many features, with tokens that are hard to write."""
    folder = tmp_path_factory.mktemp("stores") / "store"
    make_store(folder, layers=6, features=64)
    return Collected.open(folder)


def report(store, folder, name, **settings):
    folder.mkdir()
    chosen = structure_choice(plugins(), "reports", {"name": name, **settings})
    build(chosen, bare_context(torch.device("cpu"))).write(store, Facts(name="mine"), folder)
    return folder


def test_circuit_tracer_serves_the_features_of_a_graph(graphs, store, tmp_path):
    features = report(store, tmp_path / "features", "circuit-tracer")
    answers = tmp_path / "answers.json"
    told = script(interpreter("circuit-tracer"), "circuit_tracer_serve.py", graphs, features, answers)
    assert told["graphs"] == 1 and told["features"] > 20
    served = json.loads(answers.read_text())
    # Its page and we must mean the same feature by a number: the store's features all differ.
    for number, feature in served.items():
        total = int(((8 * int(number) + 1) ** 0.5 - 1) / 2)
        index = int(number) - total * (total + 1) // 2
        same_as_the_store(feature, store, total - index, index)


def test_neuronpedias_schemas_hold(graphs, store, tmp_path):
    python = interpreter("neuronpedia")
    graph = next(path for path in graphs.glob("*.json") if path.stem != "graph-metadata")
    features = report(store, tmp_path / "features", "feature-json", graphs=[str(graph)])
    imported = report(store, tmp_path / "import", "neuronpedia", batch=50, creator="Me")
    count = script(python, "neuronpedia_check.py", checkout("neuronpedia"), graphs, features, imported)
    assert count["graph-schema.json"] == 1 and count["feature-details-schema.json"] > 20
    assert count["features"] == 6 * 64 and count["activations"] > 6 * 64

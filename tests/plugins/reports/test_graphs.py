"""Attribution graphs of circuit-tracer in a site: what is read, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clt_plugins import Refused
from clt_reports.site.data import graphs
from clt_reports.site.data.graphs import read_graph
from tests.support.site_data import SiteData


def cantor(layer: int, feature: int) -> int:
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def node(name: str, kind: str, layer: str, feature: int, position: int = 1, **rest: Any) -> dict[str, Any]:
    return {"node_id": name, "feature_type": kind, "layer": layer, "feature": feature, "ctx_idx": position, **rest}


FEATURE = "cross layer transcoder"
GRAPH: dict[str, Any] = {
    "metadata": {"slug": "my </script> graph", "scan": "x", "prompt": "a b", "prompt_tokens": ["a", " <b>"]},
    "qParams": {"pinnedIds": ["1_17_1"], "supernodes": [["both", "0_3_1", "1_17_1"]], "linkType": "both"},
    "nodes": [
        node("E_5_0", "embedding", "E", 5, 0),
        node("0_3_1", FEATURE, "0", cantor(0, 3), influence=0.25, activation=1.5, clerp="<i>label</i>"),
        node("1_17_1", FEATURE, "1", cantor(1, 17)),
        node("0_1_1", "mlp reconstruction error", "1", -1),
        node("3_9_1", "logit", "3", 9, token_prob=0.5, is_target_logit=True),
    ],
    "links": [
        {"source": "E_5_0", "target": "0_3_1", "weight": 0.5},
        {"source": "0_3_1", "target": "1_17_1", "weight": -2},
        {"source": "1_17_1", "target": "3_9_1", "weight": 0.0},
    ],
}


def changed(*path: Any, to: Any) -> dict[str, Any]:
    graph = copy.deepcopy(GRAPH)
    inner = graph
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = to
    return graph


def save(folder: Path, graph: Any, name: str = "graph.json") -> Path:
    file = folder / name
    file.write_text(json.dumps(graph))
    return file


def test_a_graph(tmp_path: Path) -> None:
    graph = read_graph(save(tmp_path, GRAPH), 2, 20)
    assert graph.summary() == {
        "name": "my-script-graph",
        "title": "my </script> graph",
        "prompt": "a b",
        "nodes": 5,
        "links": 3,
    }
    kinds = [(one["kind"], one["layer"], one["position"], one["feature"]) for one in graph.value["nodes"]]
    assert kinds == [
        ("embedding", -1, 0, None),
        ("feature", 0, 1, 3),
        ("feature", 1, 1, 17),
        ("error", 1, 1, None),
        ("logit", 2, 1, None),
    ]
    _, first, second, _, logit = graph.value["nodes"]
    assert (first["label"], first["influence"], first["activation"], first["pinned"]) == (
        "<i>label</i>",
        0.25,
        1.5,
        False,
    )
    assert second["pinned"] and second["influence"] is None
    assert logit["probability"] == 0.5 and logit["target"]
    graph.write(tmp_path)
    (tmp_path / "data" / "site.js").write_text('CLT.put("site",{});\n')
    data = SiteData(tmp_path)
    assert data.value("graphs/my-script-graph")["supernodes"] == [["both", "0_3_1", "1_17_1"]]
    links = data.arrays("graphs/my-script-graph", "packed")
    assert {name: array.tolist() for name, array in links.items()} == {
        "source": [1, 0, 2],
        "target": [2, 1, 4],
        "weight": [-2.0, 0.5, 0.0],
    }


def test_an_error_that_has_the_name_of_a_feature_gives_way_to_it(tmp_path: Path) -> None:
    graph = changed("nodes", to=[*GRAPH["nodes"], node("0_1_1", FEATURE, "0", cantor(0, 1))])
    graph["links"].append({"source": "0_1_1", "target": "3_9_1", "weight": 4})
    read = read_graph(save(tmp_path, graph), 2, 20)
    kinds = {one["id"]: one["kind"] for one in read.value["nodes"]}
    assert len(read.value["nodes"]) == 5 and kinds["0_1_1"] == "feature"


def test_every_feature_is_found_again_from_its_cantor_number(tmp_path: Path) -> None:
    features = [(layer, feature) for layer in (0, 1, 25) for feature in (0, 1, 2, 16_383, 98_303)]
    graph = copy.deepcopy(GRAPH)
    graph["nodes"] = [node(f"n{n}", FEATURE, str(a), cantor(a, b)) for n, (a, b) in enumerate(features)]
    graph["links"] = []
    nodes = read_graph(save(tmp_path, graph), 26, 98_304).value["nodes"]
    assert [(one["layer"], one["feature"]) for one in nodes] == features


def test_a_number_that_is_no_pair_is_taken_from_the_name(tmp_path: Path) -> None:
    graph = changed("nodes", 2, "feature", to=17)
    assert read_graph(save(tmp_path, graph), 2, 20).value["nodes"][2]["feature"] == 17


def test_names_are_safe_and_no_two_are_one(tmp_path: Path) -> None:
    taken: set[str] = set()
    names = []
    for slug in ("../../etc", "A", "a", "", "\u202e", None, "x" * 200):
        file = save(tmp_path, changed("metadata", "slug", to=slug))
        names.append(read_graph(file, 2, 20, taken).name)
    assert names == ["etc", "A", "a-2", "graph", "graph-2", "graph-3", "x" * 60]


@pytest.mark.parametrize(
    ("graph", "text"),
    [
        ([], "'metadata' is missing"),
        ({"metadata": {}}, "'nodes' is missing"),
        (changed("metadata", "prompt_tokens", to="ab"), "'metadata.prompt_tokens' is missing, or no list"),
        (changed("metadata", "prompt_tokens", to=[1]), "metadata.prompt_tokens is no text"),
        (changed("nodes", 1, to=3), r"nodes\[1\] is no object"),
        (changed("nodes", 1, "node_id", to="E_5_0"), "two nodes have one node_id"),
        (changed("nodes", 1, "feature_type", to="neuron"), "feature_type is 'neuron', expected one of"),
        (changed("nodes", 1, "ctx_idx", to=-1), r"nodes\[1\].ctx_idx is no number from 0"),
        (changed("nodes", 1, "layer", to="2"), "is in layer 2, the transcoder has 2: it is another's graph"),
        (changed("nodes", 1, "layer", to="x"), "layer is 'x', expected the number of a layer"),
        (changed("nodes", 1, "feature", to=cantor(0, 20)), "is feature 20, a layer has 20"),
        (changed("nodes", 1, "feature", to=cantor(1, 4)), None),
        (changed("nodes", 1, "node_id", to="n1"), r"links\[0\] names no two nodes"),
        (changed("nodes", 1, "influence", to="big"), r"nodes\[1\].influence is no number"),
        (changed("links", 0, "source", to="nobody"), r"links\[0\] names no two nodes"),
        (changed("links", 0, "source", to=[]), r"links\[0\] names no two nodes"),
        (changed("links", 0, "weight", to="1"), r"links\[0\].weight is no number"),
        (changed("links", 0, "weight", to=True), r"links\[0\].weight is no number"),
        (changed("qParams", "supernodes", to=[1]), "supernodes"),
    ],
)
def test_what_is_no_graph_is_refused_with_its_place(tmp_path: Path, graph: Any, text: str | None) -> None:
    file = save(tmp_path, graph)
    if text is None:  # the pair is of another layer than the node: its name says which feature it is
        assert read_graph(file, 2, 20).value["nodes"][1]["feature"] == 3
        return
    with pytest.raises(Refused, match=text) as refused:
        read_graph(file, 2, 20)
    assert str(file) in str(refused.value)


def test_files_that_are_no_json_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep.json").write_bytes(b"[" * 100_000)
    (tmp_path / "nan.json").write_bytes(b'{"metadata": NaN}')
    with pytest.raises(Refused, match="nested too deep"):
        read_graph(tmp_path / "deep.json", 2, 20)
    with pytest.raises(Refused, match="NaN is not JSON"):
        read_graph(tmp_path / "nan.json", 2, 20)
    with pytest.raises(Refused, match="missing"):
        read_graph(tmp_path / "none.json", 2, 20)
    monkeypatch.setattr(graphs, "LARGEST", 100)
    with pytest.raises(Refused, match="larger than 100 bytes"):
        read_graph(save(tmp_path, GRAPH), 2, 20)
    monkeypatch.setattr(graphs, "LARGEST", 2**20)
    monkeypatch.setattr(graphs, "NODES", 4)
    with pytest.raises(Refused, match="prune the graph before it is written"):
        read_graph(save(tmp_path, GRAPH), 2, 20)


def test_weights_in_float32(tmp_path: Path) -> None:
    weight = 0.1234567890123
    graph = read_graph(save(tmp_path, changed("links", 0, "weight", to=weight)), 2, 20)
    assert np.float32(weight) in graph.links["weight"].astype(np.float32)

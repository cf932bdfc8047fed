"""Sites for the tests of the pages: made by the report itself from random stores."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import attrs

from clt_plugins import Collected, Facts
from clt_plugins.finished.curves import Curve
from clt_plugins.testing.stores import make_store
from clt_reports import SiteConfig
from clt_reports.site.write import Site

TOKENS = ["<|start|>", "def", " main", "(", "<b>)</b>", ":", "\n", "    return"]

EVALUATION: dict[str, Any] = {
    "tokens": 20000,
    "nmse": 0.0902,
    "explained_variance": 0.91,
    "l0": 96.0,
    "dead_fraction": 0.018,
    "dense_fraction": 0.004,
    "by_layer": {
        "nmse": [0.0923, 0.0803, None],
        "explained_variance": [0.9087, 0.92, None],
        "l0": [10.8, 11.0, 11.6],
        "dead_fraction": [0.01, 0.042, 0.027],
        "dense_fraction": [0, 0, 0],
    },
    "model": {
        "tokens": 8000,
        "cross_entropy": {"model": 2.118, "transcoder": 2.305, "with_errors": 2.118, "mean": 4.02, "zero": 5.61},
        "kl": {"model": 0.0, "transcoder": 0.192, "with_errors": 1e-9, "mean": 2.1, "zero": 3.9},
        "top1": {"model": 1.0, "transcoder": 0.83, "with_errors": 1.0, "mean": 0.31, "zero": 0.12},
        "ce_recovered": 0.946,
        "ce_recovered_of_mean": 0.9,
    },
    "notes": [],
}


def graph(layers: int, features: int, seed: int = 0) -> dict[str, Any]:
    """An attribution graph as circuit-tracer writes it, at random: its links lead forwards."""
    draw = random.Random(seed)
    nodes: list[dict[str, Any]] = []

    def add(kind: str, name: str, layer: str, position: int, feature: int, **more: Any) -> None:
        node = {"node_id": name, "feature": feature, "layer": layer, "ctx_idx": position, "feature_type": kind}
        nodes.append({**node, "jsNodeId": name, **more})

    for position in range(len(TOKENS)):
        add("embedding", f"E_{position}_{position}", "E", position, position)
    for layer in range(layers):
        for position in range(1, len(TOKENS)):
            # From 10 on: features 0 to L - 1 of layer 0 have the names that errors have.
            for one in sorted(draw.sample(range(10, features), draw.randrange(5))):
                paired = (layer + one) * (layer + one + 1) // 2 + one
                values = {"influence": draw.random(), "activation": 5 * draw.random()}
                add("cross layer transcoder", f"{layer}_{one}_{position}", str(layer), position, paired, **values)
            add("mlp reconstruction error", f"0_{layer}_{position}", str(layer), position, -1, influence=draw.random())
    for i, token in enumerate([" x", "<img src=x onerror=alert(1)>", "\n"]):
        label = f'Output "{token}" (p={0.5 / (i + 1):.3f})'
        last = len(TOKENS) - 1
        add("logit", f"{layers + 1}_{i}_{last}", str(layers + 1), last, i, token_prob=0.5 / (i + 1), clerp=label)

    def height(node: dict[str, Any]) -> int:
        return -1 if node["layer"] == "E" else int(node["layer"])

    links = [
        {"source": a["node_id"], "target": b["node_id"], "weight": draw.gauss(0, 1) ** 3}
        for a in nodes
        for b in nodes
        if height(a) < height(b) and a["ctx_idx"] <= b["ctx_idx"] and "error" not in b["feature_type"]
        if draw.random() < 0.2
    ]
    first = next(node["node_id"] for node in nodes if "transcoder" in node["feature_type"])
    groups = [["<i>group</i>", first]]
    metadata = {"slug": "main", "scan": "", "transcoder_list": [], "prompt_tokens": TOKENS, "prompt": "".join(TOKENS)}
    settings = {"pinnedIds": [], "supernodes": groups, "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": settings, "nodes": nodes, "links": links}


@attrs.frozen(eq=False)
class Made:
    """A site, and what it was made from."""

    folder: Path
    collected: Collected
    graph: dict[str, Any]

    def address(self, route: str = "") -> str:
        return f"{(self.folder / 'index.html').as_uri()}{route}"


def make_site(folder: Path, **sizes: Any) -> Made:
    """A small site with hostile tokens, a graph named `main`, and an evaluation. `sizes`: see `make_store`."""
    sizes = {
        "layers": 3,
        "features": 300,
        "tokens": 3000,
        "contexts": 30,
        "window": 8,
        "most_active": 60,
        "vocabulary": 200,
        **sizes,
    }
    make_store(folder / "store", **sizes)
    collected = Collected.open(folder / "store")
    drawn = graph(sizes["layers"], sizes["features"])
    file = folder / "main.json"
    file.write_text(json.dumps(drawn))
    facts = Facts(
        name="A <em>run</em>",
        evaluation=EVALUATION,
        recipe_text='name = "</script>"\n',
        curves={
            "eval/nmse": Curve(step=[100, 200, 300], value=[0.3, None, 0.1]),
            "eval/nmse_by_layer": Curve(step=[100, 200], value=[[0.3, 0.2, 0.4], [0.2, None, 0.3]]),
        },
        notes=["<u>none</u>"],
    )
    out = folder / "site"
    out.mkdir()
    Site(SiteConfig(shard=64, graphs=[file]), None).write(collected, facts, out)  # type: ignore[arg-type]
    return Made(out, collected, drawn)

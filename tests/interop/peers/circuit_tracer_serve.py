"""Serve graphs and features with circuit-tracer itself, and ask for features as its page does: by HTTP ranges.

Runs in an environment with circuit-tracer; imports nothing of this repository. Prints one line of JSON.

    python circuit_tracer_serve.py GRAPHS FEATURES ANSWERS.json

ANSWERS.json gets, by number, the JSON of every feature that a graph names. Each passes circuit-tracer's own model.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from urllib.request import Request, urlopen

from circuit_tracer.frontend.feature_models import Model
from circuit_tracer.frontend.graph_models import Model as Graph
from circuit_tracer.frontend.local_server import serve


def unpair(number: int) -> tuple[int, int]:
    """Layer and feature, by trying; the page's own formula is in floating point."""
    total = 0
    while (total + 1) * (total + 2) // 2 <= number:
        total += 1
    feature = number - total * (total + 1) // 2
    return total - feature, feature


def main(graphs: str, features: str, answers: str) -> None:
    server = serve(data_dir=graphs, features_dir=features, port=0)
    address = f"http://127.0.0.1:{server.httpd.server_address[1]}"

    def get(path: str, byte_range: str | None = None) -> bytes:
        with urlopen(Request(address + path, headers={"Range": byte_range} if byte_range else {})) as answer:
            assert answer.status == (206 if byte_range else 200)
            data = answer.read()
            return gzip.decompress(data) if answer.headers.get("Content-Encoding") == "gzip" else data

    index = json.loads(gzip.decompress(get("/features/index.json.gz")))
    named = json.loads(get("/data/graph-metadata.json"))["graphs"]
    found = {}
    for one in named:
        assert one["scan"].startswith("/"), "the page reads local features of such a scan only"
        graph = json.loads(get(f"/graph_data/{one['slug']}.json"))
        Graph.model_validate(graph)
        for node in graph["nodes"]:
            if node["feature_type"] != "cross layer transcoder":
                continue
            layer, feature = unpair(node["feature"])
            assert node["node_id"].startswith(f"{layer}_{feature}_")
            offsets = index[layer]["offsets"]
            # As `loadFeatureFromBinary` of the page asks and `getFile` reads.
            data = get(f"/features/{index[layer]['filename']}", f"bytes={offsets[feature]}-{offsets[feature + 1]}")
            length = int.from_bytes(data[:4], "little")
            read = json.loads(gzip.decompress(data[4 : 4 + length]))
            Model.model_validate(read, strict=True)
            found[node["feature"]] = read
    server.stop()
    Path(answers).write_text(json.dumps(found), encoding="utf-8")
    print(json.dumps({"graphs": len(named), "features": len(found)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

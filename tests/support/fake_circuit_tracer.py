#!/usr/bin/env python3
"""Stands in for the Python of an environment with circuit-tracer: it is called, and answers, as `tracer.py` is there.

Its numbers are made up. The variable FAKE_FAULT makes it fail: "fork", "crash" or "device". tests/interop has the real
one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

VERSIONS = {"circuit-tracer": "0.0.fake", "torch": None}


def main() -> None:
    assert "PYTHONPATH" not in os.environ, "it must not see the packages of this project"
    fault = os.environ.get("FAKE_FAULT")
    if len(sys.argv) == 2:  # `tracer.py` alone: a question
        question = json.load(sys.stdin)
        assert set(question) == {"model", "backend", "device"}
        answer = {"versions": VERSIONS, "fault": None, "backend": None, "device": None}
        if fault == "fork":
            answer["fault"] = "the circuit-tracer there is the old fork of that name on PyPI"
        if fault == "device":
            answer["device"] = "no GPU"
        print(json.dumps(answer))
        return
    request = json.loads(Path(sys.argv[2]).read_text())
    if fault == "crash":
        sys.exit("Traceback ...\nRuntimeError: out of memory\n")
    assert (Path(request["transcoder"]) / "config.yaml").is_file()
    graphs = []
    for number, (slug, prompt) in enumerate(request["prompts"]):
        graph = {
            "slug": slug,
            "prompt": prompt,
            "tokens": len(prompt),
            "logits": [["a", 0.5]],
            "active_features": 3,
            "features": 2,
            "edges": 5,
            "replacement": 0.5 + 0.25 * number,
            "completeness": 1.0,
            "seconds": 0.1,
        }
        if request["graphs"] is not None:
            graph["pruned_features"] = 1
            file = Path(request["graphs"]) / f"{slug}.json"
            file.parent.mkdir(exist_ok=True)
            metadata = {"slug": slug, "scan": request["scan"], "prompt_tokens": [prompt], "prompt": prompt}
            file.write_text(json.dumps({"metadata": metadata, "qParams": {}, "nodes": [], "links": []}))
        graphs.append(graph)
    Path(request["result"]).write_text(json.dumps({"versions": VERSIONS, "graphs": graphs}))


if __name__ == "__main__":
    main()

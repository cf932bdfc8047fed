"""A source in a process of its own; see the check `other_process` of sources.

`python -m clt_plugins.testing.processes.source_reader JOB`, the job as JSON. Writes `rows.pt` and `said.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from clt_plugins.contract.reading.source import Identified
from clt_plugins.registry.plugins import load_plugins
from clt_plugins.testing.bench import Bench
from clt_plugins.testing.checks.source import opened


def main() -> None:
    job = json.loads(sys.argv[1])
    folder = Path(job["folder"])
    plugins = load_plugins(extra=[job["module"]] if job["module"] else [])
    bench = Bench(plugins, "source", job["choice"], job["settings"], job["tables"], job["module"], folder)
    with opened(bench) as source:
        batches = [source.next() for _ in range(job["batches"])]
        torch.save([{"inputs": batch.inputs, "targets": batch.targets} for batch in batches], folder / "rows.pt")
        identity = dict(source.identity()) if isinstance(source, Identified) else None
        said = {"state": source.state(), "identity": identity}
    (folder / "said.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main()

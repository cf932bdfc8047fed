"""A logger in processes that die or end; see the check `flush` of loggers.

`python -m clt_plugins.testing.processes.dying_logger JOB`, the job as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from clt_plugins.registry.plugins import load_plugins
from clt_plugins.testing.bench import Bench


def run(job: dict[str, Any], way: str) -> None:
    """Log, close as after a crash; then die so that nothing more is flushed, or end like a program."""
    from clt_plugins.testing.checks.logger import metrics, started

    folder = Path(job["folder"]) / way
    folder.mkdir()
    # What a logger prints counts as written.
    for number in (1, 2):
        os.dup2(os.open(folder / f"printed{number}", os.O_WRONLY | os.O_CREAT), number)
    plugins = load_plugins(extra=[job["module"]] if job["module"] else [])
    bench = Bench(plugins, "loggers", job["choice"], job["settings"], job["tables"], job["module"], folder)
    logger = started(bench, folder)
    for step in range(1, 40):
        logger.log(step, metrics(step))
    logger.close("failed")
    if way == "dies":
        os._exit(0)


def main() -> None:
    """Both ways, each in a separate process."""
    import torch  # imported before the fork, so that both processes share it

    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    for way in ("dies", "ends"):
        child = os.fork()
        if child == 0:
            run(job, way)
            return
        _, status = os.waitpid(child, 0)
        if status:
            printed = Path(job["folder"]) / way / "printed2"
            print(printed.read_text() if printed.is_file() else f"ended with {status}", file=sys.stderr)
            raise SystemExit(1)


if __name__ == "__main__":
    main()

"""A plugin's module in an interpreter that has not imported it; see the checks `imports` and `commands`.

`python -m clt_plugins.testing.processes.fresh JOB`, the job as JSON: `module`, and `commands`: names whose `--help` is
asked for. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from importlib import import_module
from typing import Any

from clt_plugins.registry.plugins import Plugins


def imported(module: str) -> dict[str, Any]:
    """Import a module. Seconds of processor and clock, and the packages that it imported besides the engine's."""
    import clt_plugins.cli.main  # noqa: F401  # all that `--help` imports anyway

    before = set(sys.modules)
    processor, clock = time.process_time(), time.perf_counter()
    import_module(module)
    seconds = time.process_time() - processor, time.perf_counter() - clock
    packages = {name.partition(".")[0] for name in set(sys.modules) - before}
    return {"processor_s": seconds[0], "clock_s": seconds[1], "packages": sorted(packages - {module.partition(".")[0]})}


def helped(module: str, names: list[str]) -> dict[str, str]:
    """What is wrong with `NAME --help` of each command where torch cannot be imported; "" if nothing is."""
    from click.testing import CliRunner

    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it then fails
    plugins = Plugins()
    plugins._add(module, "not installed", partial(import_module, module))
    offered = plugins.commands()
    wrong = {}
    for name in names:
        done = CliRunner().invoke(offered[name], ["--help"])
        error = done.exception if done.exit_code else None
        wrong[name] = "" if error is None else f"{type(error).__name__}: {error}"
    return wrong


def main() -> None:
    job = json.loads(sys.argv[1])
    print(json.dumps(helped(job["module"], job["commands"]) if "commands" in job else imported(job["module"])))


if __name__ == "__main__":
    main()

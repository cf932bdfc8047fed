"""Checks of a plugin as a whole: what its module imports, and the hooks that offer no choice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any
from unittest import SkipTest

from clt_plugins.errors import Faults, PluginError
from clt_plugins.recipe.read import read_recipe
from clt_plugins.testing.bench import TABLES, Bench
from clt_plugins.testing.registry import PLUGIN, check
from clt_plugins.testing.report import complain, expect

IMPORT_S = 0.15
"""The longest that the import of a plugin's module may take, of a processor: `--help` imports every plugin."""
CLOCK_S = 1.5
"""The longest that it may take by the clock, also on a busy machine."""
HEAVY = {
    "datasets", "h5py", "jax", "matplotlib", "numba", "numpy", "pandas", "polars", "scipy", "sklearn", "tensorboard",
    "tensorflow", "torch", "transformers", "triton", "wandb",
}  # fmt: skip
"""Packages that take long to import."""


def _module(bench: Bench) -> Any:
    return bench.plugins.module(bench.choice)


def _fresh(job: dict[str, Any], expected: str, look: str) -> Any:
    """What `processes.fresh` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "clt_plugins.testing.processes.fresh", json.dumps(job)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        complain(expected, (done.stderr.strip().splitlines() or ["no message"])[-1], look)
    return json.loads(done.stdout.splitlines()[-1])


@check(PLUGIN, trial=True)
def imports(bench: Bench) -> None:
    """The module imports in milliseconds, and no torch, numpy or the like: every command imports every plugin."""
    module = _module(bench)
    job = {"module": module.__name__}
    look = f"{bench.plugins.info(bench.choice).file}: import such packages inside `build`, or in a second file"
    found = _fresh(job, "a module that can be imported by itself", look)
    heavy = sorted(HEAVY & set(found["packages"]))
    expect(not heavy, "a module that imports nothing heavy", ", ".join(heavy), look)
    if found["clock_s"] > CLOCK_S:
        found = min(found, _fresh(job, "", look), key=lambda each: each["clock_s"])
    got = f"{found['processor_s']:.2f} s of the processor, {found['clock_s']:.2f} s in all"
    expect(
        found["processor_s"] <= IMPORT_S and found["clock_s"] <= CLOCK_S,
        f"an import of at most {IMPORT_S} s of the processor, and {CLOCK_S} s in all",
        f"{got}; packages imported: {', '.join(found['packages']) or 'none'}",
        look,
    )


@check(PLUGIN, trial=True)
def complaints(bench: Bench) -> None:
    """`clt_check` returns a list of texts, also for a recipe that has none of the plugin's choices. Skipped without."""
    if "clt_check" not in bench.plugins.info(bench.choice).hooks:
        raise SkipTest("it has no `clt_check`")
    try:
        read_recipe({**TABLES, **bench.tables}, plugins=bench.plugins)
    except Faults:
        pass  # complaints are what it is for
    except PluginError as error:
        if f"plugin {bench.choice!r}" in str(error):
            complain("`clt_check` to return a list of `path: what is wrong`", str(error), "`clt_check`")


@check(PLUGIN, trial=True, needs=("imports",))
def commands(bench: Bench) -> None:
    """Each command has a name that no command of the engine has, and help, which is shown without torch.

    Skipped without `clt_commands`.
    """
    from clt_plugins.cli.main import main_group

    if "clt_commands" not in bench.plugins.info(bench.choice).hooks:
        raise SkipTest("it has no `clt_commands`")
    (hook,) = (impl for impl in bench.plugins._impls("clt_commands") if impl.plugin_name == bench.choice)
    offered, look = hook.function(), "what `clt_commands` returns"
    right = isinstance(offered, Iterable)
    offered = list(offered) if right else []
    right = right and all(isinstance(getattr(command, "name", None), str) for command in offered)
    expect(right and offered, "a list of click commands", repr(offered)[:200], look)
    for command in offered:
        taken = command.name in main_group.commands
        expect(not taken, "a name of its own", f"{command.name!r} is the engine's, which is found first", look)
        expect(command.help, f"help of {command.name!r}: `--help` lists it", "none", "the docstring of the function")
    names = [command.name for command in offered]
    expect(len(set(names)) == len(names), "one command of each name", ", ".join(names), look)
    expected = "commands whose `--help` needs no torch"
    look = "imports at the top of the command's module, or in its decorators: import inside the function"
    for name, wrong in _fresh({"module": _module(bench).__name__, "commands": names}, expected, look).items():
        expect(not wrong, f"`{name} --help` without torch", wrong, look)

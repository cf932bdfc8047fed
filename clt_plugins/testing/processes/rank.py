"""What a rank's process does: it calls functions of the kit, one after the other. The parent's side is `pool`.

This module is imported before torch, so that `start` can set what torch reads.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from clt_plugins.registry.plugins import load_plugins
from clt_plugins.testing.report import Nonconformance, location, message, one_line


@attrs.frozen(kw_only=True)
class Subject:
    """A `Bench` as it travels to another process."""

    slot: str
    choice: str
    settings: Mapping[str, Any]
    tables: Mapping[str, Any]
    module: str | None
    path: list[str]
    """The parent's `sys.path`."""
    port: int
    """Where the ranks of this call meet."""


def start(rank: int, world: int) -> None:
    """The first call in a process: what `torchrun` would tell it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def call(function: Callable[..., Any], subject: Subject, arguments: tuple[Any, ...]) -> Any:
    """`function(bench, *arguments)`.

    Raises:
        Nonconformance: the function failed; the only error that leaves, since not every error can be pickled.
    """
    from clt_plugins.testing.bench import Bench

    os.environ["MASTER_PORT"] = str(subject.port)
    sys.path[:] = subject.path
    module = subject.module
    file = ""
    try:
        if module:  # its file may have changed since the last call
            for name in [name for name in sys.modules if f"{name}.".startswith(f"{module}.")]:
                del sys.modules[name]
            importlib.invalidate_caches()
        plugins = load_plugins(extra=[module] if module else [])
        file = plugins.pick(subject.slot, subject.choice).file
        with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
            bench = Bench(plugins, subject.slot, subject.choice, subject.settings, subject.tables, module, Path(folder))
            return function(bench, *arguments)
    except Nonconformance:
        raise
    except (Exception, SystemExit) as error:
        cause = error.__cause__ or error
        what = f"the step to run on {os.environ['WORLD_SIZE']} ranks"
        got = f"rank {os.environ['RANK']}: {one_line(error)}"
        raise Nonconformance(message(what, got, location(cause, file))) from None

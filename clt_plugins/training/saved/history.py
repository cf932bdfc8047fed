"""What is on record of a run's starts: `history.jsonl`, and the recipe and the versions of the last one."""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import sys
import time
import uuid
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from clt_plugins.contract.spec import __version__
from clt_plugins.errors import LONGEST, ExitCode, Stopped
from clt_plugins.files.atomic import write_file
from clt_plugins.files.records import as_data, json_text
from clt_plugins.files.untrusted import read_small

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.recipe.changes import Change
    from clt_plugins.registry.plugins import Plugins
    from clt_plugins.training.saved.resume import Before

logger = logging.getLogger(__name__)

RECORDS = ("recipe.toml", "versions.json", "history.jsonl")
"""Files that the engine writes at every start."""


@attrs.frozen(kw_only=True)
class Start:
    """Where a run begins; the same on all ranks, but for `before` and `id`."""

    folder: Path
    """The run's."""
    checkpoint: Path | None
    """The checkpoint to go on from; None for a run that begins at its first step."""
    recipe: Recipe
    """The recipe, with derived settings as the checkpoint has them."""
    before: Before | None
    """On rank 0: what the checkpoint says of itself."""
    id: str = attrs.field(factory=lambda: uuid.uuid4().hex)
    """Of this start, in its line of the history, which rank 0 writes. Numbers of processes are no names: in containers
    all are the same."""


def record_start(
    start: Start, recipe_toml: str, plugins: Plugins, changed: Sequence[Change], accepted: Collection[str], step: int
) -> None:
    """Put a start on record: a line of `history.jsonl`, then `recipe.toml` and `versions.json`.

    Raises:
        OSError: a file cannot be written; names it.
    """
    folder, ran = start.folder, versions(plugins)
    entry = {
        "id": start.id,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "step": step,
        "checkpoint": start.checkpoint.name if start.checkpoint is not None else None,
        "changed": {change.setting: [change.before, change.now] for change in changed},
        "accepted": sorted(accepted),
        **ran,
    }
    history = folder / "history.jsonl"
    earlier = read_small(history).decode(errors="replace") if history.is_file() else ""
    # Written as a whole: a line is never torn, whenever the process is killed.
    write_file(history, earlier + json.dumps(as_data(entry)) + "\n")
    write_file(folder / "recipe.toml", recipe_toml)
    write_file(folder / "versions.json", json_text(ran) + "\n")


def record_end(start: Start, error: BaseException | None) -> None:
    """Put on record how a run ended, in the line of its start. Whatever ended it comes first: a disk that is full is
    only warned of."""
    history = start.folder / "history.jsonl"
    try:
        lines = read_small(history).decode().splitlines()
        entry = json.loads(lines[-1])
        if entry.get("id") != start.id or "end" in entry:
            return  # it ended before it had started: the line is of an earlier start
        stopped = isinstance(error, KeyboardInterrupt) or (
            isinstance(error, Stopped) and error.code == ExitCode.INTERRUPTED
        )
        status = "finished" if error is None else "interrupted" if stopped else "failed"
        text = " ".join(str(error).split())[:LONGEST] if error is not None else ""
        entry["end"] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "status": status, "error": text}
        write_file(history, "\n".join([*lines[:-1], json.dumps(entry)]) + "\n")
    except (OSError, ValueError, IndexError, AttributeError) as failure:
        if history.exists():
            level = logging.WARNING if error is None else logging.DEBUG  # an error is one line
            logger.log(level, "%s: how the run ended could not be put on record: %s", history, failure)


def versions(plugins: Plugins) -> dict[str, Any]:
    """What ran: the interpreter, libraries, and every plugin with its distribution."""
    libraries = ("torch", "transformers", "nnsight", "datasets", "numba", "numpy", "safetensors")
    return {
        "clt_plugins": __version__,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in libraries},
        "plugins": {info.name: info.distribution for info in plugins.infos},
        "command": sys.argv,
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"

"""A run's folder: which one it is, whether it may be used, and what is recorded in it."""

from __future__ import annotations

import platform
import sys
import time
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt_plugins.contract.spec import __version__
from clt_plugins.distributed.agree import all_or_none
from clt_plugins.errors import Refused
from clt_plugins.recipe.read import as_toml
from clt_plugins.training.checkpoint import find_checkpoint

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Parallel
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.registry.plugins import Plugins

FREE_ON_RESUME = ("train", "loggers", "convert", "evaluate", "exports", "requires", "name", "parallel")
"""Tables of a recipe that may differ when a run is resumed; the rest is what the checkpoint was made with."""


def folder_and_checkpoint(
    parallel: Parallel, recipe: Recipe, out: str | Path | None, resume: str | None
) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint to resume from: rank 0 looks, the others follow."""
    folder, checkpoint = Path(), None
    with all_or_none(parallel):
        if parallel.rank == 0:
            folder = Path(out) if out is not None else _default_folder(recipe, resume)
            _prepare(folder, recipe, resume)
            checkpoint = find_checkpoint(folder / "checkpoints", resume) if resume else None
    folder = Path(parallel.gather(str(folder))[0])
    name = parallel.gather(checkpoint.name if checkpoint is not None else "")[0]
    return folder, folder / "checkpoints" / name if name else None


def _default_folder(recipe: Recipe, resume: str | None) -> Path:
    base = Path("runs") / recipe.name
    if resume is None:
        return base / time.strftime("%Y%m%d-%H%M%S")
    known = sorted(path for path in base.glob("*") if (path / "checkpoints").is_dir()) if base.is_dir() else []
    if not known:
        raise Refused("--resume", f"no run with checkpoints in {base}: give its folder with --out")
    return known[-1]


def _prepare(folder: Path, recipe: Recipe, resume: str | None) -> None:
    """Refuse a folder in use, or a resumed run that is not the same."""
    if resume is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise Refused(folder, "already there: go on with --resume, or give another folder with --out")
        return
    saved = folder / "recipe.toml"
    if not saved.is_file():
        raise Refused(folder, "nothing to resume: no recipe.toml in it")
    before, now = tomllib.loads(saved.read_text(encoding="utf-8")), tomllib.loads(as_toml(recipe))
    # Compared as resolved tables, so that a default written out in one of them makes no difference.
    for table in sorted(before.keys() | now.keys()):
        if table not in FREE_ON_RESUME and before.get(table) != now.get(table):
            raise Refused(
                table,
                f"differs from the run in {folder}: it was {before.get(table)}, now it is {now.get(table)}; "
                "a resumed run must be the same",
            )
    # Of [train], the length and the intervals may change; what the optimizer's state was made with may not.
    fixed = ("batch_tokens", "optimizer", "states")
    for key in fixed:
        if before.get("train", {}).get(key) != now["train"].get(key):
            raise Refused(f"train.{key}", f"differs from the run in {folder}; a resumed run must be the same")


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

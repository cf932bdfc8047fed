"""The folder of a run: whose it is, where the run in it stands, and what is on record there.

```text
run.lock              only while a process trains here: its host, number and start
recipe.toml           of the last start, every default written out
versions.json         of the last start
history.jsonl         a line for each start: when, where, from which checkpoint, what had changed and was accepted; and
                      how it ended, `end`, unless the process was killed
checkpoints/step_N    of this history; the highest N is the newest
checkpoints/set_aside/1/step_N    left when the run went back to an earlier step; never deleted by the engine
```

The rules, for every moment at which the process can be killed:

1. One process per folder. Rank 0 makes the folder and takes the lock before anything that takes long.
2. What can fail is tried before anything is changed: build, check the stages, read the checkpoint.
3. Every file appears whole, by a rename. What replaces something is complete before that goes.
4. A folder in which nothing is but what a start makes before its first step may be started in again. Resumed without a
   checkpoint, a run begins at its first step.
5. Names that are not ours are left alone.
"""

from __future__ import annotations

import json
import logging
import re
import time
import tomllib
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from clt_plugins.distributed.agree import all_or_none
from clt_plugins.errors import Refused
from clt_plugins.files.atomic import remove
from clt_plugins.files.folders import sweep
from clt_plugins.files.locks import Lock
from clt_plugins.files.steps import step_folders
from clt_plugins.files.untrusted import has_file, read_small
from clt_plugins.training.saved.checkpoint import state_in
from clt_plugins.training.saved.history import RECORDS, Start, record_end
from clt_plugins.training.saved.resume import Before, check_settings, keep
from clt_plugins.training.saved.verify import find_checkpoint, verify_checkpoint

if TYPE_CHECKING:
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.contract.recipe import Recipe

logger = logging.getLogger(__name__)

LOCK = "run.lock"


@contextmanager
def run_folder(
    parallel: Parallel, recipe: Recipe, out: str | Path | None, resume: str | None, accepted: Collection[str]
) -> Iterator[Start]:
    """The run's folder, this process's alone until the end of the block. Rank 0 looks, the others follow.

    Args:
        accepted: settings that may differ from those of the checkpoint.

    Raises:
        Refused: another process trains in it; it holds other things; or what is to be resumed is not there, damaged, or
            of another run.
        OSError: the folder cannot be made or locked.
    """
    lock: Lock | None = None
    made: list[Path] = []
    folder, checkpoint, before, kept = Path(), None, None, {}
    start: Start | None = None
    error: BaseException | None = None
    try:
        with all_or_none(parallel):
            if parallel.rank == 0:
                folder = _chosen(recipe, out, resume, made)
                lock = _lock(folder, made)
                if resume is None:
                    _refuse_what_is_there(folder)
                _clean(folder)
                if resume is not None:
                    checkpoint = _resumed(folder, resume)
        told = json.loads(parallel.gather(json.dumps([str(folder), checkpoint and checkpoint.name]))[0])
        folder, checkpoint = Path(told[0]), Path(told[0], "checkpoints", told[1]) if told[1] else None
        if checkpoint is not None:
            verify_checkpoint(checkpoint, parallel)
        with all_or_none(parallel):
            if parallel.rank == 0 and checkpoint is not None:
                before = _before(folder, checkpoint)
                kept = check_settings(before, recipe, accepted)
        kept = json.loads(parallel.gather(json.dumps(kept))[0])
        start = Start(folder=folder, checkpoint=checkpoint, recipe=keep(recipe, kept), before=before)
        yield start
    except BaseException as ended_by:
        error = ended_by
        raise
    finally:
        if lock is not None:
            if start is not None:
                record_end(start, error)
            lock.release()
        error = None  # it holds this frame
        # Where the start failed, nothing is in them.
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir()


def _chosen(recipe: Recipe, out: str | Path | None, resume: str | None, made: list[Path]) -> Path:
    """The folder that the user named, or the default; new folders are made, and noted in `made`."""
    if resume is not None:
        folder = Path(out) if out is not None else _latest_run(Path("runs") / recipe.name)
        if not folder.is_dir():
            raise Refused(folder, "nothing to resume: no such folder")
        if not step_folders(folder / "checkpoints") and not has_file(folder / "recipe.toml") and foreign(folder):
            raise Refused(folder, "nothing to resume: no recipe.toml in it")
        return folder
    if out is not None:
        folder = Path(out)
        if folder.exists() and not (folder.is_dir() and (folder / LOCK).exists()):
            _refuse_what_is_there(folder)
        _make(folder, made)
        return folder
    base = Path("runs") / recipe.name / time.strftime("%Y%m%d-%H%M%S")
    _make(base.parent, made)
    number = 1
    while True:  # two runs may start in the same second
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        made.append(folder)
        return folder


def _make(folder: Path, made: list[Path]) -> None:
    for path in [*reversed(folder.parents), folder]:
        if not path.exists():
            path.mkdir(exist_ok=True)
            made.append(path)


def _latest_run(base: Path) -> Path:
    """The newest of the folders that runs without `--out` made, also if it has no checkpoint yet; of others, the last
    by name."""
    known = [path for path in base.glob("*") if (path / "recipe.toml").is_file() or step_folders(path / "checkpoints")]
    if not known:
        raise Refused("--resume", f"no run in {base}: give its folder with --out")

    def key(path: Path) -> tuple[bool, str, int, str]:
        parts = re.fullmatch(r"(\d{8}-\d{6})(?:-(\d+))?", path.name)
        return parts is not None, parts[1] if parts else "", int(parts[2] or 1) if parts else 0, path.name

    return max(known, key=key)


def _lock(folder: Path, made: list[Path]) -> Lock:
    lock = Lock(folder / LOCK)
    holder = lock.try_acquire()
    if holder is not None:
        made.clear()  # the other process made them too
        text = f"another run is in it: {holder}; wait for it or stop it, or give another folder with --out"
        raise Refused(folder, text)
    return lock


def _refuse_what_is_there(folder: Path) -> None:
    if not folder.is_dir() or foreign(folder):
        raise Refused(folder, "already there: go on with --resume, or give another folder with --out")


def foreign(folder: Path) -> bool:
    """Whether there is anything in it besides what a start makes before its first step."""
    temporary = {f".{name}.partial" for name in RECORDS}
    for path in folder.iterdir():
        if path.name == "checkpoints" and path.is_dir():
            if any(not re.fullmatch(r"\.step_\d+\.(partial|lock|old.*)", inner.name) for inner in path.iterdir()):
                return True
        elif path.name not in {LOCK, *RECORDS, *temporary}:
            return True
    return False


def _clean(folder: Path) -> None:
    """Remove what a killed process left half written."""
    sweep(folder / "checkpoints", "step_*")
    for name in RECORDS:
        if (partial := folder / f".{name}.partial").exists():
            remove(partial)


def _resumed(folder: Path, resume: str) -> Path | None:
    """The checkpoint to go on from; None where the run has none yet, and begins at its first step."""
    if resume == "latest" and not step_folders(folder / "checkpoints"):
        logger.warning("%s: no checkpoint yet: the run begins at its first step", folder)
        return None
    return find_checkpoint(folder / "checkpoints", resume)


def _before(folder: Path, checkpoint: Path) -> Before:
    """What a checkpoint says of itself."""
    state = state_in(checkpoint)
    saved = folder / "recipe.toml"
    try:
        text = read_small(saved).decode()
        tomllib.loads(text)
    except (OSError, ValueError) as error:
        if not state.recipe:
            raise Refused(saved, f"cannot be read: {' '.join(str(error).split())}") from error
        logger.warning("%s: cannot be read, and is written anew: %s", saved, " ".join(str(error).split()))
        text = state.recipe
    return Before.of(folder, state, state.recipe or text)

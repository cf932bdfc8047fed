"""A folder that is there with all of its files, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clt_plugins import Lock, Refused, flush


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside `out`. At the end of the block it becomes `out`; after an error it is deleted, and
    what a killed process left there is deleted by the next one.

    Raises:
        Refused: `out` is there already, with something in it; or another process writes it.
        OSError: it could not be written; names the folder.
    """
    target = out.resolve()
    partial, lock = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        held = Lock(lock)
        holder = held.try_acquire()
        if holder is not None:
            raise Refused(out, f"another process writes it ({holder}): wait until it has ended, or stop it")
        try:
            check_empty(out)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            for path in (*partial.rglob("*"), partial):
                flush(path)
            partial.rename(target)
            flush(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            held.release()
    except OSError as error:
        raise OSError(f"{out}: could not be written: {error}") from error


def check_empty(out: Path) -> None:
    """Refuse a folder that has something in it, and what is no folder."""
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise Refused(out, "already there: give another folder with --out")

"""Compiles a loop once, and keeps the result on disk until a file that it may be made from changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

from clt_kernels.cpu.on_disk import keep


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit`. Its result is cached on disk, if a folder for it can be written.

    Sums may be reordered (for vector instructions) and contracted (to fused multiply-adds), always in the same way. NaN
    and infinity are respected.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        flags = {"fastmath": {"reassoc", "contract", "nsz"}, **options}
        try:
            made = njit(cache=True, **flags)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return njit(**flags)(function)  # nowhere to write: compile in every process
        return made if keep(made, _stamp(function)) else njit(**flags)(function)

    return decorate


def _stamp(function: Callable[..., Any]) -> tuple[tuple[str, int, int], ...]:
    """What changes with any file of a function's folder.

    Numba looks at the function's own file. Machine code of functions of other files is compiled in as well: after an
    update that changed only those, such as a `git pull`, Numba alone would go on with the old code.
    """
    folder = Path(function.__code__.co_filename).parent
    return tuple((file.name, (at := file.stat()).st_mtime_ns, at.st_size) for file in sorted(folder.glob("*.py")))

"""Folders of results: which may be kept, how a new one replaces an old one, whether one can be written at all; and the
loggers of a report."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt_plugins.errors import Faults, Refused, Stopped
from clt_plugins.files.folders import MANIFEST, Manifest, atomic_folder, check_folder
from clt_plugins.files.records import read_json
from clt_plugins.finished.provenance import Origin, Provenance, recorded
from clt_plugins.recipe.read import recipe_data
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.contract.results.logger import Logger

logger = logging.getLogger(__name__)


def kept(folder: Path, file: str, made_from: Provenance) -> bool:
    """Whether the result in a folder is complete, and was made from the same transcoder with the same settings.

    Args:
        file: the JSON file of the folder that says so.
    """
    if not folder.is_dir():
        return False
    try:
        check_folder(folder, [file])
        return recorded(folder / file) == made_from
    except Faults:
        return False  # it is made anew, and replaced


@contextmanager
def replacing(
    folder: Path, *, report: tuple[str, Origin] | None = None, parallel: Parallel | None = None
) -> Iterator[Path]:
    """Yields a folder to write a result into; it replaces `folder` when it is complete. See `atomic_folder`.

    The old folder is moved aside, to `NAME-<digest>`, where deleting it would lose something: files that another
    program put there, or the report on another transcoder.

    Args:
        report: the report's file, and the transcoder that the new one is on.
        parallel: the ranks that write into it.
    """
    lead = parallel is None or parallel.rank == 0
    aside: Path | None = None
    try:
        with atomic_folder(folder, parallel) as partial:
            yield partial
            if lead and folder.is_dir() and _is_lost_with(folder, report):
                aside = _free_name(folder, report)
                folder.rename(aside)
    except BaseException:
        # The new folder did not come: the old one gets its name back.
        if aside is not None and not folder.exists():
            aside.rename(folder)
        raise


def _is_lost_with(folder: Path, report: tuple[str, Origin] | None) -> bool:
    """Whether something would be lost with a folder that the new result does not replace."""
    try:
        listed = read_json(folder / MANIFEST, Manifest).files.keys() | {MANIFEST}
        before = recorded(folder / report[0]) if report is not None else None
    except Faults:
        return any(folder.iterdir())
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if present - listed:
        return True
    return report is not None and (before is None or before.transcoder.sha256 != report[1].sha256)


def _free_name(folder: Path, report: tuple[str, Origin] | None) -> Path:
    """A name beside a folder that is not in use: that of the transcoder that its report is on, where it has one."""
    ending = "older"
    if report is not None:
        try:
            before = recorded(folder / report[0])
            ending = (before.transcoder.sha256 or ending)[:8] if before is not None else ending
        except Faults:
            pass  # a damaged report has no name of its own
    numbers = iter(range(2, 10**6))
    path = folder.with_name(f"{folder.name}-{ending}")
    while path.exists():
        path = folder.with_name(f"{folder.name}-{ending}.{next(numbers)}")
    return path


def check_writable(folder: Path) -> None:
    """Before work, refuse a folder that could not be written after it.

    Raises:
        Refused: something above it is not a folder, or cannot be written.
    """
    above = folder.resolve().parent
    while not above.exists():
        above = above.parent
    try:
        Path(tempfile.mkdtemp(dir=above, prefix=".clt-plugins-")).rmdir()
    except OSError as error:
        raise Refused(
            folder, f"cannot be written ({above}: {error.strerror}): give another folder with --out"
        ) from None


class ReportLoggers:
    """The recipe's loggers, for one report: they write beside it. They start when something is logged; what fails in
    one stops nothing.

    Args:
        recipe: names them; None: there are none.
        context: with the report's folder.
        step: what is logged is of this step; of the recipe's last if it is None.
    """

    def __init__(self, recipe: Recipe | None, context: Context, step: int | None):
        self.failures: list[Exception] = []
        self._recipe, self._context, self._step = recipe, context, step
        self._started: list[Logger] | None = None

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Give all of them some numbers."""
        if self._recipe is None:
            return
        if self._started is None:
            self._started = []
            self._start(self._recipe)
        step = self._recipe.train.steps if self._step is None else self._step
        for one in self._started:
            self._attempt(lambda one=one: one.log(step, dict(metrics)))  # type: ignore[misc]

    def _start(self, recipe: Recipe) -> None:
        assert self._started is not None
        for chosen in recipe.loggers:
            built: list[Logger] = []
            if not self._attempt(lambda: built.append(build(chosen, self._context))):  # noqa: B023 - called at once
                continue
            one = built[0]
            if self._attempt(lambda one=one: one.start(recipe_data(recipe), 0)):  # type: ignore[misc]
                self._started.append(one)
            else:
                self._attempt(lambda one=one: one.close("failed"))  # type: ignore[misc]

    def close(self, status: str) -> None:
        """Close all."""
        for one in self._started or ():
            self._attempt(lambda one=one: one.close(status))  # type: ignore[misc]

    def _attempt(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Stopped:
            raise
        except Exception as error:
            self.failures.append(error)  # told at the end, when the report is saved
            return False
        return True


def raise_first(failures: Sequence[Exception]) -> None:
    """Raise what went wrong in a logger; of several, the others are only logged."""
    for other in failures[1:]:
        logger.error("%s", other)
    if failures:
        raise failures[0]

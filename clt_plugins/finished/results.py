"""Folders of results: which may be kept, how a new one replaces an old one, whether one can be written at all; and the
loggers of a report."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from clt_plugins.errors import Faults, Refused, Stopped
from clt_plugins.files.folders import MANIFEST, Manifest, atomic_folder, verify
from clt_plugins.files.records import read_json
from clt_plugins.finished.provenance import Origin, Provenance, recorded
from clt_plugins.recipe.read import recipe_data
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.contract.results.logger import Logger

logger = logging.getLogger(__name__)

Record = TypeVar("Record")


def kept(folder: Path, file: str, record_class: type[Record], made_from: Provenance) -> Record | None:
    """The result in a folder, if it is complete and was made from the same transcoder with the same settings.

    Args:
        file: the JSON file of the folder that holds the result.
    """
    if not folder.is_dir():
        return None
    try:
        verify(folder)
        result = read_json(folder / file, record_class)
    except Faults:
        return None  # it is made anew, and replaced
    return result if getattr(result, "made_from", None) == made_from else None


@contextmanager
def replacing(folder: Path, *, report: tuple[str, Origin] | None = None) -> Iterator[Path]:
    """Yields a folder to write a result into; it replaces `folder` when it is complete. See `atomic_folder`.

    The old folder is moved aside, to `NAME-<digest>`, where deleting it would lose something: files that another
    program put there, or the report on another transcoder.

    Args:
        report: the report's file, and the transcoder that the new one is on.
    """
    aside: Path | None = None
    try:
        with atomic_folder(folder) as partial:
            yield partial
            if folder.is_dir() and _is_lost_with(folder, report):
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
    """The loggers of a report. They are built and started before the work, but what fails in one stops nothing."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.started: list[Logger] = []

    def start(self, recipe: Recipe, context: Context) -> None:
        """Build and start all.

        Raises:
            Faults: one refuses its settings.
        """
        for chosen in recipe.loggers:
            try:
                one: Logger = build(chosen, context)
            except (Faults, Stopped):
                raise
            except Exception as error:
                self.failures.append(error)
                continue
            if self._attempt(lambda one=one: one.start(recipe_data(recipe), 0)):  # type: ignore[misc]
                self.started.append(one)
            else:
                self._attempt(lambda one=one: one.close("failed"))  # type: ignore[misc]

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Give all of them the report's numbers."""
        for one in self.started:
            self._attempt(lambda one=one: one.log(step, metrics))  # type: ignore[misc]

    def close(self, status: str) -> None:
        """Close all."""
        for one in self.started:
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

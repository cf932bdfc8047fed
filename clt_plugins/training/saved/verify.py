"""The checkpoint that a run is resumed from: chosen by name, and verified by its checksums."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clt_plugins.distributed.agree import all_or_none
from clt_plugins.errors import ExitCode, Faults, Refused, Stopped
from clt_plugins.files.folders import check_folder
from clt_plugins.files.steps import step_folders, step_of
from clt_plugins.training.saved.checkpoint import NEEDS, state_in

if TYPE_CHECKING:
    from clt_plugins.contract.model.parallel import Parallel


def find_checkpoint(folder: Path, wanted: str) -> Path:
    """The checkpoint to resume from: "latest", or a name such as "step_000100" or "100".

    Raises:
        Refused: there is none.
    """
    known = step_folders(folder)
    if not known:
        raise Refused(folder, "no checkpoint to resume from")
    if wanted == "latest":
        return known[-1]
    number = wanted.removeprefix("step_")
    matching = [one for one in known if number.isdecimal() and step_of(one) == int(number)]
    if not matching:
        names = ", ".join(one.name for one in known)
        raise Refused(folder, f"no checkpoint {wanted!r} (there are: {names})")
    return matching[0]


def verify_checkpoint(path: Path, parallel: Parallel) -> None:
    """Read a checkpoint, and compare it with its checksums. Large ones take long, so all ranks share the files.

    Raises:
        Refused: it is damaged; names the newest complete one before it.
        OSError: it cannot be read, which is no damage.
        Stopped: on ranks above 0, in either case.
    """
    try:
        _check(path, parallel)
    except (Faults, Stopped) as error:
        if isinstance(error, Stopped) and error.code != ExitCode.USAGE:
            raise  # rank 0 could not read it
        offer = _offer([one for one in step_folders(path.parent) if step_of(one) < step_of(path)], parallel)
        if not isinstance(error, Faults):
            raise
        raise Refused("", f"{error.faults[0]}; {offer}") from error


def _check(path: Path, parallel: Parallel) -> None:
    with all_or_none(parallel):
        check_folder(path, NEEDS, parallel)
        state_in(path)


def _offer(earlier: list[Path], parallel: Parallel) -> str:
    """By all ranks: a rank that ended before would end the others, and the message would be lost."""
    for path in reversed(earlier):
        try:
            _check(path, parallel)
        except (Faults, OSError, Stopped):
            continue  # damaged too: look further back
        return f"the one before it is complete: --resume {path.name}"
    return "no earlier checkpoint is complete"

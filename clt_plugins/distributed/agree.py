"""What ranks decide together: whether all succeeded, whether they have the same settings, whether to stop.

With one rank nothing is exchanged. Rank 0 tells the user; the other ranks end silently with the same exit code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from clt_plugins.errors import ExitCode, Fault, Faults, PluginError, Refused, Stopped

if TYPE_CHECKING:
    from clt_plugins.contract.model.parallel import Parallel


@contextmanager
def all_or_none(parallel: Parallel | None, *, patiently: bool = False) -> Iterator[None]:
    """A block that all ranks finish, or none. It must not communicate.

    Args:
        patiently: ranks wait for each other as long as it takes (`Parallel.barrier`), for what one of them does alone.

    Raises:
        Faults, OSError, PluginError, Stopped, RuntimeError: on rank 0, what the first rank that failed raised.
        Stopped: on the others, without a text.
    """
    if parallel is None or parallel.world == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as wrong:
        error = wrong
    if patiently:
        parallel.barrier()
    tell(parallel, error)


def tell(parallel: Parallel, error: Exception | None) -> None:
    """Tell all ranks whether this one failed; all must call it.

    Raises:
        Faults, OSError, PluginError, Stopped, RuntimeError: see `all_or_none`.
    """
    told = [json.loads(text) for text in parallel.gather(json.dumps(_described(error)))]
    # The first rank that failed speaks for all, so that the user reads one message and not one per rank.
    # One without a text only follows another.
    faults = [rank for rank, fault in enumerate(told) if fault is not None]
    if not faults:
        return
    failed = next((rank for rank in faults if told[rank][2]), faults[0])
    if parallel.rank > 0:
        raise Stopped(ExitCode(told[failed][1]), "") from error
    if error is not None and failed == 0:
        raise error
    kind, code, text = told[failed]
    text = f"rank {failed}: {text}"
    if kind == "Stopped":
        raise Stopped(ExitCode(code), text)
    if kind == "Faults":
        raise Faults([Fault((), text)])
    raise {"OSError": OSError, "PluginError": PluginError}.get(kind, RuntimeError)(text)


def _described(error: Exception | None) -> tuple[str, int, str] | None:
    """What other ranks need to know of an error: its kind, the exit code, its text."""
    if error is None:
        return None
    if isinstance(error, Stopped):
        return "Stopped", int(error.code), str(error)
    if isinstance(error, Faults):
        return "Faults", int(ExitCode.USAGE), str(error)
    for kind in (OSError, PluginError):
        if isinstance(error, kind):
            return kind.__name__, int(ExitCode.FAILED), str(error)
    return "", int(ExitCode.FAILED), f"{type(error).__name__}: {error}"


def anyone(parallel: Parallel, asked: bool) -> bool:
    """Whether any rank is asked to stop: the same answer on all."""
    if parallel.world == 1:
        return asked
    return bool(parallel.total(torch.tensor([int(asked)]), over="all", what="agreement") > 0)


def same_everywhere(parallel: Parallel, what: str, entries: dict[str, str]) -> None:
    """Stop unless all ranks have the same entries.

    Raises:
        Refused: naming the first difference to rank 0; `Stopped` on the other ranks.
    """
    if parallel.world == 1:
        return
    everyone = [json.loads(text) for text in parallel.gather(json.dumps(entries))]
    for rank, theirs in enumerate(everyone):
        for key in sorted(theirs.keys() | everyone[0].keys()):
            first, other = everyone[0].get(key, "nothing"), theirs.get(key, "nothing")
            if first != other:
                text = f"{what} differ between ranks: {key} is {first} on rank 0, but {other} on rank {rank}"
                raise Refused("", text) if parallel.rank == 0 else Stopped(ExitCode.USAGE, "")

"""What ranks decide together: whether all succeeded, whether they read the same batch, whether to stop.

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
    from clt_plugins.contract.interfaces import Parallel, Source
    from clt_plugins.data.batch import Batch


@contextmanager
def all_or_none(parallel: Parallel | None) -> Iterator[None]:
    """A block that all ranks finish, or none. It must not communicate.

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
    _agree(parallel, error)


def _agree(parallel: Parallel, error: Exception | None) -> None:
    told = [json.loads(text) for text in parallel.gather(json.dumps(_described(error)))]
    # The first rank that failed speaks for all, so that the user reads one message and not one per rank.
    failed = next((rank for rank, fault in enumerate(told) if fault is not None), None)
    if failed is None:
        return
    if parallel.rank > 0:
        raise Stopped(ExitCode(told[failed][1]), "") from error
    if error is not None:
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


def read(source: Source, parallel: Parallel) -> Batch:
    """The next batch; the same one on all ranks that share the features.

    Raises:
        Refused: a rank could not read, or ranks read differently; raised on rank 0, `Stopped` on the others.
    """
    if parallel.world == 1:
        return source.next()
    batch, error = None, None
    try:
        batch = source.next()
    except Exception as wrong:
        error = wrong
    # One small exchange per step: whether each rank failed, and a fingerprint of what it read.
    table = torch.zeros(parallel.world, 2, dtype=torch.int64)
    table[parallel.rank, 0] = int(error is not None)
    table[parallel.rank, 1] = 0 if batch is None else fingerprint(batch)
    table = parallel.total(table, over="all", what="agreement")
    if bool(table[:, 0].any()):
        _agree(parallel, error)
    assert batch is not None
    for data_rank, read_by in enumerate(table[:, 1].view(parallel.data_ranks, parallel.tensor_ranks)):
        differs = (read_by != read_by[0]).nonzero().flatten().tolist()
        if differs:
            first = data_rank * parallel.tensor_ranks
            text = (
                f"ranks {first} and {first + differs[0]} share the tokens, but read different batches: their "
                "data or library versions differ"
            )
            raise Refused("source", text) if parallel.rank == 0 else Stopped(ExitCode.USAGE, "")
    return batch


def fingerprint(batch: Batch) -> int:
    """A number that changes with any bit of a batch's activations, and with the order of its rows."""
    out = torch.zeros((), dtype=torch.int64)
    for salt, x in enumerate((batch.inputs, batch.targets), start=1):
        words = torch.int16 if x.element_size() == 2 else torch.int32
        rows = x.contiguous().view(words).flatten(1).sum(1, dtype=torch.int64)
        # Overflow wraps around, the same on every machine. Odd factors lose no bit.
        factors = torch.arange(1, 2 * len(rows), 2, device=x.device) * (2 * salt * 0x9E3779B1 + 1)
        out = out + (rows * factors).sum().cpu()
    return int(out)


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

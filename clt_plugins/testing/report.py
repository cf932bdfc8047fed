"""How a check fails: as advice."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).resolve().parent


class Nonconformance(AssertionError):
    """A plugin does not keep the contract: what was expected, what came, where to look."""


def complain(expected: str, got: str, look: str) -> NoReturn:
    """
    Raises:
        Nonconformance: always.
    """
    raise Nonconformance(f"expected: {expected}\n     got: {got}\n look at: {look}")


def expect(condition: Any, expected: str, got: str, look: str) -> None:
    """
    Raises:
        Nonconformance: the condition is not true.
    """
    if not condition:
        complain(expected, got, look)


def same(found: Tensor, wanted: Tensor, what: str, look: str, tolerance: float = 0.0) -> None:
    """Two tensors agree to `tolerance` times the largest number of `wanted`; 0 asks for the same bits.

    Raises:
        Nonconformance: with shapes, or how many numbers are off, by how much and where.
    """
    import torch

    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        complain(f"{what} of shape {list(wanted.shape)}, {_kind(wanted)}", f"{list(found.shape)}, {_kind(found)}", look)
    one, other = found.detach().cpu(), wanted.detach().cpu()
    if torch.equal(one, other):
        return
    error = (one.double() - other.double()).abs()
    error = torch.where(one.isnan() & other.isnan(), 0.0, error.nan_to_num(nan=torch.inf))
    allowed = tolerance * float(other.double().abs().nan_to_num(posinf=0, neginf=0).max()) if other.numel() else 0.0
    wrong = error > allowed
    if not bool(wrong.any()):
        return
    where = wrong.nonzero()[0].tolist()
    value = f"{float(one[tuple(where)]):.9g} instead of {float(other[tuple(where)]):.9g} at {where}"
    bound = f"within {allowed:.3g}" if tolerance else "bit for bit"
    complain(
        f"{what}, {bound}",
        f"{int(wrong.sum())} of {wrong.numel()} numbers off, by up to {float(error.max()):.3g} ({value})",
        look,
    )


def _kind(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def place(error: BaseException) -> str:
    """Where an exception came from: the innermost frame that is not the kit's or torch's, `file:line in function`."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/torch/" not in frame.filename and HERE not in Path(frame.filename).parents]
    frame = (own or list(frames))[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}"

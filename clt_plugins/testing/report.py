"""How a check fails: as advice."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

KIT = Path(__file__).resolve().parent


class Nonconformance(AssertionError):
    """A plugin does not keep the contract: what was expected, what came, where to look."""


def message(expected: str, got: str, look: str) -> str:
    """The three lines of a failure."""
    return f"expected: {expected}\n     got: {got}\n look at: {look}"


def complain(expected: str, got: str, look: str) -> NoReturn:
    """
    Raises:
        Nonconformance: always.
    """
    __tracebackhide__ = True
    raise Nonconformance(message(expected, got, look))


def expect(condition: Any, expected: str, got: str, look: str) -> None:
    """
    Raises:
        Nonconformance: the condition is not true.
    """
    if not condition:
        complain(expected, got, look)


def same(
    actual: Tensor, expected: Tensor, what: str, look: str, tolerance: float = 0.0, scale: float | None = None
) -> None:
    """Two tensors agree to `tolerance` times `scale`; 0 asks for the same bits.

    Args:
        scale: the largest number of `expected` if not given.

    Raises:
        Nonconformance: with shapes or types; or how many numbers differ, by how much and where.
    """
    import torch

    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    finite = expected.double().abs().nan_to_num(posinf=0, neginf=0)
    scale = scale if scale is not None else float(finite.max()) if finite.numel() else 0.0
    allowed = tolerance * scale
    bound = f"within {allowed:.3g}" if tolerance else "bit for bit"

    def advice(text: str) -> str:
        return message(f"{what}, {bound}", " ".join(text.split()), look)

    try:
        torch.testing.assert_close(actual, expected, rtol=0, atol=allowed, equal_nan=True, msg=advice)
    except AssertionError as error:
        raise Nonconformance(str(error)) from None


def one_line(error: BaseException) -> str:
    """`ValueError: its text`, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def location(error: BaseException, plugin_file: str = "") -> str:
    """Where an exception came from, `file:line in function`: the innermost frame of the plugin; where it has none, of
    neither kit nor torch; where there is none either, the plugin's file.

    Args:
        plugin_file: the plugin's module.
    """
    frames = list(traceback.extract_tb(error.__traceback__))
    own = [frame for frame in frames if _belongs(Path(frame.filename), plugin_file)]
    outside = [frame for frame in frames if "/torch/" not in frame.filename and KIT not in Path(frame.filename).parents]
    if not own and not outside and plugin_file:
        return plugin_file
    frame = (own or outside or frames)[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}"


def passed_through(error: BaseException | None, plugin_file: str) -> bool:
    """Whether an exception was raised in the plugin, or left it."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return any(_belongs(Path(frame.filename), plugin_file) for frame in frames)


def _belongs(file: Path, plugin_file: str) -> bool:
    """Whether a file is the plugin's module, or in its package."""
    module = Path(plugin_file)
    return bool(plugin_file) and (file == module or (module.name == "__init__.py" and module.parent in file.parents))

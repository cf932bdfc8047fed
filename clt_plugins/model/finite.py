"""Weights of files with which a transcoder would work, unseen, on fewer features than it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clt_plugins.errors import Refused


def check_finite(transcoder: Any, name: str, value: Tensor, folder: Path) -> None:
    """Refuse a learned tensor with numbers that are not finite. A plugin's buffers may hold any number.

    -inf is taken where it is no weight: it is the logarithm of a threshold of 0.

    Args:
        transcoder: a `CrossLayerTranscoder`; this module stands below it.
        name: of the tensor in files.
        folder: where it was read from.

    Raises:
        Refused: names the tensor.
    """
    if name not in transcoder.views() or bool(value.isfinite().all()):
        return
    if name.startswith(("W_", "b_")) or bool((value.isnan() | value.isposinf()).any()):
        raise Refused(folder, f"tensor {name!r} holds numbers that are not finite")

"""Activations that are no finite numbers are refused, with the layer, the type and the remedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clt_plugins import Batch, Refused


def check_finite(value: Any, layer: int) -> None:
    """Refuse activations of a layer that overflow the model's type, or are NaN; other values than tensors pass.

    Raises:
        Refused: the message names the layer, as the model numbers it, and the remedy.
    """
    if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise _not_finite(layer, value.dtype)


def check_rows(rows: Batch, layers: list[int]) -> None:
    """The same for read rows.

    Args:
        layers: the numbers in the model of the layers that are read.
    """
    for values in (rows.inputs, rows.targets):
        # The largest and least of each layer: one pass over the memory each, and nothing is allocated.
        ends = torch.stack([values.amax((0, 2)), values.amin((0, 2))])
        finite = torch.isfinite(ends).all(0)
        if not bool(finite.all()):
            raise _not_finite(layers[int(finite.to(torch.uint8).argmin())], values.dtype)


def _not_finite(layer: int, dtype: torch.dtype) -> Refused:
    name = str(dtype).removeprefix("torch.")
    text = f"an activation of layer {layer} is not a finite number in {name}"
    if dtype == torch.float16:
        return Refused("model.dtype", f"{text}: set model.dtype = bfloat16")
    return Refused("model.path", f"{text}: are its weights whole, and is model.dtype the type it was trained in?")

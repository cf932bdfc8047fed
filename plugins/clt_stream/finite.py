"""Activations that are no finite numbers are refused, with the layer, the type and the remedy."""

from __future__ import annotations

from collections.abc import Callable
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
    finite_later(rows, layers)()


def finite_later(rows: Batch, layers: list[int]) -> Callable[[], None]:
    """The same, begun now; calling the result waits for the answer, and only for that."""
    values = rows.inputs, rows.targets
    if not rows.tokens:  # a forward pass may have none, of which no least and largest exist
        return lambda: None
    # The largest and least of each layer: one pass over the memory each, and nothing is allocated.
    finite = torch.stack([torch.isfinite(torch.stack([x.amax((0, 2)), x.amin((0, 2))])).all(0) for x in values])
    done = None
    if finite.is_cuda:
        answer = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True)
        finite, done = answer.copy_(finite, non_blocking=True), torch.cuda.Event()
        done.record()

    def check() -> None:
        if done is not None:
            done.synchronize()
        for x, good in zip(values, finite, strict=True):
            if not bool(good.all()):
                raise _not_finite(layers[int(good.to(torch.uint8).argmin())], x.dtype)

    return check


def _not_finite(layer: int, dtype: torch.dtype) -> Refused:
    name = str(dtype).removeprefix("torch.")
    text = f"an activation of layer {layer} is not a finite number in {name}"
    if dtype == torch.float16:
        return Refused("model.dtype", f"{text}: set model.dtype = bfloat16")
    return Refused("model.path", f"{text}: are its weights whole, and is model.dtype the type it was trained in?")

"""Updates by Adam that kernels are tried on, compared with the engine's reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from clt_plugins.data.update import AdamUpdate
from clt_plugins.testing.report import expect, same
from clt_plugins.training.optimizers.reference import joined, update_rows

FORMS = {
    "bfloat16 weights and moments": (torch.bfloat16, torch.bfloat16, False),
    "bfloat16 weights": (torch.bfloat16, torch.float32, False),
    "bfloat16 moments": (torch.float32, torch.bfloat16, False),
    "float32": (torch.float32, torch.float32, False),
    "split weights, bfloat16 moments": (torch.bfloat16, torch.bfloat16, True),
    "split weights": (torch.bfloat16, torch.float32, True),
}
"""Types of weights and moments, and whether weights have lower halves."""

PLACES = {
    "7 x 130, in periods of 3 rows": (7, 130, 7, 3, 1000),
    "1 x 600, over the 2^32nd element": (1, 600, 2**32 - 100, 1, 600),
    "9 x 6, far behind": (9, 6, 2**40 + 3, 2, 50),
}
"""Rows, columns; the first element, period and stride."""


def example(form: str, place: str, *, decay: float = 0.0, coupled: float = 0.0, seed: int = 0) -> AdamUpdate:
    """A random update; two calls give the same one. One row's gradient is 0, and `grad_squares` says so."""
    numbers = torch.Generator().manual_seed(seed)
    weights, moments, split = FORMS[form]
    rows, columns, first, period, stride = PLACES[place]

    def draw(dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(rows, columns, generator=numbers).to(dtype)

    weight, grad, mean, square = draw(weights), draw(weights), draw(moments), draw(moments).square()
    grad[rows // 2] *= rows == 1
    return AdamUpdate(
        weight=weight,
        low=torch.randint(-(2**15), 2**15, (rows, columns), generator=numbers).short() if split else None,
        grad=grad,
        mean=mean,
        square=square,
        grad_squares=grad.float().square().sum(1),
        scalars=torch.tensor([0.7, 0.05, 2.6, decay, 3.0]),
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=coupled,
        key=0xDEADBEEF,
        first=first,
        period=period,
        stride=stride,
    )


def cases() -> Iterator[tuple[str, str, float, float]]:
    """Form, place, decoupled and coupled decay."""
    for form in FORMS:
        for number, place in enumerate(PLACES):
            yield form, place, 0.01 * (number == 0), 0.1 * (number == 1)


def assert_updates(kernels: Any) -> None:
    """All forms are updated as by the engine's reference, but for the last digit.

    Raises:
        Nonconformance: which numbers are off.
    """
    for form, place, decay, coupled in cases():
        right, result = (example(form, place, decay=decay, coupled=coupled) for _ in range(2))
        update_rows(right)
        kernels.update_rows(result)
        what = f"`update_rows` of {kernels.name!r}, {form}, {place}"
        for name in ("weight", "mean", "square"):
            exact, found = getattr(right, name), getattr(result, name)
            if name == "weight" and right.low is not None and result.low is not None:
                exact, found = joined(exact, right.low), joined(found, result.low)
            bound = 1e-6
            if exact.dtype == torch.bfloat16:
                # Where the last digit of a float32 differs, its random bits may choose the other neighbour: seldom.
                others = int((exact != found).sum())
                expect(others <= 1, f"{name} rounded by the same bits", f"{others} of {exact.numel()} others", what)
                bound = 2**-7
            same(found.double(), exact.double(), f"{name} as by the engine", what, bound)
    for form in FORMS:
        assert_nan_stays(kernels, form)


def assert_nan_stays(kernels: Any, form: str) -> None:
    """What is NaN is stored as NaN: that of x86, and that of GPUs, whose bits become those of 0 if something is added.

    Raises:
        Nonconformance: which numbers are not NaN.
    """
    for bits in (0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF):
        result = example(form, next(iter(PLACES)))
        result.scalars.view(torch.int32)[0] = bits - 2**32 if bits >= 2**31 else bits
        kernels.update_rows(result)
        kept = {"weight": result.weight, "mean": result.mean, "square": result.square}
        if result.low is not None:
            kept["weight with its lower half"] = joined(result.weight, result.low)
        for name, found in kept.items():
            what = f"`update_rows` of {kernels.name!r}, {form}, gradients times NaN ({bits:#x})"
            others = found[~found.isnan()].tolist()
            expect(not others, f"{name}: NaN everywhere", f"{len(others)} numbers, the first {others[:1]}", what)

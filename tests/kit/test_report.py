"""How the kit tells that two tensors differ."""

from __future__ import annotations

import re

import pytest
import torch

from clt_plugins.testing import Nonconformance
from clt_plugins.testing.report import same

NAN = float("nan")


@pytest.mark.parametrize(
    ("actual", "expected", "tolerance"),
    [
        ([1.0, NAN, float("inf")], [1.0, NAN, float("inf")], 0.0),
        ([1.0, 10.05], [1.05, 10.0], 0.01),
        ([], [], 0.0),
        ([0.0, NAN], [0.0, NAN], 1e-3),
    ],
)
def test_what_is_the_same(actual: list[float], expected: list[float], tolerance: float) -> None:
    same(torch.tensor(actual), torch.tensor(expected), "numbers", "nowhere", tolerance)


@pytest.mark.parametrize(
    ("actual", "expected", "tolerance", "text"),
    [
        (
            [1.0, 2.0, 4.0],
            [1.0, 2.0, 3.0],
            0.0,
            r"bit for bit\n     got: .*1 / 3 .*at index \(2,\).* look at: `decode`",
        ),
        ([1.0, 10.2], [1.05, 10.0], 0.01, r"within 0.1\n     got: .*1 / 2 "),
        ([1.0, NAN], [1.0, 2.0], 10.0, "1 / 2 "),
        ([1.0, 2.0], [1.0, NAN], 10.0, "1 / 2 "),
        ([1.0], [1.0, 2.0], 0.0, r"got: .*shape"),
    ],
)
def test_what_differs_is_told_with_number_size_and_place(
    actual: list[float], expected: list[float], tolerance: float, text: str
) -> None:
    with pytest.raises(Nonconformance) as caught:
        same(torch.tensor(actual), torch.tensor(expected), "numbers", "`decode`", tolerance)
    assert str(caught.value).startswith("expected: numbers, ")
    assert re.search(text, str(caught.value), re.S)
    assert len(str(caught.value).splitlines()) == 3


def test_another_type_is_told() -> None:
    with pytest.raises(Nonconformance, match="float64"):
        same(torch.zeros(2), torch.zeros(2, dtype=torch.float64), "numbers", "`decode`")

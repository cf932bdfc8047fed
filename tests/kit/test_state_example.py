"""The guide's example of state keeps the contract; and what the kit says of it with a fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from clt_plugins.registry.plugins import load_plugins
from tests.support.guide import package
from tests.support.kit_says import failures_of

if TYPE_CHECKING:
    from tests.conftest import Distributions


def failures(only: str = "") -> dict[str, str]:
    return failures_of("clt_state", lambda case: only in str(case))


def test_the_example_of_the_guide_conforms(distributions: Distributions) -> None:
    distributions.package(package("clt_state"))
    assert failures() == {}


def test_a_parameter_in_float32_is_told_as_rounding(distributions: Distributions) -> None:
    if "tensor" not in load_plugins().choices("parallel"):
        pytest.skip("no choice 'tensor' for [parallel] is installed")
    files = package("clt_state")
    right = "dtype = torch.promote_types(context.dtype, torch.float32)"
    assert files["clt_state/penalties.py"].count(right) == 1
    files["clt_state/penalties.py"] = files["clt_state/penalties.py"].replace(right, "dtype = torch.float32")
    distributions.package(files)
    found = failures("learned/")
    assert found.keys() == {"learned/data_parallel"}
    assert "float32 rounding" in found["learned/data_parallel"]
    assert "`torch.promote_types(context.dtype, torch.float32)`" in found["learned/data_parallel"]
    assert "miss those of other ranks" not in found["learned/data_parallel"]

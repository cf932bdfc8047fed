"""The simulated GPU needs torch 2.13: fake implementations of collectives, and no first tensor on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

OLD = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if OLD:
        skip = pytest.mark.skip(reason=f"a GPU is simulated by torch 2.13 and later, not by {torch.__version__}")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)

"""The choices of a stub plugin, with all installed ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from clt_plugins.registry.plugins import Plugins, load_plugins
from tests.support.recipes import STUB

if TYPE_CHECKING:
    from tests.conftest import Distributions


@pytest.fixture
def stubbed(distributions: Distributions) -> Plugins:
    distributions.module("stub_choices", STUB)
    return load_plugins(extra=["stub_choices"])

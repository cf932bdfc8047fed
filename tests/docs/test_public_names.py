"""The guide for plugins explains every public name, besides listing it."""

from __future__ import annotations

import re

import pytest

import clt_plugins
import clt_plugins.testing
from tests.support.guide import guide

TEXT = re.sub(r"<!-- public -->\n.*\n", "", guide())
NAMES = [name for name in clt_plugins.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", [*NAMES, *clt_plugins.testing.__all__])
def test_a_public_name_is_explained(name: str) -> None:
    assert re.search(rf"`[^`\n]*\b{name}\b", TEXT)

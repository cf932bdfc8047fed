"""What several tests of the engine use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Distributions


@pytest.fixture
def third_party(distributions: Distributions) -> Callable[[str], None]:
    """Installs a plugin `mine` of the distribution `clt-mine 1.0` with this source."""
    return lambda source: distributions.install("clt-mine", "1.0", {"mine": source})

"""What several plugins' tests use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.plugins.serving import Serving


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    """Starts servers of `tmp_path / "root"`."""
    from tests.plugins.serving import Serving

    (tmp_path / "root").mkdir()
    started: list[Serving] = []

    def start(**options: Any) -> Serving:
        started.append(Serving(tmp_path / "root", **options))
        return started[-1]

    yield start
    for each in started:
        if each.thread.is_alive():
            each.stop()

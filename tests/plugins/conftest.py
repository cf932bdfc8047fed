"""What several plugins' tests use."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.serving import Serving


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    """Starts servers of `tmp_path / "root"`."""
    from tests.support.serving import Serving

    (tmp_path / "root").mkdir()
    started: list[Serving] = []

    def start(**options: Any) -> Serving:
        started.append(Serving(tmp_path / "root", **options))
        return started[-1]

    yield start
    for each in started:
        if each.thread.is_alive():
            each.stop()


@pytest.fixture(autouse=True)
def time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that hangs fails, with the place where it does."""
    limit = 3600 if request.node.get_closest_marker("slow") else 240

    def late(*_: Any) -> None:
        raise TimeoutError(f"the test has not ended after {limit} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(limit)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)

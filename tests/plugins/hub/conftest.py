"""The stand-in of the hub, which this process is turned to; and a run to push."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub.client import turned_to
from tests.support.hub.small import small_run
from tests.support.hub.standin import Standin


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Standin]:
    with Standin().running() as standin, turned_to(standin.url, tmp_path / "home"):
        yield standin


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a converted transcoder, an evaluation and an export; not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    convert = {"tokens": 512, "calibration_tokens": 512, "tolerance": 0.05}
    exports = [{"name": "circuit-tracer", "model_name": "user/model", "input_hook": "mlp.hook_in"}]
    return small_run(folder, convert=convert, evaluate={"tokens": 512}, exports=exports)

"""The conformance kit on the source and the exporter, which have one name.

The settings are those of the source; the exporter gets the language model's name from the recipe.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from clt_plugins.testing import Case, parametrize
from tests.support.crosslayer_coding import write


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the data set `data`."""
    folder = tmp_path_factory.mktemp("stored")
    write(folder / "data", [90, 70, 110])
    return folder


@parametrize(
    "crosslayer_coding",
    settings={"crosslayer-coding": {"path": "data", "held_out_tokens": 30, "buffer_tokens": 32}},
    recipe={"model": {"path": "some/model"}},
)
def test_crosslayer_coding(case: Case, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored)
    case.run()

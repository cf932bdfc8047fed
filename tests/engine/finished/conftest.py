"""A run that only trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from clt_plugins import run
from tests.support.helpers import tables


@pytest.fixture(scope="module")
def simple(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(tables(), out=folder)
    return folder


@pytest.fixture
def trained(simple, tmp_path) -> Path:
    """A run that only trained, in a folder of its own."""
    shutil.copytree(simple, tmp_path / "run")
    return tmp_path / "run"

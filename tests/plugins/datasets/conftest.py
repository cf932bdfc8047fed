"""What is uploaded to a server, and the token that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.stored_data import write_numbered


@pytest.fixture
def chunk(tmp_path: Path) -> bytes:
    """A chunk's file, small."""
    write_numbered(tmp_path / "small", [30])
    return (tmp_path / "small" / "train_00000.h5").read_bytes()


@pytest.fixture
def token(monkeypatch: Any) -> None:
    monkeypatch.setenv("CLT_TOKEN", "secret")
